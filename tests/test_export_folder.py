"""Model folders: every tensor returns bit for bit, and a damaged file is named in one line."""

import dataclasses
import json
import pathlib
import re
import shutil
from typing import Any

import golden_files
import jax
import numpy as np
import original_models
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

TORCH = ("torch_model.py", "torch_layers.py", "torch_distillation.py")
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
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, CONFIG, *TORCH}
    assert list(folder.parent.iterdir()) == [folder]
    config = json.loads((folder / CONFIG).read_text())
    assert (config["format"], config["format_version"], config["licence"]) == ("sit_jax", 1, "Apache-2.0")
    assert config["kept_tokens"] == list(weights.vit.token_counts)


@pytest.mark.parametrize("name", ["lvvit_4c", "deit_naive", "dist_token", "lvvit_6c"])
def test_the_file_holds_the_originals_tensors(name: str, tmp_path: pathlib.Path) -> None:
    golden = golden_files.load(name)
    trees = dict(golden.student)
    weights = Model(golden.arch, trees, rtsm=trees.pop("rtsm"))
    weights.save(tmp_path / "with", with_rtsm=True)
    stored = safetensors.numpy.load_file(tmp_path / "with" / WEIGHTS)
    original = original_models.golden_weights(name)
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


def spoil(folder: pathlib.Path, tensors: dict[str, Any], config: dict[str, Any], architecture: dict[str, Any]) -> None:
    """Changes entries of the files of a model folder; None removes a tensor."""
    stored = {**safetensors.numpy.load_file(folder / WEIGHTS), **tensors}
    safetensors.numpy.save_file({key: x for key, x in stored.items() if x is not None}, folder / WEIGHTS)
    values = {**json.loads((folder / CONFIG).read_text()), **config}
    values["architecture"] |= architecture
    (folder / CONFIG).write_text(json.dumps(values))


# Each with what the message must name. Damaged headers: test_fuzz_readers.py, test_lying_files.py.
NAN, LONG = np.full(10, np.nan, np.float32), np.zeros(11, np.float32)
DAMAGE: list[tuple[str, Any, str]] = [
    (WEIGHTS, b"", WEIGHTS),
    (WEIGHTS, slice(-5), WEIGHTS),
    ("tensors", {"norm.weight": None}, "missing: norm.weight"),
    ("tensors", {"unknown": NAN}, "left over: unknown"),
    ("tensors", {"head.bias": LONG}, "head.bias (11,)"),
    ("tensors", {"head.bias": NAN}, "not finite: head.bias"),
    ("tensors", {"head.bias": np.ones(10, np.int64)}, "not floating-point: head.bias"),
    ("architecture", {"dim": 32}, "shape"),
    ("architecture", {"colour": "red"}, "architecture.colour"),
    ("architecture", {"depth": 2**20, "stage_blocks": [1, 2**20 - 1]}, "depth"),
    ("architecture", {"mlp_ratio": 1e-9}, "mlp_ratio"),
    ("config", {"kept_tokens": [4, 3]}, "kept_tokens"),
    ("config", {"class_names": ["one"]}, "class_names"),
    ("config", {"preprocessing": [1]}, "preprocessing"),
    ("config", {"preprocessing": {"std": [1e-320]}}, "preprocessing.std"),  # Zero in float32.
    ("config", {"format_version": 2}, "version 2"),
    ("config", {"format": "other"}, "'other'"),
    (CONFIG, b"[1]", "JSON"),
    (CONFIG, b"[" * 100_000, "JSON"),
    (CONFIG, None, "--model.stage_blocks"),
]


@pytest.mark.parametrize(("part", "change", "named"), DAMAGE)
def test_damaged_folders(
    part: str, change: Any, named: str, good: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, image = tmp_path / "bad", tmp_path / "x.png"
    shutil.copytree(good, folder)
    if part not in (WEIGHTS, CONFIG):
        spoil(folder, **{"tensors": {}, "config": {}, "architecture": {}, part: change})
    elif change is None:
        (folder / part).unlink()
    else:
        (folder / part).write_bytes((folder / part).read_bytes()[change] if isinstance(change, slice) else change)
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
