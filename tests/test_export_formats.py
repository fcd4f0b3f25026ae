"""ONNX, StableHLO and state dicts: the same logits and the same accuracy everywhere, and refusals in one line."""

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
import pytest
import random_weights
import safetensors.numpy
import tiny
import torch
from PIL import Image
from sklearn.datasets import load_digits

from sit_jax.cli import app as cli
from sit_jax.config import Config, DataConfig, LogConfig, OptimConfig
from sit_jax.errors import UserError
from sit_jax.io.convert.sit_names import to_original
from sit_jax.io.export import onnx_file, stablehlo, torch_model
from sit_jax.io.export.forward import make_forward
from sit_jax.io.load import load
from sit_jax.models import build_model
from sit_jax.training.evaluate import evaluate_model
from sit_jax.training.loop import run

WEIGHTS = random_weights.draw(reverse=True)
IMAGES = random_weights.images(tiny.STUDENT, 5)
PIXELS = random_weights.pixels(tiny.STUDENT, 5)


def by_jax(images: np.ndarray) -> np.ndarray:
    apply = jax.jit(build_model(tiny.STUDENT).apply)
    return np.asarray(apply(random_weights.variables(WEIGHTS), jnp.asarray(images, jnp.float32))[0])


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """The logits of `IMAGES` by the model itself."""
    return by_jax(IMAGES)


@pytest.fixture(scope="module")
def expected_of_pixels() -> np.ndarray:
    return by_jax((PIXELS / 255 - 0.4) / 0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("formats") / "model"
    WEIGHTS.save(path, with_rtsm=True)
    return path


def test_batch_norm_is_folded(expected: np.ndarray) -> None:
    logits = jax.jit(make_forward(WEIGHTS, raw_input=False))(jnp.asarray(IMAGES))
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    text = jax.jit(make_forward(WEIGHTS, raw_input=False)).lower(jnp.asarray(IMAGES)).as_text()
    # The norms of the blocks, of slimming and before the head have one each, BatchNorm none.
    norms = 2 * tiny.STUDENT.depth + len(tiny.STUDENT.slimming) + 1
    assert text.count("stablehlo.rsqrt") == norms


@pytest.mark.parametrize("raw", [False, True])
def test_onnx(
    raw: bool, folder: pathlib.Path, tmp_path: pathlib.Path, expected: np.ndarray, expected_of_pixels: np.ndarray
) -> None:
    file = tmp_path / "model.onnx"
    words = ["--raw_input"] if raw else []
    assert cli.main(["export", str(folder), str(file), "--format", "onnx", *words]) == 0
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert not any("BatchNorm" in node.op_type for node in model.graph.node)
    assert str(pathlib.Path.cwd()).encode() not in file.read_bytes()
    session = onnxruntime.InferenceSession(file)
    given, wanted = (PIXELS, expected_of_pixels) if raw else (IMAGES.transpose(0, 3, 1, 2), expected)
    (name,) = [x.name for x in session.get_inputs()]
    assert name == ("pixels" if raw else "images")
    for count in (1, 2, 5):
        (logits,) = session.run(["logits"], {name: given[:count]})
        np.testing.assert_allclose(logits, wanted[:count], atol=1e-4)
    predictor = load(file)
    np.testing.assert_allclose(predictor.logits(PIXELS), expected_of_pixels, atol=1e-4)
    assert predictor.class_names == WEIGHTS.metadata["class_names"]
    assert predictor.metadata["licence"] == "Apache-2.0"


def test_damaged_onnx_files(folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.onnx"
    assert cli.main(["export", str(folder), str(file), "--format", "onnx"]) == 0
    model = onnx.load(file)
    whole = file.read_bytes()
    assert "Written" in capsys.readouterr().out

    def properties(value: str | None) -> bytes:
        del model.metadata_props[:]
        if value is not None:
            model.metadata_props.add(key="sit_jax", value=value)
        return bytes(model.SerializeToString())

    described = whole.index(b'{"format"')
    broken = [whole[:1000], b"no model", whole[:described] + b"\xff" + whole[described + 1 :]]
    for damaged in (*broken, *map(properties, ("{", "[]", "{}", None))):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"model.onnx: ") as raised:
            load(file)
        assert len(str(raised.value).splitlines()) == 1
    assert capsys.readouterr() == ("", "")


def test_onnx_in_float16(folder: pathlib.Path, tmp_path: pathlib.Path, expected_of_pixels: np.ndarray) -> None:
    file = tmp_path / "half.onnx"
    assert cli.main(["export", str(folder), str(file), "--format", "onnx", "--dtype", "float16", "--raw_input"]) == 0
    types = {tensor.data_type for tensor in onnx.load(file).graph.initializer if tensor.dims}
    assert onnx.TensorProto.FLOAT16 in types
    parameters = sum(np.size(x) for x in jax.tree.leaves(WEIGHTS.params))
    assert parameters * 2 < file.stat().st_size < parameters * 2 + 200_000
    logits = load(file).logits(PIXELS)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected_of_pixels, atol=2e-2)


