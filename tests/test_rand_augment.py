"""RandAugment against Pillow used directly, and against timm's definition of the magnitudes."""

import collections
import math

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageEnhance, ImageOps

from sit_jax.data import rand_augment as ra
from sit_jax.errors import ConfigError

BICUBIC = Image.Resampling.BICUBIC
FILL = (124, 116, 104)
PHOTO = Image.fromarray(skimage.data.chelsea()[40:200, 60:240])


def table(function: object) -> list[int]:
    return [function(level) for level in range(256)] * 3  # type: ignore[operator]


def affine(*matrix: float) -> Image.Image:
    return PHOTO.transform(PHOTO.size, Image.Transform.AFFINE, matrix, resample=BICUBIC, fillcolor=FILL)


# Operation, argument, what Pillow makes of it.
OPERATIONS: list[tuple[str, float, Image.Image]] = [
    ("AutoContrast", 0, ImageOps.autocontrast(PHOTO)),
    ("Equalize", 0, ImageOps.equalize(PHOTO)),
    ("Invert", 0, ImageOps.invert(PHOTO)),
    ("Rotate", 17.3, PHOTO.rotate(17.3, resample=BICUBIC, fillcolor=FILL)),
    ("Posterize", 3, PHOTO.point(table(lambda v: v & 0b11100000))),
    ("PosterizeIncreasing", 1, PHOTO.point(table(lambda v: v & 0b10000000))),
    ("PosterizeIncreasing", 0, Image.new("RGB", PHOTO.size)),
    ("Solarize", 100, PHOTO.point(table(lambda v: v if v < 100 else 255 - v))),
    ("SolarizeIncreasing", 256, PHOTO),
    ("SolarizeAdd", 60, PHOTO.point(table(lambda v: min(255, v + 60) if v < 128 else v))),
    ("Color", 0.3, ImageEnhance.Color(PHOTO).enhance(0.3)),
    ("ContrastIncreasing", 1.7, ImageEnhance.Contrast(PHOTO).enhance(1.7)),
    ("Brightness", 1.4, ImageEnhance.Brightness(PHOTO).enhance(1.4)),
    ("SharpnessIncreasing", 0.2, ImageEnhance.Sharpness(PHOTO).enhance(0.2)),
    ("ShearX", -0.21, affine(1, -0.21, 0, 0, 1, 0)),
    ("ShearY", 0.13, affine(1, 0, 0, 0.13, 1, 0)),
    ("TranslateXRel", 0.3, affine(1, 0, 0.3 * 180, 0, 1, 0)),
    ("TranslateYRel", -0.2, affine(1, 0, 0, 0, 1, -0.2 * 160)),
]


@pytest.mark.parametrize(("name", "argument", "expected"), OPERATIONS, ids=lambda x: x if isinstance(x, str) else "")
def test_operation_is_pillows(name: str, argument: float, expected: Image.Image) -> None:
    assert ra.apply_operation(PHOTO, name, argument, BICUBIC, FILL).tobytes() == expected.tobytes()


def test_grey_images() -> None:
    grey = PHOTO.convert("L")
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
    assert ra.parse_rand_augment("rand-m9-n3-mstd0.5-inc1") == ra.RandAugmentSpec(
        magnitude=9, num_layers=3, magnitude_std=0.5, increasing=True
    )
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
            ra.rand_augment(PHOTO, rng, ra.parse_rand_augment(policy), BICUBIC, FILL)
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
