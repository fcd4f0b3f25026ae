"""Crops, resizes and the augmentation of an image, against Pillow and the definitions."""

import dataclasses
import io

import numpy as np
import pytest
import skimage.data
from PIL import Image

from sit_jax.data import transforms
from sit_jax.data.config import AugmentConfig, DataConfig
from sit_jax.data.sources import Example

PHOTO = skimage.data.chelsea()
BICUBIC = Image.Resampling.BICUBIC
CROP = DataConfig(resize="crop", resampler="pillow")


def example(pixels: np.ndarray = PHOTO) -> Example:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return Example(encoded.getvalue(), 3, "cat.png")


def test_crop_boxes_have_the_defined_area_and_ratio() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([transforms.random_crop_box(500, 400, rng) for _ in range(20_000)], np.float64)
    left, top, width, height = boxes.T
    assert min(left.min(), top.min()) >= 0
    assert (left + width).max() <= 500
    assert (top + height).max() <= 400
    area, ratio = width * height / 200_000, width / height
    assert area.min() > 0.075
    assert area.max() <= 1.0
    assert ratio.min() > 0.73
    assert ratio.max() < 1.36
    # Small boxes always fit, so below a fraction of 0.5 the area is uniform and the log of the ratio symmetric.
    small = area < 0.5
    histogram, _ = np.histogram(area[small], bins=6, range=(0.08, 0.5))
    assert histogram.std() / histogram.mean() < 0.05
    assert abs(np.log(ratio[small]).mean()) < 0.01
    # Positions are uniform over where the box fits.
    assert (left[small] / (500 - width[small])).mean() == pytest.approx(0.5, abs=0.01)
    assert (top[small] / (400 - height[small])).std() == pytest.approx(1 / np.sqrt(12), abs=0.01)


def test_crop_of_extreme_images_is_the_largest_allowed_one() -> None:
    rng = np.random.default_rng(0)
    assert transforms.random_crop_box(1000, 10, rng, scale=(0.9, 1.0)) == (493, 0, 13, 10)
    assert transforms.random_crop_box(10, 1000, rng, scale=(0.9, 1.0)) == (0, 493, 10, 13)
    assert transforms.random_crop_box(1, 1, rng) == (0, 0, 1, 1)


def test_opencv_resampler_does_not_alias() -> None:
    fast = dataclasses.replace(CROP, resampler="opencv")
    # Stripes of one pixel must become grey when shrunk, as they do with Pillow; a plain cubic filter leaves a pattern.
    stripes = np.broadcast_to((np.arange(301) % 2 * 255)[None, :, None], (301, 301, 3)).astype(np.uint8).copy()
    for data in (CROP, fast):
        shrunk = np.asarray(transforms.resize_box(stripes, (0, 0, 301, 301), 100, data), np.float64)
        assert shrunk[:, 5:-5].std() < 12
        assert shrunk.mean() == pytest.approx(127, abs=3)
    for box in ((20, 30, 130, 120), (0, 0, 180, 190), (10, 5, 420, 290), (100, 100, 40, 40), (30, 30, 60, 170)):
        slow, quick = (np.asarray(transforms.resize_box(PHOTO, box, 96, d), np.float64) for d in (CROP, fast))
        assert np.sqrt(np.square(slow - quick).mean()) < 3, box


def test_training_example_is_the_crop_it_says() -> None:
    transform = transforms.TrainTransform(CROP, AugmentConfig(flip=0.5), 96, 3)
    flips = 0
    for seed in range(40):
        made = transform(example(), np.random.default_rng(seed))
        left, top, right, bottom = np.round(made["crop"] * np.array([451, 300, 451, 300])).tolist()
        expected = Image.fromarray(PHOTO).resize((96, 96), BICUBIC, (left, top, right, bottom))
        if made["flipped"]:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            flips += 1
        assert made["image"].tobytes() == expected.tobytes()
        assert int(made["label"]) == 3
    assert 10 < flips < 30


def test_augmentations_change_what_they_should() -> None:
    plain = transforms.TrainTransform(DataConfig(resampler="pillow"), AugmentConfig(), 64, 3)
    base = plain(example(), np.random.default_rng(0))["image"]
    evaluated = transforms.EvalTransform(DataConfig(), 64, 3)(example())
    assert int(evaluated["label"]) == 3
    np.testing.assert_array_equal(evaluated["image"], base)
    assert base.tobytes() == Image.fromarray(PHOTO).resize((64, 64), BICUBIC).tobytes()
    for augment in (
        AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1-p1"),
        AugmentConfig(color_jitter=0.4),
        AugmentConfig(flip=1.0),
        AugmentConfig(max_rotation=20.0),
    ):
        varied = transforms.TrainTransform(DataConfig(resampler="pillow"), augment, 64, 3)
        images = [varied(example(), np.random.default_rng(seed))["image"] for seed in range(4)]
        assert all(not np.array_equal(image, base) for image in images)
        again = varied(example(), np.random.default_rng(2))["image"]
        assert np.array_equal(again, images[2])
