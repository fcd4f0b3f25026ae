"""Features out: of the model, of exported files and of a folder of images."""

import dataclasses
import pathlib
from typing import Literal

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
import random_weights
import tiny
import torch
from PIL import Image

import sit_jax
from sit_jax.cli import app as cli
from sit_jax.errors import UserError
from sit_jax.io.export import torch_model
from sit_jax.io.load import read_weights
from sit_jax.models.architecture import Architecture
from sit_jax.models.features import spread_tokens

FOLDER = pathlib.Path("tests/golden/backbones")
GRIDS: tuple[Literal["rtsm", "spread"] | None, ...] = (None, "rtsm", "spread")


def without_class_token() -> Architecture:
    arch = read_weights(FOLDER / "timm_gap").vit
    return dataclasses.replace(arch, image_size=(32, 48), stage_blocks=(1, 1), keep_ratio=0.5, num_classes=3)


ARCHITECTURES = {"a distillation token": tiny.STUDENT, "no class token": without_class_token()}


def test_tokens_are_spread_by_the_rows() -> None:
    rng = np.random.default_rng(0)
    first, second, tokens = rng.random((1, 4, 3)), rng.random((1, 3, 2)), rng.random((1, 2, 5))
    first[0, 1] = 0  # A dropped token.
    middle = np.array([sum(second[0, i, j] * tokens[0, j] for j in range(2)) / second[0, i].sum() for i in range(3)])
    sums = first[0].sum(axis=1)
    full = [sum(first[0, i, j] * middle[j] for j in range(3)) / sums[i] if i != 1 else np.zeros(5) for i in range(4)]
    found = spread_tokens(jnp.asarray(tokens), [jnp.asarray(first), jnp.asarray(second)])
    np.testing.assert_allclose(found[0], full, rtol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_features_of_the_model_and_its_exports(name: str, tmp_path: pathlib.Path) -> None:
    weights = random_weights.draw(ARCHITECTURES[name], rtsm=True)
    weights.save(tmp_path / "whole", with_rtsm=True)
    words = ["export", str(tmp_path / "whole")]
    assert cli.main([*words, str(tmp_path / "model"), "--format", "folder", "--features", "--with_rtsm"]) == 0
    model, module = sit_jax.load(tmp_path / "model", with_rtsm=True), torch_model.load(tmp_path / "model")
    assert model.arch.num_classes == 0
    pixels = random_weights.pixels(weights.vit, 3)
    for grid in GRIDS:
        found = model.features(pixels, grid)
        assert found.patch_tokens.shape[1] == weights.vit.token_counts[-1 if grid is None else 0]
        with torch.no_grad():
            expected = module.features(module.normalize(torch.from_numpy(pixels)), grid)
        kinds = ("onnx", "stablehlo") if grid is None or name == "a distillation token" else ()
        files = [tmp_path / f"{grid}.{kind}" for kind in kinds]
        for file in files:
            options = [] if grid is None else ["--grid", grid]
            assert cli.main([*words, str(file), "--format", file.suffix[1:], "--features", *options]) == 0
        for source in (found, weights.features(pixels, grid), *(sit_jax.load(file).features(pixels) for file in files)):
            for key, value in source._asdict().items():
                np.testing.assert_allclose(value, expected[key], rtol=0, atol=1e-4, err_msg=f"{grid} {key}")
    exported = sit_jax.load(tmp_path / "None.stablehlo")
    np.testing.assert_array_equal(exported(pixels), exported.features(pixels).pooled)


def test_features_that_there_are_not(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_weights.draw().save(tmp_path / "model")
    model, pixels = sit_jax.load(tmp_path / "model"), random_weights.pixels(tiny.STUDENT, 1)
    with pytest.raises(UserError, match="with_rtsm"):
        model.features(pixels, "rtsm")
    with pytest.raises(ValueError, match="grid"):
        model.features(pixels, "full")  # type: ignore[arg-type]
    lines = {
        "--grid": ["--format", "stablehlo", "--grid", "spread"],
        "reverse modules": ["--format", "stablehlo", "--features", "--grid", "rtsm"],
        "--features": ["--format", "timm", "--features"],
    }
    for word, options in lines.items():
        dest = tmp_path / ("x.pth" if "timm" in options else "x.stablehlo")
        assert cli.main(["export", str(tmp_path / "model"), str(dest), *options]) == 2
        assert word in capsys.readouterr().err.splitlines()[-1]
        assert not dest.exists()
    assert cli.main(["export", str(tmp_path / "model"), str(tmp_path / "y.stablehlo"), "--format", "stablehlo"]) == 0
    with pytest.raises(UserError, match="--features"):
        sit_jax.load(tmp_path / "y.stablehlo").features(pixels)


def test_embeddings_of_a_folder(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    # Grey images, which resizing and cropping do not change.
    grey = np.array([10, 60, 0, 130, 250], np.uint8)[:, None, None, None]
    pixels = np.broadcast_to(grey, (5, *tiny.STUDENT.image_shape, 1))
    for index, image in enumerate(pixels):
        Image.fromarray(image[:, :, 0]).save(images / f"{index}.png")
    (images / "2.png").write_bytes(b"no image")
    random_weights.draw().save(tmp_path / "model")
    words = ["predict", str(tmp_path / "model"), str(images), "--batch_size", "2", "--features"]
    assert cli.main([*words, str(tmp_path / "out.npz")]) == 1
    assert "2.png" in capsys.readouterr().err
    assert cli.main([*words, str(tmp_path / "out.parquet")]) == 1
    found = np.load(tmp_path / "out.npz")
    assert [pathlib.Path(name).name for name in found["images"]] == ["0.png", "1.png", "3.png", "4.png"]
    expected = sit_jax.load(tmp_path / "model").features(pixels[[0, 1, 3, 4]]).pooled
    np.testing.assert_allclose(found["features"], expected, rtol=0, atol=1e-5)
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert table["image"].to_pylist() == list(found["images"])
    np.testing.assert_array_equal(np.array(table["features"].to_pylist(), np.float32), found["features"])
    for name in ("out.npz", "out.csv"):  # It exists; it has another suffix.
        capsys.readouterr()
        assert cli.main([*words, str(tmp_path / name)]) == 2
        assert name in capsys.readouterr().err.splitlines()[-1]
    assert cli.main([*words[:2], str(images / "2.png"), "--features", str(tmp_path / "none.npz")]) == 2
    assert not (tmp_path / "none.npz").exists()
