"""Images a pixel wide and very long: their pixels come out right, and they take no more memory than others."""

import io
import subprocess
import sys

import numpy as np
import pytest
import tiny
from PIL import Image

from sit_jax.data import transforms
from sit_jax.data.config import DataConfig
from sit_jax.data.decode import findings
from sit_jax.data.sources import Example
from sit_jax.visual.model_input import preprocess


def png(width: int, height: int, seed: int = 0) -> bytes:
    """Smooth noise, so that a shift by part of a pixel shows."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(1, height // 7), max(1, width // 7), 3), np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(encoded, "PNG")
    return encoded.getvalue()


def torchvisions(encoded: bytes, size: int, fraction: float, resample: Image.Resampling) -> np.ndarray:
    """Resizes all of the image, then crops."""
    with Image.open(io.BytesIO(encoded)) as image:
        shorter, (width, height) = int(size / fraction), image.size
        scale = [max(shorter, int(shorter * length / min(width, height))) for length in (width, height)]
        resized = image.resize((scale[0], scale[1]), resample)
    left, top = (round((length - size) / 2) for length in scale)
    return np.asarray(resized.crop((left, top, left + size, top + size)), np.int64)


def evaluated(encoded: bytes, data: DataConfig, size: int) -> np.ndarray:
    return transforms.EvalTransform(data, size, 3)(Example(encoded, 0))["image"].astype(np.int64)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("short", "long", "size"), [(1, 60_000, 8), (3, 5_000, 32), (37, 4_444, 16)])
def test_evaluation_crop_of_a_long_image(short: int, long: int, size: int, wide: bool) -> None:
    encoded = png(long, short) if wide else png(short, long)
    for interpolation in ("bilinear", "bicubic", "lanczos"):
        image = evaluated(encoded, DataConfig(resize="crop", interpolation=interpolation), size)
        assert image.shape == (size, size, 3)
        expected = torchvisions(encoded, size, 0.875, transforms.RESAMPLING[interpolation])
        assert np.abs(image - expected).max() <= 1


@pytest.mark.parametrize("fraction", [0.875, 1.0, 0.5])
def test_evaluation_crop_of_ordinary_images_is_torchvisions_to_the_bit(fraction: float) -> None:
    data = DataConfig(resize="crop", crop_fraction=fraction)
    for width, height in ((451, 300), (300, 300), (451, 30), (40, 300), (97, 97), (31, 17), (451, 38)):
        encoded = png(width, height)
        expected = torchvisions(encoded, 64, fraction, Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(evaluated(encoded, data, 64), expected, str((width, height)))


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
@pytest.mark.parametrize("resize", ["crop", "stretch"])
def test_what_is_shown_is_what_the_model_sees(size: tuple[int, int], resize: str) -> None:
    data = DataConfig(resize=resize)  # type: ignore[arg-type]
    seen = preprocess(tiny.plain(in_channels=3), data, Example(png(*size), 0))
    smaller = Image.fromarray(seen.shown).resize((32, 32), Image.Resampling.BOX)
    assert np.abs(np.asarray(smaller, np.int64) - seen.pixels).mean() < 3


def test_check_says_that_an_image_is_long() -> None:
    assert findings(png(60, 600), "x.png", 10**6) == []
    (found,) = findings(png(10, 500), "x.png", 10**6)
    assert found.startswith("longer than ")


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
