"""Order, parts of hosts, restarts, loader processes that die, and images that cannot be read, whatever the reason."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import itertools
import os
import pathlib
import shutil
import signal
from collections.abc import Callable, Iterable
from typing import Any

import images
import jax
import malformed
import numpy as np
import psutil
import pytest
import tiny

from sit_jax.cli import app as cli
from sit_jax.config import Config
from sit_jax.data.config import AugmentConfig, DataConfig
from sit_jax.data.folder import FolderSource, find_images
from sit_jax.data.map_fns import TrainOrder
from sit_jax.data.pipeline import HostBatch, Hosts, TrainData, eval_batches
from sit_jax.data.registry import open_source
from sit_jax.data.sources import Example, Source, read_image
from sit_jax.data.synthetic import SyntheticSource
from sit_jax.data.validate import check_data
from sit_jax.errors import ConfigError, ImageDecodeError, RunError, UserError

VARIED = AugmentConfig(flip=0.5, rand_augment="rand-m9-mstd0.5-inc1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Eight classes, thirteen training and five held-out images each."""
    root = tmp_path_factory.mktemp("images")
    images.make_folder(root, 13, "train", size=(40, 36))
    images.make_folder(root, 5, "val", seed=1, size=(40, 36))
    return root


def config(folder: pathlib.Path, augment: AugmentConfig = VARIED, **data: Any) -> Config:
    section = DataConfig(name="folder", data_dir=str(folder), eval_split="val", resize="crop", **data)
    return tiny.folder_config(section, augment=augment, batch_size=16, eval_batch_size=12)


def take(config: Config, count: int, start: int = 0, host: int = 0, hosts: int = 1) -> list[HostBatch]:
    stream = TrainData(config.inputs, Hosts(host, hosts)).batches(start)
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


def join(parts: Iterable[list[HostBatch]]) -> list[HostBatch]:
    """Global batches, put together from those of several hosts."""
    joined: list[HostBatch] = jax.tree.map(lambda *part: np.concatenate(part), *parts)
    return joined


def assert_equal(mine: list[HostBatch], theirs: list[HostBatch]) -> None:
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)


@pytest.mark.parametrize("repeats", [1, 3])
def test_order_leaves_nothing_out(repeats: int) -> None:
    order = TrainOrder(length=100, batch_size=16, repeats=repeats, seed=3)
    batches = [[order(b * 16 + i) for i in range(16)] for b in range(150)]
    views = [collections.Counter(batch) for batch in batches]
    images_per_batch = 16 if repeats == 1 else 6
    # Where one pass ends and the next begins within a batch, an image may come again.
    inner = [v for b, v in enumerate(views) if b * images_per_batch % 100 <= 100 - images_per_batch]
    assert len(inner) > 100
    assert all(len(count) == images_per_batch for count in inner)
    assert {max(count.values()) for count in inner} == {repeats}
    # Images in order of appearance are permutations of the whole source, each a different one.
    seen = [image for batch in batches for image in batch[:images_per_batch]]
    laps = [seen[i : i + 100] for i in range(0, len(seen) - 99, 100)]
    assert all(sorted(lap) == list(range(100)) for lap in laps)
    assert len({tuple(lap) for lap in laps}) == len(laps)
    assert [order(i) for i in range(50)] != [dataclasses.replace(order, seed=4)(i) for i in range(50)]
    assert laps[0] != sorted(laps[0])


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_restart_on_any_number_of_hosts_reads_the_same_global_batches(folder: pathlib.Path, repeats: int) -> None:
    section = config(folder, dataclasses.replace(VARIED, repeats=repeats))
    whole = take(section, 9)
    for hosts, start in ((1, 6), (2, 6), (4, 7)):
        assert_equal(join(take(section, 9 - start, start, host, hosts) for host in range(hosts)), whole[start:])
    (other,) = take(dataclasses.replace(section, seed=1), 1)
    assert not np.array_equal(other["image"], whole[0]["image"])


def test_workers_and_threads_change_nothing(folder: pathlib.Path) -> None:
    alone = take(config(folder, threads=1), 6)
    assert_equal(take(config(folder, threads=4), 6), alone)
    assert_equal(take(config(folder, workers=2, threads=1), 6), alone)
    assert_equal(take(config(folder, workers=3, threads=1), 2, start=4), alone[4:])


