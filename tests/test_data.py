"""The digits as a tfds data set, and their augmentation."""

import dataclasses
import io
import subprocess
import sys

import numpy as np
import pytest
import tiny
from PIL import Image
from sklearn.datasets import load_digits

from sit_jax.config import DataConfig, LossConfig, ModelConfig
from sit_jax.data.pipeline import TrainData
from sit_jax.data.registry import open_source
from sit_jax.data.sources import Source
from sit_jax.data.transforms import random_affine
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


def test_splits_and_sizes_that_do_not_exist(digits_dir: str) -> None:
    data = DataConfig(data_dir=digits_dir)
    assert len(open_source(data, "train[:10%]")) == 144
    with pytest.raises(UserError, match=r"'valid'.*train, test"):
        open_source(data, "valid")
    plain = ModelConfig(architecture=dataclasses.replace(tiny.TEACHER, num_classes=7))
    for key, changes in (
        ("batch_size", {"batch_size": 2000}),
        ("model.num_classes", {"model": plain, "loss": LossConfig(), "teacher": None}),
    ):
        with pytest.raises(ConfigError) as caught:
            TrainData(tiny.config(data=data, **changes).inputs)
        assert caught.value.key == key


def test_affine_moves_rotates_and_scales() -> None:
    image = Image.fromarray(np.pad(np.full((5, 5), 255, np.uint8), 10))

    def varied(image: Image.Image, *most: float) -> list[np.ndarray]:
        return [np.asarray(random_affine(image, np.random.default_rng(seed), *most), float) for seed in range(100)]

    np.testing.assert_array_equal(varied(image, 0.0, 0.0, 0.0)[0], np.asarray(image))
    rows, columns = np.mgrid[:25, :25]
    moved = varied(image, 0.0, 0.2, 0.0)
    offsets = [((x * columns).sum() / x.sum() - 12, (x * rows).sum() / x.sum() - 12) for x in moved]
    assert np.abs(offsets).max() == pytest.approx(5.0, abs=0.3)
    assert np.abs(np.mean(offsets, axis=0)).max() < 0.6
    bar = Image.fromarray(np.pad(np.full((15, 1), 255, np.uint8), ((5, 5), (12, 12))))
    assert max(np.flatnonzero(x.max(axis=0) > 60).size for x in varied(bar, 45.0, 0.0, 0.0)) > 8
    sums = [x.sum() for x in varied(image, 0.0, 0.0, 0.5)]
    assert min(sums) < 0.4 * 25 * 255
    assert max(sums) > 1.8 * 25 * 255
