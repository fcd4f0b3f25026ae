"""Crops, resizes and augmentation of images, also very long ones, against Pillow, timm and the definitions."""

import collections
import dataclasses
import io
import math
import multiprocessing
import resource

import images
import numpy as np
import psutil
import pytest
import skimage.data
import tiny
from PIL import Image, ImageEnhance, ImageOps

from sit_jax.data import rand_augment as ra
from sit_jax.data import transforms
from sit_jax.data.config import AugmentConfig, DataConfig
from sit_jax.data.sources import Example
from sit_jax.errors import ConfigError
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
        shrunk = np.asarray(
            transforms.resize_box(Image.fromarray(stripes), (0, 0, 301, 301), (100, 100), data), np.float64
        )
        assert shrunk[:, 5:-5].std() < 12
        assert shrunk.mean() == pytest.approx(127, abs=3)
    for box in ((20, 30, 130, 120), (0, 0, 180, 190), (10, 5, 420, 290), (100, 100, 40, 40), (30, 30, 60, 170)):
        photo = Image.fromarray(PHOTO)
        slow, quick = (np.asarray(transforms.resize_box(photo, box, (96, 96), d), np.float64) for d in (CROP, fast))
        assert np.sqrt(np.square(slow - quick).mean()) < 3, box


def test_training_example_is_the_crop_it_says() -> None:
    transform = transforms.TrainTransform(CROP, AugmentConfig(flip=0.5), (96, 96), 3)
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
    plain = transforms.TrainTransform(DataConfig(resampler="pillow"), AugmentConfig(), (64, 64), 3)
    base = plain(example(), np.random.default_rng(0))["image"]
    evaluated = transforms.EvalTransform(DataConfig(), (64, 64), 3)(example())
    assert int(evaluated["label"]) == 3
    np.testing.assert_array_equal(evaluated["image"], base)
    assert base.tobytes() == Image.fromarray(PHOTO).resize((64, 64), BICUBIC).tobytes()
    for augment in (
        AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1-p1"),
        AugmentConfig(color_jitter=0.4),
        AugmentConfig(flip=1.0),
        AugmentConfig(max_rotation=20.0),
    ):
        varied = transforms.TrainTransform(DataConfig(resampler="pillow"), augment, (64, 64), 3)
        views = [varied(example(), np.random.default_rng(seed))["image"] for seed in range(4)]
        assert all(not np.array_equal(image, base) for image in views)
        again = varied(example(), np.random.default_rng(2))["image"]
        assert np.array_equal(again, views[2])


def test_affine_moves_rotates_and_scales() -> None:
    image = Image.fromarray(np.pad(np.full((5, 5), 255, np.uint8), 10))

    def varied(image: Image.Image, **most: float) -> list[np.ndarray]:
        augment = AugmentConfig(**most)  # type: ignore[arg-type]
        rngs = map(np.random.default_rng, range(100))
        return [np.asarray(transforms.random_affine(image, rng, augment), float) for rng in rngs]

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
    return transforms.EvalTransform(data, (size, size), 3)(Example(encoded, 0))["image"].astype(np.int64)


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


def transform_long_images() -> None:
    """Transforms long images in a process that may take 400 MB more than it has."""
    examples = []
    for size in ((1, 60_000), (60_000, 1), (1, 8_000_000), (8_000_000, 1), (300, 200)):
        encoded = io.BytesIO()
        Image.new("L", size, 50).save(encoded, "PNG", compress_level=1)
        examples.append(Example(encoded.getvalue(), 0))
    limit = psutil.Process().memory_info().vms + 400_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for data in (
        DataConfig(resize="crop"),
        DataConfig(resize="crop", resampler="pillow", crop_fraction=0.001),
        DataConfig(resampler="pillow"),
    ):
        evaluate = transforms.EvalTransform(data, (224, 224), 3)
        train = transforms.TrainTransform(data, AugmentConfig(), (224, 224), 3)
        for one in examples:
            for made in (evaluate(one), train(one, np.random.default_rng(0))):
                assert made["image"].shape == (224, 224, 3)
                assert (made["image"] == 50).all()


def test_memory() -> None:
    process = multiprocessing.get_context("spawn").Process(target=transform_long_images)
    process.start()
    process.join()
    assert process.exitcode == 0


FILL = (124, 116, 104)
CAT = Image.fromarray(PHOTO[40:200, 60:240])


def table(function: object) -> list[int]:
    return [function(level) for level in range(256)] * 3  # type: ignore[operator]


def affine(*matrix: float) -> Image.Image:
    return CAT.transform(CAT.size, Image.Transform.AFFINE, matrix, resample=BICUBIC, fillcolor=FILL)


# Operation, argument, what Pillow makes of it.
OPERATIONS: list[tuple[str, float, Image.Image]] = [
    ("AutoContrast", 0, ImageOps.autocontrast(CAT)),
    ("Equalize", 0, ImageOps.equalize(CAT)),
    ("Invert", 0, ImageOps.invert(CAT)),
    ("Rotate", 17.3, CAT.rotate(17.3, resample=BICUBIC, fillcolor=FILL)),
    ("PosterizeIncreasing", 1, CAT.point(table(lambda v: v & 0b10000000))),
    ("PosterizeIncreasing", 0, Image.new("RGB", CAT.size)),
    ("Solarize", 100, CAT.point(table(lambda v: v if v < 100 else 255 - v))),
    ("SolarizeAdd", 60, CAT.point(table(lambda v: min(255, v + 60) if v < 128 else v))),
    ("Color", 0.3, ImageEnhance.Color(CAT).enhance(0.3)),
    ("ShearX", -0.21, affine(1, -0.21, 0, 0, 1, 0)),
    ("ShearY", 0.13, affine(1, 0, 0, 0.13, 1, 0)),
    ("TranslateXRel", 0.3, affine(1, 0, 0.3 * 180, 0, 1, 0)),
    ("TranslateYRel", -0.2, affine(1, 0, 0, 0, 1, -0.2 * 160)),
]


