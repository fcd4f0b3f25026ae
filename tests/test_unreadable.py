"""One image that cannot be read is one image wherever images are read, whatever the reason."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import images
import malformed
import numpy as np
import pytest
import tiny

from sit_jax.cli import app as cli
from sit_jax.data.config import DataConfig
from sit_jax.data.folder import FolderSource, find_images
from sit_jax.data.pipeline import Hosts, TrainData, eval_batches
from sit_jax.data.registry import open_source
from sit_jax.data.sources import Source, read_image
from sit_jax.data.validate import check_data
from sit_jax.errors import ImageDecodeError, UserError

# Why an image's file is unreadable. All happen after the folder was listed, as they may during a run.
WAYS: dict[str, Callable[[pathlib.Path], object]] = {
    "missing": lambda path: None,
    "dead_link": lambda path: path.symlink_to("nowhere.jpg"),
    "folder": pathlib.Path.mkdir,
    "reading_fails": lambda path: path.symlink_to("/proc/self/mem"),
    "pipe": os.mkfifo,
    "empty": pathlib.Path.touch,
    "truncated": lambda path: path.write_bytes(malformed.BROKEN["jpeg_half.jpg"]),
}
# These are there when the folder is listed.
LISTED = tuple(way for way in WAYS if way not in ("missing", "folder"))


def spoil(root: pathlib.Path, way: str) -> pathlib.Path:
    path = root / "china" / "0001.jpg"
    path.unlink()
    WAYS[way](path)
    return path


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    """Eight classes of three images, of which one is held out."""
    images.make_folder(tmp_path / "some", 3, size=(24, 20))
    return tmp_path / "some"


def folder_data(root: pathlib.Path, on_decode_error: Any = "error") -> DataConfig:
    return DataConfig(name="folder", data_dir=str(root), val_fraction=0.34, on_decode_error=on_decode_error)


def masks(data: DataConfig, source: Source) -> list[float]:
    inputs = tiny.folder_config(data, eval_batch_size=16).inputs
    return [x for batch in eval_batches(inputs, source, Hosts()) for x in batch["mask"].tolist()][: len(source)]


@pytest.mark.parametrize("way", WAYS)
def test_evaluation_and_training_skip_it_or_name_it(root: pathlib.Path, way: str) -> None:
    skip, stop = folder_data(root, "skip"), folder_data(root)
    source, train = open_source(skip, "train"), TrainData(tiny.folder_config(skip, batch_size=8).inputs, Hosts())
    bad = spoil(root, way)
    index = [path for path, _ in source.files].index(str(bad))  # type: ignore[attr-defined]
    assert masks(skip, source) == [float(place != index) for place in range(len(source))]
    with pytest.raises(ImageDecodeError, match=rf"^{bad}: .*data.on_decode_error=skip"):
        masks(stop, source)
    with contextlib.closing(train.batches()) as stream:
        epoch = [next(stream) for _ in range(2)]
    assert sum(int(batch["skipped"].sum()) for batch in epoch) == 1


@pytest.mark.parametrize("way", LISTED)
def test_check_lists_it_and_predict_finds_it(root: pathlib.Path, way: str) -> None:
    bad = spoil(root, way)
    train, val = check_data(folder_data(root), threads=2)
    assert [line.split(": ")[0] for line in [*train.broken, *val.broken]] == [str(bad)]
    # By its own name or as the match of a pattern it is skipped like the one in a folder, not an error of the command.
    found = find_images([str(root)])
    assert find_images([str(bad)]) == [str(bad)]
    assert find_images([f"{bad.parent}/*.jpg"]) == [x for x in found if "china" in x]
    if way not in ("empty", "pipe", "truncated"):
        with pytest.raises(ImageDecodeError, match=rf"^{bad}: "):
            read_image(str(bad))


@pytest.mark.parametrize("way", LISTED)
def test_prepare_leaves_it_out(root: pathlib.Path, tmp_path: pathlib.Path, way: str, capsys: Any) -> None:
    spoil(root, way)
    words = ["data", "prepare", "--from_folder", str(root), "--name", "some", "--data_dir", str(tmp_path / "data")]
    words += ["--val_fraction", "0.34"]
    assert cli.main(words) == 2
    assert "china/0001.jpg: " in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list((tmp_path / "data").rglob("*.array_record*"))
    assert cli.main([*words, "--skip_broken"]) == 0
    assert "left out" in capsys.readouterr().err
    data = DataConfig(name="some", data_dir=str(tmp_path / "data"))
    assert sum(len(open_source(data, split)) for split in ("train", "val")) == 23


def test_folder_with_the_name_of_an_image_belongs_to_its_class(root: pathlib.Path) -> None:
    inside = root / "china" / "more.jpg" / "x.png"
    inside.parent.mkdir()
    inside.write_bytes(malformed.PNG)
    source = FolderSource(root, "train", 0.34)
    labels = dict(source.files)
    assert labels[str(inside)] == source.class_names.index("china")
    assert str(inside.parent) not in labels
    assert find_images([str(root / "china" / "*")]) == find_images([str(root / "china" / "*.jpg")])


def test_folder_that_cannot_be_listed_is_not_empty(root: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests may run as root, for whom every folder can be listed.
    def scandir(path: Any) -> Any:
        if str(path).endswith("china"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    real = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    for read in (lambda: FolderSource(root, "train"), lambda: find_images([str(root)])):
        with pytest.raises(UserError, match=r"some/china"):
            read()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("prepared")
    images.make_folder(folder / "some", 3, size=(24, 20))
    words = ["data", "prepare", "--from_folder", str(folder / "some"), "--name", "some", "--val_fraction", "0.34"]
    assert cli.main([*words, "--data_dir", str(folder)]) == 0
    return folder


def test_damaged_record_is_one_image(prepared: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    skip = DataConfig(name="some", data_dir=str(tmp_path), on_decode_error="skip")
    (shard,) = tmp_path.rglob("*train.array_record*")
    content = bytearray(shard.read_bytes())
    content[int(np.median(np.flatnonzero(content)))] ^= 255
    shard.write_bytes(content)
    source = open_source(skip, "train")
    found = masks(skip, source)
    assert sorted(found) == [0.0] + 15 * [1.0]
    with pytest.raises(ImageDecodeError, match=rf"example {found.index(0)}: .*data.on_decode_error=skip"):
        masks(DataConfig(name="some", data_dir=str(tmp_path)), source)
    train, _ = check_data(DataConfig(name="some", data_dir=str(tmp_path), eval_split="val"), threads=2)
    assert len(train.broken) == 1


@pytest.mark.parametrize("how", ["missing", "zeros", "half", "folder"])
def test_unreadable_shard_is_not_one_image(prepared: pathlib.Path, tmp_path: pathlib.Path, how: str) -> None:
    # Skipped image by image, a whole shard would be missing from an evaluation that seems to be fine.
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    (shard,) = tmp_path.rglob("*train.array_record*")
    content = shard.read_bytes()
    shard.unlink()
    if how == "folder":
        shard.mkdir()
    elif how != "missing":
        shard.write_bytes(bytes(len(content)) if how == "zeros" else content[: len(content) // 2])
    skip = DataConfig(name="some", data_dir=str(tmp_path), on_decode_error="skip")
    with pytest.raises(UserError, match=r"some train, example 0") as caught:
        masks(skip, open_source(skip, "train"))
    assert not isinstance(caught.value, ImageDecodeError)
