"""Model folders: every tensor returns bit for bit, and a damaged file is named in one line."""

import dataclasses
import json
import pathlib
import re
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
    weights = random_weights.draw(SHAPES[shape], rtsm=SHAPES[shape].is_slimmed)
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
    # In Fortran's order: safetensors' own writer takes the memory of a transposed array as it is.
    trees = jax.tree.map(np.asfortranarray, golden.student)
    rtsm = trees.pop("rtsm")
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


def config(**changes: Any) -> Callable[[pathlib.Path], Any]:
    return lambda folder: text(json.dumps({**json.loads((folder / CONFIG).read_text()), **changes}))(folder)


def shape(**changes: Any) -> Callable[[pathlib.Path], Any]:
    def spoil(folder: pathlib.Path) -> None:
        architecture = json.loads((folder / CONFIG).read_text())["architecture"]
        config(architecture={**architecture, **changes})(folder)

    return spoil


def text(written: str) -> Callable[[pathlib.Path], Any]:
    return lambda folder: (folder / CONFIG).write_text(written)


# Each with what the message must name. Damaged headers: test_fuzz_readers.py, test_lying_files.py.
DAMAGE: dict[str, tuple[Callable[[pathlib.Path], Any], str]] = {
    "empty": (content(lambda raw: b""), WEIGHTS),
    "cut in the data": (content(lambda raw: raw[:-5]), WEIGHTS),
    "one missing": (tensors(lambda x: x.pop("norm.weight")), "norm.weight"),
    "one extra": (tensors(lambda x: x.update(unknown=np.zeros(3, np.float32))), "unknown"),
    "another shape": (tensors(lambda x: x.update({"head.bias": np.zeros(11, np.float32)})), "head.bias (11,)"),
    "not a number": (tensors(lambda x: np.put(x["head.bias"], 3, np.nan)), "head.bias"),
    "wider": (shape(dim=32), "shape"),
    "unknown field": (shape(colour="red"), "architecture.colour"),
    "deep without end": (shape(depth=2**20, stage_blocks=[1, 2**20 - 1]), "depth"),
    "no width": (shape(mlp_ratio=1e-9), "mlp_ratio"),
    "other tokens": (config(kept_tokens=[4, 3]), "kept_tokens"),
    "too few names": (config(class_names=["one"]), "class_names"),
    "preprocessing a list": (config(preprocessing=[1]), "preprocessing"),
    "deviation of nearly zero": (config(preprocessing={"std": [1e-320]}), "preprocessing.std"),
    "later version": (config(format_version=2), "version 2"),
    "another format": (config(format="other"), "'other'"),
    "config a list": (text("[1]"), "JSON"),
    "config nested": (text("[" * 100_000), "JSON"),
    "config gone": (lambda folder: (folder / CONFIG).unlink(), "--model.stage_blocks"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders(
    damage: str, good: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, named = DAMAGE[damage]
    folder, image = tmp_path / "bad", tmp_path / "x.png"
    shutil.copytree(good, folder)
    spoil(folder)
    with pytest.raises(UserError, match=re.escape(named)) as raised:
        load(folder)
    message = str(raised.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 1000
    assert str(folder) in message
    # The commands look at a folder in another way before they load it.
    Image.new("L", (32, 32)).save(image)
    commands = [["predict", str(folder), str(image)]]
    # What concerns images and names is checked although a conversion does not use it.
    if named.startswith(("preprocessing", "class_names")):
        commands.append(["convert", str(folder), str(tmp_path / "out")])
    for words in commands:
        assert cli.main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"sit {words[0]}: {folder}")
        assert words[0] == "predict" or named in line
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_or_left_behind(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights.draw()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("precious")
    with pytest.raises(UserError, match="taken"):
        weights.save(tmp_path / "taken")
    assert (tmp_path / "taken" / "mine").read_text() == "precious"
    with pytest.raises(UserError, match="reverse modules"):
        weights.save(tmp_path / "new", with_rtsm=True)
    monkeypatch.setattr("shutil.copyfile", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"new: .*No space left on device"):
        weights.save(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
