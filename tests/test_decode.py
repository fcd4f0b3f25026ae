"""Decoding: odd images come out right, broken ones never get in."""

import contextlib
import io
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import malformed
import numpy as np
import pytest
import tifffile
from malformed import BROKEN, FOREIGN, ODD, PHOTO, saved
from PIL import Image, ImageOps, PngImagePlugin

from sit_jax.data.decode import decode, findings
from sit_jax.errors import ImageDecodeError

MAX = 1_000_000
EXPECTED = np.asarray(PHOTO)
GREY = np.asarray(PHOTO.convert("L"))


def decode_rgb(encoded: bytes, name: str = "x", max_pixels: int = MAX) -> np.ndarray:
    return decode(encoded, 3, name, max_pixels)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_are_named_in_one_line(name: str) -> None:
    for read in (decode_rgb, findings):
        with pytest.raises(ImageDecodeError) as caught:
            read(BROKEN[name], name, MAX)
        assert str(caught.value).startswith(f"{name}: ")
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("encoded", "word"), FOREIGN.values(), ids=FOREIGN)
def test_files_of_other_kinds_are_named(encoded: bytes, word: str) -> None:
    with pytest.raises(ImageDecodeError, match=rf"^photo.jpg: .*{word}"):
        decode_rgb(encoded, "photo.jpg")


def test_damage_that_is_accepted_prints_nothing() -> None:
    names = ["cut_exif.jpg", "early_end.jpg", "damaged.jpg"]
    code = f"import malformed; from sit_jax.data.decode import decode, findings; names = {names}\n"
    code += "for name in names: decode(malformed.ODD[name][0], 3); findings(malformed.ODD[name][0], name, 10**6)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("channels", [1, 3])
def test_odd_images_are_read(name: str, channels: int) -> None:
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


def _turned(kind: str, mode: str, orientation: int, where: str) -> bytes:
    """An image with an orientation in EXIF, in XMP, or in both, of which EXIF's counts."""
    options: dict[str, Any] = {}
    xmp = f'<rdf tiff:Orientation="{orientation if where == "XMP" else 9 - orientation}"/>'
    if where != "EXIF":
        if kind == "PNG":
            options["pnginfo"] = PngImagePlugin.PngInfo()
            options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp)
        else:
            options |= {"tiffinfo": {700: xmp.encode()}} if kind == "TIFF" else {"xmp": xmp.encode()}
    if where != "XMP":
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
        if where == "both" and kind == "TIFF":
            exif[700] = options.pop("tiffinfo")[700]
    return saved(PHOTO.convert(mode), kind, **options)


@pytest.mark.parametrize("where", ["EXIF", "XMP", "both"])
@pytest.mark.parametrize(
    ("kind", "mode"),
    [*((k, m) for k in ("JPEG", "TIFF") for m in ("RGB", "L", "CMYK")), ("PNG", "RGBA"), ("PNG", "P"), ("WEBP", "RGB")],
)
def test_orientation_is_what_check_says(kind: str, mode: str, where: str) -> None:
    for orientation in range(1, 9):
        encoded = _turned(kind, mode, orientation, where)
        # Pillow's own way; of a TIFF it turns the pixels when it loads them.
        with Image.open(io.BytesIO(encoded)) as image:
            upright = ImageOps.exif_transpose(image)
            expected = np.asarray(upright.convert("RGB"), np.int64)
        pixels = decode_rgb(encoded)
        assert pixels.shape == expected.shape
        assert pixels.flags.c_contiguous
        assert np.abs(pixels - expected).max() <= 6, orientation
        assert decode(encoded, 1, max_pixels=MAX).shape[:2] == expected.shape[:2]
        turned = any("upright" in line for line in findings(encoded, "", MAX))
        assert turned == (orientation > 1)