@pytest.mark.parametrize(("name", "argument", "expected"), OPERATIONS, ids=lambda x: x if isinstance(x, str) else "")
def test_operation_is_pillows(name: str, argument: float, expected: Image.Image) -> None:
    assert ra.apply_operation(CAT, name, argument, BICUBIC, FILL).tobytes() == expected.tobytes()


def test_grey_images() -> None:
    grey = CAT.convert("L")
    for name in ra.RandAugmentSpec(increasing=True).operations:
        result = ra.apply_operation(grey, name, 0.2 if name[-1] in "XYl" else 2, BICUBIC, (110,))
        assert (result.mode, result.size) == ("L", grey.size)
    # What lies to the left of the image comes in at the right.
    assert ra.apply_operation(grey, "TranslateXRel", 0.3, BICUBIC, (110,)).getpixel((179, 80)) == 110


def test_arguments_follow_the_definition() -> None:
    # timm's level functions at magnitude 9: value, and whether the sign is random.
    signed = {"Rotate": 27.0, "ShearX": 0.27, "ShearY": 0.27, "TranslateXRel": 0.405, "TranslateYRel": 0.405}
    expected = {name: {value, -value} for name, value in signed.items()}
    for name in ("Color", "Contrast", "Brightness", "Sharpness"):
        expected |= {name: {1.72}, f"{name}Increasing": {1.81, 0.19}}
    levels = {"Posterize": 3, "PosterizeIncreasing": 1, "Solarize": 230, "SolarizeIncreasing": 26, "SolarizeAdd": 99}
    expected |= {name: {level} for name, level in levels.items()}
    for name, values in expected.items():
        drawn = [ra.draw_argument(name, 9.0, np.random.default_rng(seed)) for seed in range(400)]
        assert {round(x, 6) for x in drawn} == values, name
        if len(values) == 2:
            assert np.mean(np.array(drawn) == max(drawn)) == pytest.approx(0.5, abs=0.08)
    assert ra.draw_argument("ColorIncreasing", 10.0, np.random.default_rng(1)) in (1.9, 0.1)
    assert {ra.draw_argument("PosterizeIncreasing", m, np.random.default_rng(0)) for m in (0, 10)} == {4, 0}


def test_magnitudes_are_distributed_as_the_string_says() -> None:
    rng = np.random.default_rng(0)
    spec = ra.parse_rand_augment("rand-m9-mstd0.5-inc1")
    drawn = np.array([ra.draw_magnitude(spec, rng) for _ in range(20_000)])
    # A normal distribution of mean 9 and deviation 0.5, cut at 10: beyond two deviations lies 2.3%, set to 10.
    assert drawn.mean() == pytest.approx(9.0, abs=0.02)
    assert drawn.std() == pytest.approx(0.5, abs=0.02)
    assert drawn.max() == 10.0
    assert (drawn == 10.0).mean() == pytest.approx(0.0228, abs=0.004)
    uniform = ra.parse_rand_augment("rand-m8-mstd101")
    drawn = np.array([ra.draw_magnitude(uniform, rng) for _ in range(20_000)])
    assert (drawn.min(), drawn.max()) == (pytest.approx(0, abs=0.01), pytest.approx(8, abs=0.01))
    assert drawn.std() == pytest.approx(8 / math.sqrt(12), rel=0.02)
    assert {ra.draw_magnitude(ra.parse_rand_augment("rand-m5"), rng) for _ in range(50)} == {5.0}


def test_grammar() -> None:
    assert ra.parse_rand_augment("rand-m9-n3-mstd0.5-inc1") == ra.RandAugmentSpec(9, 3, 0.5, increasing=True)
    assert ra.parse_rand_augment("rand") == ra.RandAugmentSpec(10, 2, 0.0, 10.0, False, 0.5, False)
    assert ra.parse_rand_augment("rand-m7-p0.8-mmax8-mstdinf").magnitude_std == math.inf
    for wrong in ("m9", "rand-x3", "rand-m11", "rand-n0", "rand-n2.5", "rand-inc2", "rand-m", "rand-w1", "rand-w0-n14"):
        with pytest.raises(ConfigError, match=wrong.split("-")[-1]) as caught:
            ra.parse_rand_augment(wrong)
        assert caught.value.key == "rand_augment"


def test_operations_are_drawn_as_often_as_the_definition_says(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[str] = []

    def note(image: Image.Image, name: str, *_: object) -> Image.Image:
        applied.append(name)
        return image

    def draws(policy: str, count: int) -> collections.Counter[str]:
        applied.clear()
        rng = np.random.default_rng(0)
        for _ in range(count):
            ra.rand_augment(CAT, rng, ra.parse_rand_augment(policy), BICUBIC, FILL)
        return collections.Counter(applied)

    monkeypatch.setattr(ra, "apply_operation", note)
    # Three draws, each carried out with probability 0.5: 1.5 on average, any operation a fifteenth of them.
    counts = draws("rand-m9-n3-inc1", 6000)
    assert counts.total() / 6000 == pytest.approx(1.5, abs=0.04)
    assert set(counts) == set(ra.RandAugmentSpec(increasing=True).operations)
    assert np.allclose(np.array(list(counts.values())) / counts.total(), 1 / 15, atol=0.01)
    # Weighted draws are without replacement: with it, Rotate would be drawn 0.6 times on average.
    counts = draws("rand-m9-w0-p1", 3000)
    assert 0.45 < counts["Rotate"] / 3000 < 0.58
    assert "Invert" not in counts
