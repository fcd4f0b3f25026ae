"""Decoding: odd pictures come out right, broken ones never get in."""

import io

import malformed
import numpy as np
import pictures
import pytest
from malformed import BROKEN, ODD, PHOTO, saved
from PIL import Image, ImageOps

from sit_jax.data.decode import decode, findings
from sit_jax.errors import PictureError

MAX = 1_000_000
EXPECTED = np.asarray(PHOTO)


def test_there_are_enough_of_them() -> None:
    assert len(BROKEN) >= 30


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures_are_named_in_one_line(name: str) -> None:
    for read in (lambda: decode(BROKEN[name], 3, name, MAX), lambda: findings(BROKEN[name], name, MAX)):
        with pytest.raises(PictureError) as caught:
            read()
        assert str(caught.value).startswith(f"{name}: ")
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("channels", [1, 3])
def test_odd_pictures_are_read(name: str, channels: int) -> None:
    encoded, word = ODD[name]
    pixels = decode(encoded, channels, name, MAX)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == channels
    if pixels.shape[:2] == (60, 90) and not word:
        expected = EXPECTED if channels == 3 else np.asarray(PHOTO.convert("L"))[:, :, None]
        assert np.abs(pixels.astype(int) - expected).mean() < 4
    found = findings(encoded, name, MAX)
    assert any(word in line for line in found) if word else found == []
    assert all(": " in line for line in found)  # What is unusual, and what happens to it.


def test_values_of_odd_pictures() -> None:
    grey = np.asarray(PHOTO.convert("L"))[:, :, None]
    np.testing.assert_array_equal(decode(ODD["deep.png"][0], 1, max_pixels=MAX), grey)
    np.testing.assert_array_equal(decode(ODD["deep.png"][0], 3, max_pixels=MAX), grey.repeat(3, axis=2))
    np.testing.assert_array_equal(decode(ODD["alpha.png"][0], 3, max_pixels=MAX), EXPECTED)
    half = PHOTO.convert("RGBA")
    half.putalpha(Image.new("L", PHOTO.size, 0))
    assert (decode(saved(half, "PNG"), 3, max_pixels=MAX) == 255).all()  # Nothing but the white ground.
    np.testing.assert_array_equal(decode(ODD["animated.png"][0], 3, max_pixels=MAX), EXPECTED)
    np.testing.assert_array_equal(decode(ODD["web.webp"][0], 3, max_pixels=MAX), EXPECTED)
    assert decode(ODD["one_pixel.png"][0], 3, max_pixels=MAX).tolist() == [[[9, 8, 7]]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = saved(PHOTO, kind, exif=exif)
    with Image.open(io.BytesIO(encoded)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    pixels = decode(encoded, 3, max_pixels=MAX)
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= 6  # OpenCV and Pillow bring different builds of libjpeg.
    assert np.abs(pixels.astype(int) - expected).mean() < 0.5


def test_size_limit() -> None:
    assert decode(malformed.JPEG, 3, max_pixels=60 * 90).shape == (60, 90, 3)
    with pytest.raises(PictureError, match=r"big.jpg: has 90 x 60 pixels, more than data.max_pixels, 5,399"):
        decode(malformed.JPEG, 3, "big.jpg", 60 * 90 - 1)


def test_random_damage_never_escapes() -> None:
    # Every byte may be anything: either pixels of the size in the header come out, or a PictureError.
    rng = np.random.default_rng(0)
    originals = [malformed.JPEG, malformed.PNG, malformed.GIF, malformed.TIFF, malformed.WEBP, malformed.BMP]
    outcomes = {"read": 0, "refused": 0}
    for _ in range(600):
        encoded = bytearray(originals[rng.integers(len(originals))])
        for _ in range(int(rng.integers(1, 20))):
            encoded[rng.integers(len(encoded))] = rng.integers(256)
        damaged = bytes(encoded[: rng.integers(1, len(encoded) + 1)] if rng.random() < 0.3 else encoded)
        try:
            pixels = decode(damaged, 3, "damaged", MAX)
            assert pixels.ndim == 3
            outcomes["read"] += 1
        except PictureError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 50


def test_fast_and_slow_jpeg_paths_agree() -> None:
    for name, pixels in pictures.photographs().items():
        encoded = pictures.jpeg(pixels, quality=92)
        with Image.open(io.BytesIO(encoded)) as image:
            slow = np.asarray(image.convert("RGB"), np.int64)
        difference = np.abs(decode(encoded, 3, name, MAX) - slow)
        assert difference.mean() < 0.5, name