def _png16(samples: np.ndarray, key: Sequence[int] = ()) -> bytes:
    """A PNG of 16 bits per sample, grey or RGB, with a transparent colour; Pillow writes no such RGB."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    size, colour = (samples.shape[1], samples.shape[0]), 2 if samples.ndim == 3 else 0
    return malformed.png(size, 16, colour, rows, b"".join(x.to_bytes(2, "big") for x in key))


def _tiff(samples: np.ndarray, **tags: Any) -> bytes:
    encoded = io.BytesIO()
    tifffile.imwrite(encoded, samples, **tags)
    return encoded.getvalue()


def test_bits_per_sample_are_the_files() -> None:
    rgb = EXPECTED.astype(np.uint16) * 257 - (EXPECTED > 0)
    deep = GREY.astype(np.uint16) * 256 + 77
    for encoded, expected in (
        (_png16(deep), GREY),
        (_png16(rgb), EXPECTED),
        (_tiff(deep, byteorder="<"), GREY),
        (_tiff(deep, byteorder=">"), GREY),
        (_tiff(deep, photometric="miniswhite"), 255 - GREY),
        (_tiff(rgb, photometric="rgb"), EXPECTED),
        (b"P5 90 60 65535\n" + deep.astype(">u2").tobytes(), GREY),
    ):
        wanted = expected if expected.ndim == 3 else expected[:, :, None].repeat(3, axis=2)
        np.testing.assert_array_equal(decode_rgb(encoded), wanted)
        found = findings(encoded, "", MAX)
        assert any(line.startswith("16-bit") for line in found)
        assert any(line.startswith("grey") for line in found) == (expected.ndim == 2)
    # By the file's own range these are black; so it is said.
    assert any("black" in line for line in findings(_tiff(GREY.astype(np.uint16)), "", MAX))


def test_transparent_colours_are_laid_on_white() -> None:
    flat = np.full((4, 6), 0x1234, np.uint16)
    flat[1:3] = 0x2335
    grey = _png16(flat, key=(0x2335,))
    colour = _png16(np.stack([flat, flat, flat + 0x2000], axis=-1), key=(0x2335, 0x2335, 0x4335))
    rows = b"".join(b"\0" + bytes(row[::2] % 16 * 17) for row in flat.astype(np.uint8))
    four_bit = malformed.png((6, 4), 4, 0, rows, bytes([0, 5]))
    for encoded in (grey, colour, four_bit):
        pixels = decode_rgb(encoded)
        assert (pixels[1:3] == 255).all()
        assert (pixels[[0, 3]] < 255).all()
        assert any(line.startswith("transparent") for line in findings(encoded, "", MAX))


def test_size_limit() -> None:
    assert decode(malformed.JPEG, 3, max_pixels=60 * 90).shape == (60, 90, 3)
    with pytest.raises(ImageDecodeError, match=r"big.jpg: has 90 x 60 pixels, more than data.max_pixels, 5,399"):
        decode(malformed.JPEG, 3, "big.jpg", 60 * 90 - 1)


def test_size_limit_is_not_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageDecodeError, match=r"big.jpg: has 5,400 pixels, more than data.max_pixels, 60"):
        decode(malformed.JPEG, 3, "big.jpg", 60)
    assert decode(malformed.JPEG, 3, max_pixels=60 * 90).shape == (60, 90, 3)


def test_random_damage_never_escapes() -> None:
    # Every byte may be anything: either pixels of the size in the header come out, or an ImageDecodeError.
    rng = np.random.default_rng(0)
    originals = [malformed.JPEG, malformed.PNG, malformed.GIF, malformed.TIFF, malformed.WEBP, malformed.BMP]
    read = 0
    for _ in range(600):
        encoded = bytearray(originals[rng.integers(len(originals))])
        for _ in range(int(rng.integers(1, 20))):
            encoded[rng.integers(len(encoded))] = rng.integers(256)
        damaged = bytes(encoded[: rng.integers(1, len(encoded) + 1)] if rng.random() < 0.3 else encoded)
        with contextlib.suppress(ImageDecodeError):
            assert decode_rgb(damaged).ndim == 3
            findings(damaged, "damaged", MAX)
            read += 1
    assert 50 < read < 550