@pytest.mark.parametrize("raw", [False, True])
def test_stablehlo(
    raw: bool, folder: pathlib.Path, tmp_path: pathlib.Path, expected: np.ndarray, expected_of_pixels: np.ndarray
) -> None:
    file = tmp_path / "model.stablehlo"
    words = ["--raw_input"] if raw else []
    assert cli.main(["export", str(folder), str(file), "--format", "stablehlo", *words]) == 0
    description = json.loads((tmp_path / "model.stablehlo.json").read_text())
    assert description["class_names"] == WEIGHTS.metadata["class_names"]
    assert description["preprocessing"] == WEIGHTS.metadata["preprocessing"]
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
    wanted = expected_of_pixels if raw else expected
    with np.load(tmp_path / "logits.npz") as results:
        for count, logits in zip((1, 2, 5), results.values(), strict=True):
            np.testing.assert_allclose(logits, wanted[:count], atol=1e-5)
    exported = jax.export.deserialize(bytearray(file.read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    np.testing.assert_allclose(load(file).logits(PIXELS), expected_of_pixels, atol=1e-4)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_state_dicts_of_the_original(suffix: str, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    file = tmp_path / f"model{suffix}"
    words = ["export", str(folder), str(file), "--format", "original"]
    assert cli.main([*words, "--with_rtsm"]) == 0
    original = to_original(
        {"params": WEIGHTS.params, "batch_stats": WEIGHTS.batch_stats, "reverse": WEIGHTS.rtsm}, tiny.STUDENT
    )
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
    # timm's VisionTransformerDistilled, by name and shape: width 16, 4 patches of 16 x 16 grey pixels, MLP ratio 2.
    block = {
        "norm1.weight": (16,), "norm1.bias": (16,), "attn.qkv.weight": (48, 16), "attn.qkv.bias": (48,),
        "attn.proj.weight": (16, 16), "attn.proj.bias": (16,), "norm2.weight": (16,), "norm2.bias": (16,),
        "mlp.fc1.weight": (32, 16), "mlp.fc1.bias": (32,), "mlp.fc2.weight": (16, 32), "mlp.fc2.bias": (16,),
    }  # fmt: skip
    timm = {
        "cls_token": (1, 1, 16), "dist_token": (1, 1, 16), "pos_embed": (1, 6, 16),
        "patch_embed.proj.weight": (16, 1, 16, 16), "patch_embed.proj.bias": (16,),
        "norm.weight": (16,), "norm.bias": (16,), "head.weight": (10, 16),
        "head.bias": (10,), "head_dist.weight": (10, 16), "head_dist.bias": (10,),
        **{f"blocks.{index}.{name}": shape for index in range(4) for name, shape in block.items()},
    }  # fmt: skip
    assert {name: array.shape for name, array in stored.items()} == timm
    params: Any = weights.params
    np.testing.assert_array_equal(stored["pos_embed"][:, 1], params["distillation_position"][:, 0])
    np.testing.assert_array_equal(stored["pos_embed"][:, 2:], params["positions"][:, 1:])
    np.testing.assert_array_equal(stored["blocks.2.attn.qkv.weight"], params["blocks_2"]["attn"]["qkv"]["kernel"].T)


@pytest.fixture(scope="module")
def digits_run(digits_dir: str, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A student distilled for an epoch, moving average and reverse modules included."""
    config: Config = tiny.config(
        data=DataConfig(data_dir=digits_dir),
        epochs=1,
        batch_size=32,
        eval_batch_size=96,
        optim=OptimConfig(lr=2e-3, ema_decay=0.9),
        log=LogConfig(tensorboard=False),
    )
    folder = tmp_path_factory.mktemp("exported") / "digits"
    run(config, folder)
    return folder


def test_the_digits_student_scores_the_same_in_every_format(
    digits_run: pathlib.Path, digits_dir: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate_model(load(digits_run))
    assert 0.2 < result["top1"] < 1
    places = {"folder": "model", "onnx": "model.onnx", "stablehlo": "model.stablehlo"}
    for kind, place in places.items():
        words = ["--with_reverse"] if kind == "folder" else ["--raw_input"]
        assert cli.main(["export", str(digits_run), str(tmp_path / place), "--format", kind, *words]) == 0
        capsys.readouterr()
        assert cli.main(["evaluate", str(tmp_path / place), "--data_dir", digits_dir, "--json"]) == 0
        scores = json.loads(capsys.readouterr().out)
        assert (scores["examples"], scores["top1"], scores["top5"]) == (359, result["top1"], result["top5"]), kind
        assert scores["loss"] == pytest.approx(result["loss"], abs=1e-4)
    weights = load(tmp_path / "model")
    assert weights.metadata["class_names"] == [str(digit) for digit in range(10)]
    assert weights.metadata["provenance"]["step"] == 1438 // 32
    assert set(weights.rtsm) == {f"blocks_{block}" for block in range(4)}
    assert torch_accuracy(tmp_path / "model") == pytest.approx(result["top1"], abs=1e-6)
    assert cli.main(["evaluate", str(digits_run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result
    assert cli.main(["export", str(digits_run), str(tmp_path / "ema"), "--format", "folder", "--ema"]) == 0
    averaged = load(tmp_path / "ema")
    assert averaged.metadata["provenance"]["ema"] is True
    assert not np.allclose(averaged.params["head"]["kernel"], weights.params["head"]["kernel"])


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
    pathlib.Path("pictures").mkdir()
    for index, pixels in enumerate(PIXELS):
        Image.fromarray(pixels[:, :, 0]).save(f"pictures/{index}.png")
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


def torch_accuracy(folder: pathlib.Path) -> float:
    """Top-1 of the PyTorch module on the held-out digits, read without our loader."""
    digits = load_digits()
    model = torch_model.load(folder)
    levels = np.round(digits.images[4::5] * 255 / 16).astype(np.uint8)
    resized = [np.asarray(Image.fromarray(x).resize((32, 32), Image.Resampling.BICUBIC)) for x in levels]
    logits = model(model.normalize(torch.tensor(np.stack(resized)[..., None])))
    return float((logits.argmax(1).numpy() == digits.target[4::5]).mean())


def test_refusals(folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx_place, nothing = tmp_path / "m.onnx", tmp_path / "nothing"
    cases: list[tuple[list[Any], str]] = [
        ([nothing, onnx_place, "--format", "onnx"], "there is no such file or folder"),
        ([tmp_path, onnx_place, "--format", "onnx"], "is neither a run nor a model folder"),
        ([folder / "config.json", onnx_place, "--format", "onnx"], "config.json: .json"),
        ([folder, tmp_path / "m.txt", "--format", "onnx"], "must end in .onnx"),
        ([folder, tmp_path / "m.txt", "--format", "timm"], "must end in .safetensors or .pth"),
        ([folder, tmp_path / "m.pth", "--format", "timm"], "but this model is slimmed, has a conv4 stem"),
        ([folder, onnx_place, "--format", "onnx", "--with_reverse"], "--with_rtsm"),
        ([folder, nothing, "--format", "folder", "--raw_input"], "--raw_input"),
        ([folder, nothing, "--format", "folder", "--dtype", "float16"], "--dtype"),
        ([folder, nothing, "--format", "folder", "--ema"], "--step"),
        ([folder, nothing, "--format", "folder", "--step", "3"], "--step"),
        ([folder, folder, "--format", "folder"], "exists already"),
    ]
    for words, message in cases:
        assert cli.main(["export", *map(str, words)]) == 2, words
        error = capsys.readouterr().err.strip()
        assert message in error
        assert len(error.splitlines()) == 1
        assert list(tmp_path.iterdir()) == []


def test_timm_has_one_epsilon(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_weights.draw(tiny.plain(stem="patch", norm_eps=1e-5)).save(tmp_path / "model")
    assert cli.main(["export", str(tmp_path / "model"), str(tmp_path / "x.safetensors"), "--format", "timm"]) == 2
    assert "but this model has norm_eps 1e-05 (timm's is 1e-06)" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


def test_licences(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    silent = random_weights.draw(tiny.plain(stem="patch"))
    del silent.metadata["licence"]
    silent.save(tmp_path / "silent")

    def run_command(verb: str, source: str, dest: str, *words: str) -> int:
        return cli.main([verb, str(tmp_path / source), str(tmp_path / dest), *words])

    assert run_command("convert", "silent", "a", "--licence", "MIT") == 0
    assert run_command("convert", "a", "b") == 0
    assert run_command("convert", "a", "c", "--num_classes", "3", "--image_size", "64") == 0
    assert run_command("export", "b", "d", "--format", "folder") == 0
    assert run_command("export", "silent", "e", "--format", "folder", "--licence", "MIT") == 0
    for name in "abcde":
        assert load(tmp_path / name).metadata["licence"] == "MIT", name
    assert run_command("export", "a", "f", "--format", "folder", "--licence", "CC BY 4.0") == 0
    assert load(tmp_path / "f").metadata["licence"] == "CC BY 4.0"
    for words, place in ((("--format", "stablehlo"), "x.stablehlo"), (("--format", "onnx"), "x.onnx")):
        assert run_command("export", "silent", place, *words, "--licence", "MIT") == 0
        assert load(tmp_path / place).metadata["licence"] == "MIT"
    capsys.readouterr()
    for command in ("convert", "export --format original", "export --format timm"):
        verb, *more = command.split()
        assert run_command(verb, "silent", "x.safetensors", *more, "--licence", "MIT") == 2
        assert capsys.readouterr().err.startswith(f"sit {verb}: --licence: ")
        assert not (tmp_path / "x.safetensors").exists()


def test_evaluating_a_model_of_unknown_origin(
    folder: pathlib.Path, digits_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", str(folder), "--data_dir", digits_dir]) == 2
    assert "--name: which data set?" in capsys.readouterr().err
    assert cli.main(["evaluate", str(folder), "--name", "digits", "--data_dir", digits_dir, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["examples"] == 359
    # Random weights know nothing.
    assert scores["top1"] < 0.3
    for words in ([], [str(folder), "--workdir", str(folder)]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["evaluate", *words])
        assert stop.value.code == 2


def test_files_that_are_no_models(tmp_path: pathlib.Path) -> None:
    for name in ("empty.onnx", "empty.stablehlo", "model.txt"):
        (tmp_path / name).write_bytes(b"")
        (tmp_path / f"{name}.json").write_text("[]")
        with pytest.raises(UserError, match=name) as raised:
            load(tmp_path / name)
        assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(UserError, match=r"gone.onnx: there is no such"):
        load(tmp_path / "gone.onnx")
    (tmp_path / "empty.stablehlo.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"empty.stablehlo.json: is not valid JSON"):
        load(tmp_path / "empty.stablehlo")
    (tmp_path / "empty.stablehlo.json").unlink()
    with pytest.raises(UserError, match=r"empty.stablehlo.json: cannot be read"):
        load(tmp_path / "empty.stablehlo")


def test_a_damaged_stablehlo_artifact(tmp_path: pathlib.Path) -> None:
    weights = random_weights.draw(tiny.plain(stem="patch"))
    description = {"input": "images"}
    stablehlo.save(tmp_path / "m.stablehlo", make_forward(weights, raw_input=False), (32, 32, 1), description)
    raw = (tmp_path / "m.stablehlo").read_bytes()
    flipped = [raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :] for at in (0, 3000, len(raw) // 2, len(raw) - 1)]
    for damaged in (*flipped, raw[:1], raw[: len(raw) // 2], raw + b"\0"):
        (tmp_path / "m.stablehlo").write_bytes(damaged)
        with pytest.raises(UserError, match=r"m.stablehlo: is damaged") as raised:
            stablehlo.load(tmp_path / "m.stablehlo")
        assert len(str(raised.value).splitlines()) == 1


def test_onnx_without_its_packages(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r'needs the package onnxscript.*pip install "\.\[onnx\]"'):
        onnx_file.save(tmp_path / "m.onnx", WEIGHTS, "float32", raw_input=False)
    assert list(tmp_path.iterdir()) == []
