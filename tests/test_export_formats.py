"""ONNX, StableHLO and state dicts: the same logits and the same accuracy everywhere, and errors in one line."""

import dataclasses
import json
import pathlib
import re
import shlex
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import original_models
import pytest
import random_weights
import safetensors.numpy
import tiny
import torch
from PIL import Image

from sit_jax.cli import app as cli
from sit_jax.errors import UserError
from sit_jax.io.export import onnx_file, torch_model
from sit_jax.io.load import load, read_weights
from sit_jax.models import build_model
from sit_jax.training.evaluate import evaluate_model

WEIGHTS = random_weights.draw(rtsm=True)
IMAGES = random_weights.images(tiny.STUDENT, 5)
PIXELS = random_weights.pixels(tiny.STUDENT, 5)


@pytest.fixture(scope="module")
def expected() -> dict[bool, np.ndarray]:
    """The logits of `IMAGES` and of `PIXELS` (True) by the model itself."""
    apply, variables = jax.jit(build_model(tiny.STUDENT).apply), random_weights.variables(WEIGHTS)
    given = {False: IMAGES, True: ((PIXELS / 255 - 0.4) / 0.2).astype(np.float32)}
    return {raw: np.asarray(apply(variables, jnp.asarray(images))[0]) for raw, images in given.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model folder; beside it are its exports, `images.onnx`, `pixels.onnx` (--raw_input) and so on."""
    path = tmp_path_factory.mktemp("formats") / "model"
    WEIGHTS.save(path, with_rtsm=True)
    for kind in ("onnx", "stablehlo"):
        for name, words in (("images", []), ("pixels", ["--raw_input", "--licence", "MIT"])):
            assert cli.main(["export", str(path), str(path.parent / f"{name}.{kind}"), "--format", kind, *words]) == 0
    return path


@pytest.mark.parametrize("raw", [False, True])
def test_onnx(raw: bool, folder: pathlib.Path, expected: dict[bool, np.ndarray]) -> None:
    name = "pixels" if raw else "images"
    file = folder.with_name(f"{name}.onnx")
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert not any("BatchNorm" in node.op_type for node in model.graph.node)
    assert str(pathlib.Path.cwd()).encode() not in file.read_bytes()
    session = onnxruntime.InferenceSession(file)
    assert [x.name for x in session.get_inputs()] == [name]
    given = PIXELS if raw else IMAGES.transpose(0, 3, 1, 2)
    for count in (1, 2, 5):
        (logits,) = session.run(["logits"], {name: given[:count]})
        np.testing.assert_allclose(logits, expected[raw][:count], atol=1e-4)
    predictor = load(file)
    np.testing.assert_allclose(predictor.logits(PIXELS), expected[True], atol=1e-4)
    assert predictor.class_names == WEIGHTS.metadata["class_names"]
    assert predictor.metadata["licence"] == ("MIT" if raw else "Apache-2.0")


def test_onnx_in_float16(folder: pathlib.Path, tmp_path: pathlib.Path, expected: dict[bool, np.ndarray]) -> None:
    file = tmp_path / "half.onnx"
    assert cli.main(["export", str(folder), str(file), "--format", "onnx", "--dtype", "float16", "--raw_input"]) == 0
    types = {tensor.data_type for tensor in onnx.load(file).graph.initializer if tensor.dims}
    assert onnx.TensorProto.FLOAT16 in types
    parameters = sum(np.size(x) for x in jax.tree.leaves(WEIGHTS.params))
    assert parameters * 2 < file.stat().st_size < parameters * 2 + 200_000
    logits = load(file).logits(PIXELS)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected[True], atol=2e-2)


@pytest.mark.parametrize("raw", [False, True])
def test_stablehlo(raw: bool, folder: pathlib.Path, tmp_path: pathlib.Path, expected: dict[bool, np.ndarray]) -> None:
    file = folder.with_name("pixels.stablehlo" if raw else "images.stablehlo")
    description = json.loads(file.with_name(f"{file.name}.json").read_text())
    assert description["class_names"] == WEIGHTS.metadata["class_names"]
    assert description["preprocessing"] == WEIGHTS.metadata["preprocessing"]
    assert description["licence"] == ("MIT" if raw else "Apache-2.0")
    assert b".py" not in file.read_bytes()
    np.save(tmp_path / "given.npy", PIXELS if raw else IMAGES)
    program = f"""
import sys
import numpy as np
from sit_jax.io.export.stablehlo import load
model = load({str(file)!r})
given = np.load({str(tmp_path / "given.npy")!r})
logits = [np.asarray(model.run(given[:count])) for count in (1, 2, 5)]
np.savez({str(tmp_path / "logits.npz")!r}, *logits)
loaded = [name for name in sys.modules if name.startswith(("sit_jax", "flax"))]
assert sorted(loaded) == ["sit_jax", "sit_jax.errors", "sit_jax.io", "sit_jax.io.atomic_write", "sit_jax.io.export",
                          "sit_jax.io.export.stablehlo"], loaded
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    with np.load(tmp_path / "logits.npz") as results:
        for count, logits in zip((1, 2, 5), results.values(), strict=True):
            np.testing.assert_allclose(logits, expected[raw][:count], atol=1e-5)
    exported = jax.export.deserialize(bytearray(file.read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    np.testing.assert_allclose(load(file).logits(PIXELS), expected[True], atol=1e-4)


def flip(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


@pytest.mark.parametrize("kind", ["onnx", "stablehlo"])
def test_six_convolutions_and_a_distillation_token(kind: str, tmp_path: pathlib.Path) -> None:
    weights = random_weights.draw(
        tiny.plain(stem="conv6", residual_scale=3.0, qkv_bias=False, stage_blocks=(1, 3), keep_ratio=0.5,
                   distillation_token=True)
    )  # fmt: skip
    weights.save(tmp_path / "model")
    file = tmp_path / f"model.{kind}"
    assert cli.main(["export", str(tmp_path / "model"), str(file), "--format", kind]) == 0
    np.testing.assert_allclose(load(file).logits(PIXELS), weights.logits(PIXELS), atol=1e-4)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_state_dicts_of_the_original(suffix: str, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    file = tmp_path / f"model{suffix}"
    words = ["export", str(folder), str(file), "--format", "original"]
    assert cli.main([*words, "--with_rtsm"]) == 0
    original = original_models.state_dict(tiny.STUDENT, rtsm=True)
    stored = read(file)
    assert set(stored) == set(original)
    assert all(np.array_equal(stored[key], original[key]) for key in original)
    file.unlink()
    assert cli.main(words) == 0
    assert set(read(file)) == {key for key in original if not key.startswith("rtsm.")}


def read(file: pathlib.Path) -> dict[str, np.ndarray]:
    if file.suffix == ".pth":
        return {key: value.numpy() for key, value in torch.load(file, weights_only=True).items()}
    return safetensors.numpy.load_file(file)


def test_timms_layout(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    arch = tiny.plain(stem="patch", distillation_token=True, aux_head=True)
    weights = random_weights.draw(arch)
    weights.save(tmp_path / "model")
    assert cli.main(["export", str(tmp_path / "model"), str(tmp_path / "vit.safetensors"), "--format", "timm"]) == 0
    assert "aux_head is left out" in capsys.readouterr().err
    stored = read(tmp_path / "vit.safetensors")
    assert stored["pos_embed"].shape == (1, 6, 16)  # As in timm's VisionTransformerDistilled.
    assert {"dist_token", "head_dist.weight"} <= set(stored)
    assert "dist_pos_embed" not in stored
    back = read_weights(tmp_path / "vit.safetensors", {"num_heads": arch.num_heads})
    assert back.arch == dataclasses.replace(arch, aux_head=False)
    for name, value in back.params.items():
        jax.tree.map(np.testing.assert_array_equal, value, weights.params[name])


def test_the_digits_student_scores_the_same_in_every_format(
    digits_run: pathlib.Path, digits_dir: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate_model(load(digits_run))
    assert 0.15 < result["top1"] < 1
    places = {"folder": "model", "onnx": "model.onnx", "stablehlo": "model.stablehlo"}
    for kind, place in places.items():
        words = ["--with_rtsm"] if kind == "folder" else ["--raw_input"]
        assert cli.main(["export", str(digits_run), str(tmp_path / place), "--format", kind, *words]) == 0
        capsys.readouterr()
        assert cli.main(["evaluate", str(tmp_path / place), "--data_dir", digits_dir, "--json"]) == 0
        scores = json.loads(capsys.readouterr().out)
        assert (scores["examples"], scores["top1"], scores["top5"]) == (359, result["top1"], result["top5"]), kind
        assert scores["loss"] == pytest.approx(result["loss"], abs=1e-4)
    weights = load(tmp_path / "model")
    assert weights.metadata["class_names"] == [str(digit) for digit in range(10)]
    assert weights.metadata["provenance"]["step"] == 2 * (1438 // 128)
    assert set(weights.rtsm) == {f"blocks_{block}" for block in range(2)}
    assert cli.main(["export", str(digits_run), str(tmp_path / "ema"), "--format", "folder", "--ema"]) == 0
    averaged = load(tmp_path / "ema")
    assert averaged.metadata["provenance"]["ema"] is True
    assert not np.allclose(averaged.params["head"]["kernel"], weights.params["head"]["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize("kept", [(16, 6, 2), (16, 3, 1)])
def test_token_schedules(kept: tuple[int, ...], tmp_path: pathlib.Path) -> None:
    choices = ((16, 8, 4), (16, 6, 2), (16, 3, 1))
    weights = random_weights.draw(
        tiny.plain(image_size=64, stage_blocks=(1, 1, 2), kept_tokens_choices=choices), rtsm=True
    )
    weights.save(tmp_path / "whole", with_rtsm=True)
    pixels = random_weights.pixels(weights.vit)
    expected = np.asarray(weights.cut(kept)(pixels))
    assert np.abs(expected - np.asarray(weights(pixels))).max() > 1e-2
    for kind, place in {"folder": "model", "onnx": "m.onnx", "stablehlo": "m.stablehlo"}.items():
        words = ["export", str(tmp_path / "whole"), str(tmp_path / place), "--format", kind]
        assert cli.main([*words, "--kept_tokens", ",".join(map(str, kept))]) == 0
        opened = load(tmp_path / place)
        assert opened.arch.token_counts == kept  # type: ignore[union-attr]
        np.testing.assert_allclose(opened(pixels), expected, atol=1e-4)
    model = torch_model.load(tmp_path / "model")
    with torch.inference_mode():
        logits = model(model.normalize(torch.from_numpy(pixels)))
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    # The folder of the whole model opens in PyTorch as well, and has the largest schedule.
    whole = torch_model.load(tmp_path / "whole")
    with torch.inference_mode():
        logits = whole(whole.normalize(torch.from_numpy(pixels)))
    np.testing.assert_allclose(logits, weights(pixels), atol=1e-4)


@pytest.mark.slow
def test_the_walkthrough(
    digits_run: pathlib.Path, digits_dir: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```(sh|python)\n(.*?)```", pathlib.Path("docs/deploy.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    pathlib.Path("runs").mkdir()
    pathlib.Path("runs/digits").symlink_to(digits_run)
    pathlib.Path("data").symlink_to(digits_dir)
    pathlib.Path("images").mkdir()
    for index, pixels in enumerate(PIXELS):
        Image.fromarray(pixels[:, :, 0]).save(f"images/{index}.png")
    names: dict[str, Any] = {}
    for language, text in blocks:
        if language == "python":
            exec(text, names)
            continue
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            assert words[0] == "sit"
            assert cli.main(words[1:]) == 0, line
    assert names["probabilities"].shape == (4, 10)
    assert names["terms"]["loss"].shape == ()
    assert names["logits"].shape == (2, 10)
    assert len(names["names"]) == 10
    assert sum(language == "python" for language, _ in blocks) == 5


def test_onnx_without_its_packages(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"onnxscript.*\.\[onnx\]"):
        onnx_file.save(tmp_path / "m.onnx", WEIGHTS, "float32", raw_input=False)
    assert list(tmp_path.iterdir()) == []


def with_description(text: str | None) -> bytes:
    """An ONNX file with another description of the model, or none."""
    model = onnx.helper.make_model(onnx.helper.make_graph([], "", [], []))
    if text is not None:
        model.metadata_props.add(key="sit_jax", value=text)
    return bytes(model.SerializeToString())


def test_damaged_exports(folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph, artifact = (folder.with_name(f"images.{kind}").read_bytes() for kind in ("onnx", "stablehlo"))
    text = folder.with_name("images.stablehlo.json").read_text()
    damaged = [b"", graph[:1000], flip(graph, graph.index(b'{"format"'))]
    damaged += map(with_description, ("{", "[]", "{}", None))
    cases: list[tuple[str, bytes, str | None]] = [("m.onnx", content, None) for content in damaged]
    cases += [("m.stablehlo", content, text) for content in (b"", artifact[: len(artifact) // 2], flip(artifact, 3000))]
    cases += [("m.stablehlo", artifact, description) for description in ("[]", "[" * 100_000, None)]
    for name, content, description in cases:
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name}.json").unlink(missing_ok=True)
        if description is not None:
            (tmp_path / f"{name}.json").write_text(description)
        with pytest.raises(UserError, match=rf"{name}(\.json)?: ") as raised:
            load(tmp_path / name)
        assert len(str(raised.value).splitlines()) == 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("export MODEL m.txt --format onnx", ".onnx"),
        ("export MODEL m.onxx --format onnx", "did you mean .onnx?"),
        ("export MODEL m.onnx --format folder", "folder"),
        ("export MODEL m.pt2 --format folder", "did you mean .pt?"),
        ("convert MODEL m.safetensor", "did you mean .safetensors?"),
        ("convert MODEL m.h5", ".pth"),
        ("convert MODEL m.onnx", ".pth"),
        ("export MODEL m.pth --format timm", "conv4"),
        ("export PLAIN m.pth --format timm", "norm_eps 1e-05 (timm's is 1e-06)"),
        ("export MODEL m.onnx --format onnx --with_reverse", "--with_rtsm"),
        ("export MODEL m --format folder --raw_input", "--raw_input"),
        ("export MODEL m --format folder --dtype float16", "--dtype"),
        ("export MODEL m --format folder --step 3", "--step"),
        ("export MODEL x.safetensors --format original --licence MIT", "--licence: "),
        ("convert MODEL x.safetensors --licence MIT", "--licence: "),
        ("evaluate MODEL", "--name"),  # Not the model of a run.
    ],
)
def test_refusals(
    words: str,
    named: str,
    folder: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "PLAIN" in words:
        random_weights.draw(tiny.plain(stem="patch", norm_eps=1e-5)).save("PLAIN")
    assert cli.main(words.replace("MODEL", str(folder)).split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert {path.name for path in tmp_path.iterdir()} <= {"PLAIN"}


def test_licences(folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words, licence in (
        (f"convert {folder} a --licence MIT", "MIT"),
        ("convert a b --num_classes 3 --image_size 64", "MIT"),
        ("export b c --format folder", "MIT"),
        ("export c d --format folder --licence CC-BY-4.0", "CC-BY-4.0"),
    ):
        assert cli.main(words.split()) == 0
        assert load(words.split()[2]).metadata["licence"] == licence, words


def test_names_with_a_dot(folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows the dot of a model's name is not a suffix; suffixes are read in any case."""
    monkeypatch.chdir(tmp_path)
    for words in (
        f"convert {folder} deit_small_sit_0.7",
        "export deit_small_sit_0.7 deit_0.25_ema --format folder",
        "convert deit_0.25_ema/model.safetensors v1.0",
    ):
        assert cli.main(words.split()) == 0, words
        assert load(words.split()[2]).arch == WEIGHTS.arch
    assert cli.main(["convert", "v1.0", "x.Safetensors"]) == 0
    assert pathlib.Path("x.Safetensors").read_bytes() == pathlib.Path("v1.0/model.safetensors").read_bytes()
    with pytest.raises(UserError):
        WEIGHTS.save("model.safetensors")