def test_tfds_sources_travel_to_workers(digits_dir: str) -> None:
    sections = [DataConfig(data_dir=digits_dir, workers=workers, threads=1) for workers in (0, 1)]
    assert_equal(*(take(tiny.config(batch_size=64, data=section), 3) for section in sections))


@pytest.mark.parametrize("hosts", [1, 2, 3])
def test_evaluation_covers_every_example_once_on_any_hosts(folder: pathlib.Path, hosts: int) -> None:
    section = config(folder)
    source = open_source(section.data, "val")
    whole = join(list(eval_batches(section.inputs, source, Hosts(host, hosts))) for host in range(hosts))
    assert [int(batch["mask"].sum()) for batch in whole] == [12, 12, 12, 4]  # 40 images in batches of 12, filled up.
    labels = np.concatenate([batch["label"][batch["mask"] > 0] for batch in whole])
    assert labels.tolist() == [source[index].label for index in range(40)]
    assert_equal(whole, list(eval_batches(section.inputs, source, Hosts())))


def test_batches_must_divide_over_hosts(folder: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"16 .* 3 processes") as caught:
        take(config(folder), 1, hosts=3)
    assert caught.value.key == "batch_size"


@pytest.fixture
def damaged(folder: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy with a broken training image."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "train" / "coffee" / "0002.jpg").write_bytes(malformed.BROKEN["jpeg_half.jpg"])
    return tmp_path


def test_broken_image_is_named_in_one_line_by_workers(damaged: pathlib.Path) -> None:
    with pytest.raises(ImageDecodeError, match=rf"^{damaged}/train/coffee/0002.jpg: [^\n]*$"):
        take(config(damaged, workers=1, threads=1), 7)


def test_skipping_a_broken_image_changes_no_other(damaged: pathlib.Path, folder: pathlib.Path) -> None:
    batches = take(config(damaged, on_decode_error="skip"), 13)  # Two passes over 104 images.
    assert sum(int((batch["skipped"] > 0).sum()) for batch in batches) == 2
    pairs = zip(batches, take(config(folder), 13), strict=True)
    assert sum((one["image"] != other["image"]).any(axis=(1, 2, 3)).sum() for one, other in pairs) == 2


def test_nothing_but_broken_images(tmp_path: pathlib.Path) -> None:
    for name in "abcdefgh":
        (tmp_path / name).mkdir()
        for index in range(20):
            (tmp_path / name / f"{index}.jpg").write_bytes(b"nothing")
    with pytest.raises(UserError, match="100 consecutive images"):
        take(config(tmp_path, on_decode_error="skip"), 1)


@pytest.mark.parametrize(
    ("number", "named"), [(signal.SIGKILL, "out of memory.*--resume"), (signal.SIGBUS, "^/dev/shm is full.*--resume")]
)
def test_killed_worker_is_an_error_and_no_hang(number: int, named: str, folder: pathlib.Path) -> None:
    stream = TrainData(config(folder, workers=1, threads=1).inputs, Hosts()).batches()
    next(stream)
    # Whatever is queued may still come; then the death must show.
    (worker,) = [x for x in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(x.cmdline())]
    os.kill(worker.pid, number)
    pool = concurrent.futures.ThreadPoolExecutor()
    drained = pool.submit(lambda: collections.deque(itertools.islice(stream, 1000), maxlen=0))
    pool.shutdown(wait=False)
    with pytest.raises(RunError, match=named):
        drained.result(timeout=60)


class FailingSource(SyntheticSource):
    """A source whose reader gets an error of the system."""

    code = 0

    def __getitem__(self, index: int) -> Example:
        raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize(
    ("code", "named"), [(errno.ENOSPC, "/dev/shm"), (errno.EMFILE, "ulimit -n"), (errno.EIO, None)]
)
@pytest.mark.parametrize("workers", [0, 1])
def test_limits_of_the_system_on_loader_processes(code: int, named: str | None, workers: int) -> None:
    source = FailingSource("synthetic/10", "train")
    source.code = code
    section = tiny.config(data=DataConfig(name="synthetic/10", workers=workers, threads=1))
    if workers and named:
        with pytest.raises(RunError, match=f"{named}.*data.workers"):
            next(TrainData(section.inputs, Hosts(), source).batches())
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            next(TrainData(section.inputs, Hosts(), source).batches())


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
