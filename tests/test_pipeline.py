"""Order, shares of hosts, restarts, loader processes, and what happens when they die or meet broken pictures."""

import collections
import dataclasses
import itertools
import os
import pathlib
import shutil
import signal
import threading
import time
from typing import Any

import images
import malformed
import numpy as np
import psutil
import pytest
import tiny

from sit_jax.config import LossConfig, ModelConfig
from sit_jax.data.config import AugmentConfig, DataConfig
from sit_jax.data.pipeline import Hosts, TrainData, eval_batches
from sit_jax.data.registry import open_source
from sit_jax.data.sampler import TrainOrder
from sit_jax.errors import ConfigError, ImageDecodeError, RunError

VARIED = AugmentConfig(flip=0.5, rand_augment="rand-m9-mstd0.5-inc1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Eight classes, thirteen training and five held-out pictures each."""
    root = tmp_path_factory.mktemp("pictures")
    images.make_folder(root, 13, "train", size=(40, 36))
    images.make_folder(root, 5, "val", seed=1, size=(40, 36))
    return root


def config(folder: pathlib.Path, augment: AugmentConfig = VARIED, **data: Any) -> Any:
    section = DataConfig(name="folder", data_dir=str(folder), eval_split="val", resize="crop", **data)
    model = ModelConfig(architecture=tiny.plain(in_channels=3, num_classes=8))
    return tiny.config(
        model=model, teacher=None, loss=LossConfig(), data=section, augment=augment, batch_size=16, eval_batch_size=12
    )


def take(data: TrainData, count: int, start: int = 0) -> list[dict[str, np.ndarray]]:
    stream = data.batches(start)
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


def assert_equal(mine: list[dict[str, np.ndarray]], theirs: list[dict[str, np.ndarray]]) -> None:
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("repeats", [1, 3])
def test_order_leaves_nothing_out(repeats: int) -> None:
    order = TrainOrder(length=100, batch_size=16, repeats=repeats, seed=3)
    batches = [[order(b * 16 + i) for i in range(16)] for b in range(150)]
    views = [collections.Counter(batch) for batch in batches]
    pictures_per_batch = 16 if repeats == 1 else 6
    # Where one pass ends and the next begins within a batch, a picture may come again.
    inner = [v for b, v in enumerate(views) if b * pictures_per_batch % 100 <= 100 - pictures_per_batch]
    assert len(inner) > 100
    assert all(len(count) == pictures_per_batch for count in inner)
    assert {max(count.values()) for count in inner} == {repeats}
    # Pictures in order of appearance are permutations of the whole source, each a different one.
    seen = [picture for batch in batches for picture in batch[:pictures_per_batch]]
    laps = [seen[i : i + 100] for i in range(0, len(seen) - 99, 100)]
    assert all(sorted(lap) == list(range(100)) for lap in laps)
    assert len({tuple(lap) for lap in laps}) == len(laps)
    assert [order(i) for i in range(50)] != [dataclasses.replace(order, seed=4)(i) for i in range(50)]
    assert laps[0] != sorted(laps[0])


@pytest.mark.parametrize("repeats", [1, 3])
def test_any_number_of_hosts_sees_the_same_global_batches(folder: pathlib.Path, repeats: int) -> None:
    section = config(folder, dataclasses.replace(VARIED, repeats=repeats))
    whole = take(TrainData(section.inputs, Hosts()), 5)
    for count in (2, 4):
        shares = [take(TrainData(section.inputs, Hosts(index, count)), 5) for index in range(count)]
        joined = [
            {name: np.concatenate([share[step][name] for share in shares]) for name in whole[0]} for step in range(5)
        ]
        assert_equal(joined, whole)


def test_restart_reads_what_would_have_been_read_also_on_other_hosts(folder: pathlib.Path) -> None:
    section = config(folder)
    whole = take(TrainData(section.inputs, Hosts()), 9)
    assert_equal(take(TrainData(section.inputs, Hosts()), 3, start=6), whole[6:])
    halves = [take(TrainData(section.inputs, Hosts(index, 2)), 3, start=6) for index in range(2)]
    joined = [{name: np.concatenate([half[i][name] for half in halves]) for name in whole[0]} for i in range(3)]
    assert_equal(joined, whole[6:])


def test_workers_and_threads_change_nothing(folder: pathlib.Path) -> None:
    alone = take(TrainData(config(folder, threads=1).inputs, Hosts()), 6)
    assert_equal(take(TrainData(config(folder, threads=4).inputs, Hosts()), 6), alone)
    assert_equal(take(TrainData(config(folder, workers=2, threads=1).inputs, Hosts()), 6), alone)
    assert_equal(take(TrainData(config(folder, workers=3, threads=1).inputs, Hosts()), 2, start=4), alone[4:])


def test_tfds_sources_travel_to_workers(digits_dir: str) -> None:
    def batches(workers: int) -> list[dict[str, np.ndarray]]:
        section = DataConfig(data_dir=digits_dir, workers=workers, threads=1)
        return take(TrainData(tiny.config(batch_size=64, data=section).inputs, Hosts()), 3)

    assert_equal(batches(1), batches(0))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_evaluation_covers_every_example_once_on_any_hosts(folder: pathlib.Path, count: int) -> None:
    section = config(folder)
    source = open_source(section.data, "val")
    shares = [list(eval_batches(section.inputs, source, Hosts(index, count))) for index in range(count)]
    assert {len(share) for share in shares} == {4}  # 40 pictures in batches of 12, filled up.
    kept = [
        image.tobytes()
        for share in shares
        for batch in share
        for image, mask in zip(batch["image"], batch["mask"], strict=True)
        if mask
    ]
    alone = [batch["image"][batch["mask"] > 0] for batch in eval_batches(section.inputs, source, Hosts())]
    assert len(kept) == 40
    assert sorted(kept) == sorted(image.tobytes() for image in np.concatenate(alone))


def test_batches_must_divide_over_hosts(folder: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"^batch_size: 16 examples do not divide over 3 processes"):
        TrainData(config(folder).inputs, Hosts(0, 3))


@pytest.fixture
def damaged(folder: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy with a broken picture in either split."""
    root = tmp_path / "damaged"
    shutil.copytree(folder, root)
    for split in ("train", "val"):
        (root / split / "coffee" / "0002.jpg").write_bytes(malformed.BROKEN["jpeg_half.jpg"])
    return root


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_picture_stops_training_and_is_named(damaged: pathlib.Path, workers: int) -> None:
    section = config(damaged, workers=workers, threads=1)
    with pytest.raises(ImageDecodeError) as caught:
        take(TrainData(section.inputs, Hosts()), 7)
    message = str(caught.value)
    assert message.startswith(f"{damaged}/train/coffee/0002.jpg: cannot be read")
    assert "data.on_decode_error=skip" in message
    assert len(message.splitlines()) == 1
    with pytest.raises(ImageDecodeError, match=r"val/coffee/0002.jpg"):
        list(eval_batches(section.inputs, open_source(section.data, "val"), Hosts()))


def test_broken_pictures_are_skipped_and_counted(damaged: pathlib.Path, folder: pathlib.Path) -> None:
    section = config(damaged, on_decode_error="skip")
    batches = take(TrainData(section.inputs, Hosts()), 13)  # Two passes over 104 pictures.
    assert sum(int((batch["skipped"] > 0).sum()) for batch in batches) == 2
    whole = take(TrainData(config(folder).inputs, Hosts()), 13)
    changed = [
        (step, place)
        for step, (one, other) in enumerate(zip(batches, whole, strict=True))
        for place in range(16)
        if not np.array_equal(one["image"][place], other["image"][place])
    ]
    assert len(changed) == 2  # Nothing but the broken picture's places.
    counted = list(eval_batches(section.inputs, open_source(section.data, "val"), Hosts()))
    assert sum(batch["mask"].sum() for batch in counted) == 39


def test_nothing_but_broken_pictures(tmp_path: pathlib.Path) -> None:
    for name in ("a", "b", "c", "d", "e", "f", "g", "h"):
        (tmp_path / name).mkdir()
        for index in range(20):
            (tmp_path / name / f"{index}.jpg").write_bytes(b"nothing")
    with pytest.raises(Exception, match="100 images in a row cannot be read"):
        take(TrainData(config(tmp_path, on_decode_error="skip").inputs, Hosts()), 1)


def test_killed_worker_is_an_error_and_no_hang(folder: pathlib.Path) -> None:
    stream = TrainData(config(folder, workers=1, threads=1).inputs, Hosts()).batches()
    next(stream)
    # Whatever is queued may still come; then the death must show.
    (worker,) = [x for x in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(x.cmdline())]
    os.kill(worker.pid, signal.SIGKILL)
    failure: list[BaseException] = []

    def drain() -> None:
        try:
            for _ in range(1000):
                next(stream)
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=drain, daemon=True)
    begun = time.monotonic()
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive(), f"still waiting after {time.monotonic() - begun:.0f} s"
    assert isinstance(failure[0], RunError)
    assert "loader process died" in str(failure[0])
    assert "--resume" in str(failure[0])
