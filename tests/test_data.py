"""The digits as a tfds data set, and the pipelines over them."""

import dataclasses
import io
import subprocess
import sys

import numpy as np
import pytest
import tiny
from PIL import Image
from sklearn.datasets import load_digits

from sit_jax.config import AugmentConfig, DataConfig, LossConfig, ModelConfig
from sit_jax.data import transforms
from sit_jax.data.pipeline import TrainData, eval_batches
from sit_jax.data.registry import open_source
from sit_jax.data.sources import Source
from sit_jax.errors import ConfigError, UserError


def pixels(source: Source) -> list[tuple[bytes, int]]:
    examples = (source[index] for index in range(len(source)))
    return [(np.asarray(Image.open(io.BytesIO(x.image))).tobytes(), x.label) for x in examples]


def test_digits_are_scikit_learns(digits_dir: str) -> None:
    train, test = (pixels(open_source(DataConfig(data_dir=digits_dir), split)) for split in ("train", "test"))
    digits = load_digits()
    expected = [
        (np.round(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(digits.images, digits.target, strict=True)
    ]
    assert (len(train), len(test)) == (1438, 359)
    assert sorted(train + test) == sorted(expected)
    assert sorted(test) == sorted(expected[4::5])


def test_no_tensorflow_at_run_time(digits_dir: str) -> None:
    code = (
        "import sys; import sit_jax.data.map_fns; assert 'flax' not in sys.modules;"  # A loader process starts fast.
        "from sit_jax.data.registry import open_source; from sit_jax.data.config import DataConfig;"
        f"open_source(DataConfig(data_dir={digits_dir!r}), 'train')[0]; import sit_jax.training.loop;"
        "assert 'tensorflow' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_example_once_per_epoch_in_another_order(digits_dir: str) -> None:
    config = tiny.config(batch_size=1438, data=DataConfig(data_dir=digits_dir))
    data = TrainData(config.inputs)
    assert data.steps_per_epoch == 1
    stream = data.batches()
    first, second = next(stream), next(stream)
    rows = [sorted(image.tobytes() for image in batch["image"]) for batch in (first, second)]
    assert rows[0] == rows[1]
    assert len(set(rows[0])) > 1400
    assert not np.array_equal(first["label"], second["label"])


def test_batches_are_a_function_of_seed_and_step(digits_dir: str) -> None:
    varied = AugmentConfig(max_rotation=10.0, max_shift=0.1, max_zoom=0.1)
    config = tiny.config(batch_size=100, data=DataConfig(data_dir=digits_dir), augment=varied)
    stream = TrainData(config.inputs).batches()
    batches = [next(stream) for _ in range(20)]
    resumed = TrainData(config.inputs).batches(start_step=16)
    for expected in batches[16:]:
        batch = next(resumed)
        assert np.array_equal(batch["image"], expected["image"])
        assert np.array_equal(batch["label"], expected["label"])
    other = next(TrainData(dataclasses.replace(config, seed=1).inputs).batches())
    assert not np.array_equal(other["image"], batches[0]["image"])


def test_evaluation_covers_every_example_once(digits_dir: str) -> None:
    config = tiny.config(eval_batch_size=100, data=DataConfig(data_dir=digits_dir))
    source = open_source(DataConfig(data_dir=digits_dir), "test")
    batches = list(eval_batches(config.inputs, source))
    assert [int(batch["mask"].sum()) for batch in batches] == [100, 100, 100, 59]
    assert {batch["image"].shape for batch in batches} == {(100, 32, 32, 1)}
    labels = np.concatenate([batch["label"][batch["mask"] > 0] for batch in batches])
    assert labels.tolist() == [label for _, label in pixels(source)]


def test_splits_and_sizes_that_do_not_exist(digits_dir: str) -> None:
    assert len(open_source(DataConfig(data_dir=digits_dir), "train[:10%]")) == 144
    with pytest.raises(UserError, match=r"split 'valid' .* there are train, test"):
        open_source(DataConfig(data_dir=digits_dir), "valid")
    data = DataConfig(data_dir=digits_dir)
    with pytest.raises(ConfigError, match=r"^batch_size: 2000 is more than the 1438"):
        TrainData(tiny.config(batch_size=2000, data=data).inputs)
    plain = ModelConfig(architecture=dataclasses.replace(tiny.TEACHER, num_classes=7))
    with pytest.raises(ConfigError, match=r"^model.num_classes: is 7, but the data set has 10"):
        TrainData(tiny.config(model=plain, loss=LossConfig(), teacher=None, data=data).inputs)


def test_affine_moves_turns_and_scales() -> None:
    image = Image.fromarray(np.pad(np.full((5, 5), 255, np.uint8), 10))
    rng = np.random.default_rng(0)
    still = transforms.random_affine(image, rng, 0.0, 0.0, 0.0)
    assert still.tobytes() == image.tobytes()
    rows, columns = np.mgrid[:25, :25]
    centres = []
    for seed in range(200):
        moved = np.asarray(transforms.random_affine(image, np.random.default_rng(seed), 0.0, 0.2, 0.0), np.float64)
        centres.append(((moved * columns).sum() / moved.sum() - 12, (moved * rows).sum() / moved.sum() - 12))
    offsets = np.abs(centres)
    assert offsets.max() == pytest.approx(5.0, abs=0.3)
    assert np.abs(np.mean(centres, axis=0)).max() < 0.5
    bar = Image.fromarray(np.pad(np.full((15, 1), 255, np.uint8), ((5, 5), (12, 12))))
    spread = [np.asarray(transforms.random_affine(bar, np.random.default_rng(s), 45.0, 0.0, 0.0)) for s in range(50)]
    widths = [np.flatnonzero(x.max(axis=0) > 60).size for x in spread]
    assert max(widths) > 8
    sums = [
        np.asarray(transforms.random_affine(image, np.random.default_rng(s), 0.0, 0.0, 0.5)).sum() for s in range(50)
    ]
    assert min(sums) < 0.4 * 25 * 255
    assert max(sums) > 1.8 * 25 * 255
