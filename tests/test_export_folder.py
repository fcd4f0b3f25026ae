"""Model folders: every tensor returns bit for bit, and a file that lies is told so in one line."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import golden_files
import jax
import numpy as np
import pytest
import random_weights
import safetensors.numpy
import tiny
from PIL import Image

from sit_jax.cli import app as cli
from sit_jax.errors import UserError
from sit_jax.io.convert.sit_names import name_table, to_original
from sit_jax.io.load import load
from sit_jax.io.model import Model
from sit_jax.io.model_folder import CONFIG, WEIGHTS

SHAPES = {
    "student": tiny.STUDENT,
    "teacher": tiny.TEACHER,
    "patch": tiny.plain(stem="patch"),
    "six": tiny.plain(stem="conv6", qkv_bias=False, aux_head=True, kept_tokens=(4, 3), stage_blocks=(2, 2)),
    "distilled": dataclasses.replace(tiny.STUDENT, distillation_token=True, aux_head=True),
}


def equal(mine: Model, theirs: Model) -> None:
    assert mine.arch == theirs.arch
    assert mine.metadata == theirs.metadata
    for one, other in ((mine.params, theirs.params), (mine.batch_stats, theirs.batch_stats), (mine.rtsm, theirs.rtsm)):
        jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_returns_what_was_put_in(shape: str, tmp_path: pathlib.Path) -> None:
    weights = random_weights.draw(SHAPES[shape], reverse=SHAPES[shape].is_slimmed)
    folder = tmp_path / "deep" / "model"
    weights.save(folder, with_rtsm=bool(weights.rtsm))
    equal(load(folder), weights)
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, CONFIG, "torch_model.py"}
    assert list(folder.parent.iterdir()) == [folder]
    config = json.loads((folder / CONFIG).read_text())
    assert (config["format"], config["format_version"], config["licence"]) == ("sit_jax", 1, "Apache-2.0")
    assert config["kept_tokens"] == list(weights.vit.token_counts)


@pytest.mark.parametrize("name", ["lvvit_4c", "deit_naive", "dist_token", "lvvit_6c"])
def test_the_file_holds_the_originals_tensors(name: str, tmp_path: pathlib.Path) -> None:
    golden = golden_files.load(name)
    trees = jax.tree.map(np.asarray, golden.student)
    rtsm = trees.pop("reverse")
    weights = Model(golden.arch, trees, rtsm=rtsm)
    weights.save(tmp_path / "with", with_rtsm=True)
    stored = safetensors.numpy.load_file(tmp_path / "with" / WEIGHTS)
    teacher, own = (golden_files.part(golden.data, prefix) for prefix in ("teacher/", "student_own/"))
    original = {key: value for key, value in {**teacher, **own}.items() if not key.endswith("num_batches_tracked")}
    assert set(stored) == set(original)
    for key, value in original.items():
        assert stored[key].shape == value.shape
        assert np.array_equal(stored[key], value), key
    weights.save(tmp_path / "without")
    slim = safetensors.numpy.load_file(tmp_path / "without" / WEIGHTS)
    assert set(slim) == {key for key in original if not key.startswith("rtsm.")}
    assert load(tmp_path / "without").rtsm == {}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("good") / "model"
    random_weights.draw().save(folder)
    return folder


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[pathlib.Path], None]:
    def spoil(folder: pathlib.Path) -> None:
        loaded = safetensors.numpy.load_file(folder / WEIGHTS)
        change(loaded)
        safetensors.numpy.save_file(loaded, folder / WEIGHTS)

    return spoil


def content(change: Callable[[bytes], bytes]) -> Callable[[pathlib.Path], Any]:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def config(**changes: Any) -> Callable[[pathlib.Path], None]:
    def spoil(folder: pathlib.Path) -> None:
        values = json.loads((folder / CONFIG).read_text())
        architecture = {**values["architecture"], **changes.get("architecture", {})}
        (folder / CONFIG).write_text(json.dumps({**values, **changes, "architecture": architecture}))

    return spoil


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[pathlib.Path], Any]:
    def spoil(raw: bytes) -> bytes:
        length = int.from_bytes(raw[:8], "little")
        values = json.loads(raw[8 : 8 + length])
        change(values)
        text = json.dumps(values).encode()
        return len(text).to_bytes(8, "little") + text + raw[8 + length :]

    return content(spoil)


TERA = 2**42
LIES: dict[str, tuple[Callable[[pathlib.Path], Any], str]] = {
    "empty": (content(lambda raw: b""), WEIGHTS),
    "cut in the header": (content(lambda raw: raw[:100]), WEIGHTS),
    "cut in the data": (content(lambda raw: raw[:-5]), WEIGHTS),
    "longer": (content(lambda raw: raw + b"more"), WEIGHTS),
    "header of terabytes": (content(lambda raw: TERA.to_bytes(8, "little") + raw[8:]), WEIGHTS),
    "largest header": (content(lambda raw: b"\xff" * 8 + raw[8:]), WEIGHTS),
    "tensor of terabytes": (
        header(lambda x: x["cls_token"].update(shape=[1, 1, TERA // 4], data_offsets=[0, TERA])),
        WEIGHTS,
    ),
    "overflowing shape": (header(lambda x: x["cls_token"].update(shape=[2**40, 2**40, 2**40])), WEIGHTS),
    "negative offset": (header(lambda x: x["cls_token"].update(data_offsets=[-4, 4])), WEIGHTS),
    "unknown type": (header(lambda x: x["cls_token"].update(dtype="F99")), WEIGHTS),
    "no JSON": (content(lambda raw: raw[:8] + b"!" * (len(raw) - 8)), WEIGHTS),
    "a picture": (content(lambda raw: b"\x89PNG\r\n\x1a\n" + bytes(100)), WEIGHTS),
    "gone": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
    "one missing": (tensors(lambda x: x.pop("norm.weight")), "missing: norm.weight"),
    "one extra": (tensors(lambda x: x.update(unknown=np.zeros(3, np.float32))), "left over: unknown"),
    "another shape": (
        tensors(lambda x: x.update({"head.bias": np.zeros(11, np.float32)})),
        r"wrong shape: head.bias \(11,\), here it is \(10,\)",
    ),
    "turned": (
        tensors(lambda x: x.update({"blocks.0.mlp.fc1.weight": x["blocks.0.mlp.fc1.weight"].T.copy()})),
        r"wrong shape: blocks.0.mlp.fc1.weight \(16, 32\)",
    ),
    "another type": (
        tensors(lambda x: x.update({"head.bias": x["head.bias"].astype(np.int32)})),
        "not floating-point: head.bias",
    ),
    "not a number": (tensors(lambda x: np.put(x["head.bias"], 3, np.nan)), "not finite: head.bias"),
    "infinite": (tensors(lambda x: np.put(x["cls_token"], 3, np.inf)), "not finite: cls_token"),
    "deeper": (config(architecture={"depth": 5, "stage_blocks": [1, 4]}), "missing: blocks.4.attn.proj.bias"),
    "wider": (config(architecture={"dim": 32}), "wrong shape"),
    "impossible": (config(architecture={"num_heads": 5}), "num_heads 5"),
    "unknown field": (config(architecture={"colour": "red"}), "architecture.colour"),
    "words for numbers": (config(architecture={"dim": "wide"}), "architecture.dim"),
    "other tokens": (config(kept_tokens=[4, 3]), "kept_tokens"),
    "too few names": (config(class_names=["one"]), "class_names must be a list of 10 names"),
    "numbers for names": (config(class_names=list(range(10))), "class_names must be a list of 10 names"),
    "preprocessing a list": (config(preprocessing=[1]), "preprocessing must be an object"),
    "no mean": (config(preprocessing={"mean": []}), "preprocessing.mean must be a list of numbers"),
    "mean null": (config(preprocessing={"mean": None}), "preprocessing.mean must be a list of numbers"),
    "mean of words": (config(preprocessing={"mean": ["x"]}), "preprocessing.mean must be a list of numbers"),
    "deviation zero": (config(preprocessing={"std": [0.0]}), "preprocessing.std must be a list of numbers"),
    "deviation of nearly zero": (
        config(preprocessing={"std": [1e-320]}),
        "preprocessing.std must be a list of numbers",
    ),
    "deep without end": (config(architecture={"depth": 2**20, "stage_blocks": [1, 2**20 - 1]}), "depth"),
    "infinite ratio": (config(architecture={"keep_ratio": float("inf")}), "keep_ratio: must be above 0"),
    "no ratio": (config(architecture={"keep_ratio": float("nan")}), "keep_ratio: must be above 0"),
    "vast": (config(architecture={"dim": 24 * 10**20}), "dim"),
    "infinitely wide": (config(architecture={"mlp_ratio": 1e300}), "mlp_ratio"),
    "no width": (config(architecture={"mlp_ratio": 1e-9}), "mlp_ratio"),
    "later version": (config(format_version=2), "version 2"),
    "another format": (config(format="other"), "\"format\" is 'other'"),
    "no architecture": (
        lambda folder: (folder / CONFIG).write_text('{"format": "sit_jax", "format_version": 1}'),
        "arch",
    ),
    "config cut": (lambda folder: (folder / CONFIG).write_text('{"format": "sit'), "is not valid JSON"),
    "config a list": (lambda folder: (folder / CONFIG).write_text("[1]"), "holds no JSON object"),
    "config nested": (lambda folder: (folder / CONFIG).write_text("[" * 100_000), "is not valid JSON"),
    "config no text": (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe\x00"), "is not valid JSON"),
    "config gone": (lambda folder: (folder / CONFIG).unlink(), "--model.stage_blocks"),
}


@pytest.mark.parametrize("lie", LIES)
def test_files_that_lie(lie: str, good: pathlib.Path, tmp_path: pathlib.Path) -> None:
    spoil, message = LIES[lie]
    folder = tmp_path / "bad"
    shutil.copytree(good, folder)
    spoil(folder)
    with pytest.raises(UserError, match=message) as raised:
        load(folder)
    assert len(str(raised.value).splitlines()) == 1
    assert len(str(raised.value)) < 1000
    assert str(folder) in str(raised.value)
    # The commands look at a folder in another way before they load it.
    with pytest.raises(UserError):
        load(folder)


@pytest.mark.parametrize("lie", LIES)
def test_commands_tell_of_lies_in_one_line(
    lie: str, good: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, picture = tmp_path / "bad", tmp_path / "x.png"
    shutil.copytree(good, folder)
    LIES[lie][0](folder)
    Image.new("L", (32, 32)).save(picture)
    assert cli.main(["predict", str(folder), str(picture)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sit predict: {folder}")


@pytest.mark.parametrize("lie", [lie for lie in LIES if "preprocessing" in LIES[lie][1] or "names" in LIES[lie][1]])
def test_lies_are_not_converted_on(
    lie: str, good: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = LIES[lie]
    folder = tmp_path / "bad"
    shutil.copytree(good, folder)
    spoil(folder)
    assert cli.main(["convert", str(folder), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sit convert: {folder / CONFIG}: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_config_that_may_not_be_read(
    good: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, read = tmp_path / "x.png", pathlib.Path.read_text
    Image.new("L", (32, 32)).save(picture)

    def forbidden(path: pathlib.Path, *words: Any) -> str:
        if path.name == CONFIG:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *words)

    monkeypatch.setattr(pathlib.Path, "read_text", forbidden)
    for words in (["predict", str(good), str(picture)], ["convert", str(good), str(tmp_path / "out")]):
        assert cli.main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"sit {words[0]}: {good / CONFIG}: cannot be read: Permission denied"


def test_nothing_is_overwritten_or_left_behind(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights.draw()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("precious")
    with pytest.raises(UserError, match="taken: exists already"):
        weights.save(tmp_path / "taken")
    assert (tmp_path / "taken" / "mine").read_text() == "precious"
    with pytest.raises(UserError, match="reverse modules"):
        weights.save(tmp_path / "new", with_rtsm=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        weights.save(tmp_path / "file" / "model")
    broken = dataclasses.replace(weights, variables={"params": {**weights.params, "head": {}}})
    with pytest.raises(KeyError):
        broken.save(tmp_path / "new")
    monkeypatch.setattr("shutil.copyfile", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="new: cannot be written: No space left on device"):
        weights.save(tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "file"}


def test_arrays_in_any_memory_order_are_written_in_the_right_one(tmp_path: pathlib.Path) -> None:
    # safetensors' own writer takes the memory of a transposed array as it lies.
    weights = random_weights.draw(tiny.plain(stem="patch"))
    scrambled = dataclasses.replace(weights, variables=jax.tree.map(np.asfortranarray, weights.variables))
    scrambled.save(tmp_path / "model")
    stored = safetensors.numpy.load_file(tmp_path / "model" / WEIGHTS)
    expected = to_original({"params": weights.params}, weights.vit)
    assert set(stored) == {entry.key for entry in name_table(weights.vit, reverse=False)}
    for key, value in stored.items():
        assert np.array_equal(value, expected[key]), key
    assert np.array_equal(stored["head.weight"], weights.params["head"]["kernel"].T)
