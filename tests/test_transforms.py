"""Crops, resizes and the augmentation of an image, against Pillow and the definitions; also of very long images."""

import dataclasses
import io
import subprocess
import sys

import images
import numpy as np
import pytest
import skimage.data
import tiny
from PIL import Image

from sit_jax.data import transforms
from sit_jax.data.config import AugmentConfig, DataConfig
from sit_jax.data.sources import Example
from sit_jax.visual.model_input import preprocess

PHOTO = skimage.data.chelsea()
BICUBIC = Image.Resampling.BICUBIC
CROP = DataConfig(resize="crop", resampler="pillow")


def example(pixels: np.ndarray = PHOTO) -> Example:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return Example(encoded.getvalue(), 3, "cat.png")


def test_crop_boxes_have_the_defined_area_and_ratio() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([transforms.random_crop_box(500, 400, rng, AugmentConfig()) for _ in range(20_000)], np.float64)
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
    large = AugmentConfig(crop_scale=(0.9, 1.0))
    assert transforms.random_crop_box(1000, 10, rng, large) == (493, 0, 13, 10)
    assert transforms.random_crop_box(10, 1000, rng, large) == (0, 493, 10, 13)
    assert transforms.random_crop_box(1, 1, rng, AugmentConfig()) == (0, 0, 1, 1)


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
        views = [varied(example(), np.random.default_rng(seed))["image"] for seed in range(4)]
        assert all(not np.array_equal(image, base) for image in views)
        again = varied(example(), np.random.default_rng(2))["image"]
        assert np.array_equal(again, views[2])


def test_affine_moves_rotates_and_scales() -> None:
    image = Image.fromarray(np.pad(np.full((5, 5), 255, np.uint8), 10))

    def varied(image: Image.Image, **most: float) -> list[np.ndarray]:
        augment, rng = AugmentConfig(**most), np.random.default_rng(0)  # type: ignore[arg-type]
        return [np.asarray(transforms.random_affine(image, rng, augment), float) for _ in range(100)]

    np.testing.assert_array_equal(varied(image)[0], np.asarray(image))
    rows, columns = np.mgrid[:25, :25]
    moved = varied(image, max_shift=0.2)
    offsets = [((x * columns).sum() / x.sum() - 12, (x * rows).sum() / x.sum() - 12) for x in moved]
    assert np.abs(offsets).max() == pytest.approx(5.0, abs=0.3)
    assert np.abs(np.mean(offsets, axis=0)).max() < 0.6
    bar = Image.fromarray(np.pad(np.full((15, 1), 255, np.uint8), ((5, 5), (12, 12))))
    assert max(np.flatnonzero(x.max(axis=0) > 60).size for x in varied(bar, max_rotation=45.0)) > 8
    sums = [x.sum() for x in varied(image, max_zoom=0.5)]
    assert min(sums) < 0.4 * 25 * 255
    assert max(sums) > 1.8 * 25 * 255


def png(width: int, height: int, seed: int = 0) -> bytes:
    """Smooth noise, so that a shift by part of a pixel shows."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(1, height // 7), max(1, width // 7), 3), np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(encoded, "PNG")
    return encoded.getvalue()


def evaluated(encoded: bytes, data: DataConfig, size: int) -> np.ndarray:
    return transforms.EvalTransform(data, size, 3)(Example(encoded, 0))["image"].astype(np.int64)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("short", "long", "size"), [(1, 60_000, 8), (3, 5_000, 32), (37, 4_444, 16)])
def test_evaluation_crop_of_a_long_image(short: int, long: int, size: int, wide: bool) -> None:
    encoded = png(long, short) if wide else png(short, long)
    for interpolation in ("bilinear", "bicubic", "lanczos"):
        image = evaluated(encoded, DataConfig(resize="crop", interpolation=interpolation), size)
        assert image.shape == (size, size, 3)
        expected = images.center_crop(encoded, size, 0.875, transforms.RESAMPLING[interpolation])
        assert np.abs(image - expected).max() <= 1


@pytest.mark.parametrize("fraction", [0.875, 1.0, 0.5])
def test_evaluation_crop_of_ordinary_images_is_torchvisions_to_the_bit(fraction: float) -> None:
    data = DataConfig(resize="crop", crop_fraction=fraction)
    for width, height in ((451, 300), (300, 300), (451, 30), (40, 300), (97, 97), (31, 17), (451, 38)):
        encoded = png(width, height)
        expected = images.center_crop(encoded, 64, fraction)
        np.testing.assert_array_equal(evaluated(encoded, data, 64), expected, str((width, height)))


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
@pytest.mark.parametrize("resize", ["crop", "stretch"])
def test_what_is_shown_is_what_the_model_sees(size: tuple[int, int], resize: str) -> None:
    data = DataConfig(resize=resize)  # type: ignore[arg-type]
    seen = preprocess(tiny.plain(in_channels=3), data, Example(png(*size), 0))
    smaller = Image.fromarray(seen.shown).resize((32, 32), Image.Resampling.BOX)
    assert np.abs(np.asarray(smaller, np.int64) - seen.pixels).mean() < 3


_MEMORY = """
import io, resource
import numpy as np
from PIL import Image
from sit_jax.data import transforms
from sit_jax.data.config import AugmentConfig, DataConfig
from sit_jax.data.sources import Example

def png(width, height):
    encoded = io.BytesIO()
    Image.new("L", (width, height), 50).save(encoded, "PNG", compress_level=1)
    return Example(encoded.getvalue(), 0)

examples = [png(*size) for size in ((1, 60_000), (60_000, 1), (1, 8_000_000), (8_000_000, 1))]
examples.append(png(300, 200))
taken = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
limit = taken * 1024 + 400_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for resize, resampler, fraction in (("crop", "opencv", 0.875), ("crop", "pillow", 0.001), ("stretch", "pillow", 0.875)):
    data = DataConfig(resize=resize, resampler=resampler, crop_fraction=fraction)
    for example in examples:
        made = [transforms.EvalTransform(data, 224, 3)(example)]
        made.append(transforms.TrainTransform(data, AugmentConfig(), 224, 3)(example, np.random.default_rng(0)))
        for one in made:
            assert one["image"].shape == (224, 224, 3)
            assert (one["image"] == 50).all()
"""


def test_memory() -> None:
    done = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
