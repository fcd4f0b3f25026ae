"""Image decoding."""

import contextlib
import io
import warnings

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from sit_jax.errors import ImageDecodeError, one_line

# Images beyond `max_pixels` are rejected by name; Pillow's warning would be redundant.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_WHITE_IS_ZERO = 0
# Offset of the byte of a PNG file that holds the bits per sample.
_PNG_BIT_DEPTH = 24
# Formats whose samples Pillow scales to 16 bits when it opens them as 32-bit integers.
_SCALED_TO_16 = ("PNG", "PPM")
_END_OF_JPEG = b"\xff\xd9"
_BACKGROUND = "white"
_LONG = 10
_GREY = "grey: repeated over the model's channels"


def decode(encoded: bytes, channels: int, name: str = "image", max_pixels: int = 80_000_000) -> np.ndarray:
    """Decodes an image and applies its EXIF or XMP orientation; of an animation, the first frame.

    Transparent pixels are composited on white, samples of more than 8 bits are scaled to 8, CMYK and palette images are
    converted to RGB. Pixels of unknown range (floats, signed integers, 32-bit integers) are rejected.

    Returns uint8 pixels (height, width, channels), grey for 1 channel and RGB for 3. Raises an ImageDecodeError if the
    data are not an image, are damaged, or have more than `max_pixels` pixels.
    """
    return _read(encoded, channels, name, max_pixels)[0]


def findings(encoded: bytes, name: str, max_pixels: int) -> list[str]:
    """Returns descriptions of what is unusual about an image and how `decode` handles it; empty for a plain image.

    The suffix of `name` is one such property. Raises an ImageDecodeError as `decode` does.
    """
    pixels, found = _read(encoded, 3, name, max_pixels)
    height, width, _ = pixels.shape
    if max(width, height) > _LONG * min(width, height):
        what = "a centre crop keeps its middle only, stretching distorts it"
        found.append(f"longer than {_LONG} times its shorter side: {what}")
    with Image.open(io.BytesIO(encoded)) as image:
        kind = str(image.format)
        with contextlib.suppress(Exception):  # Frames that `decode` does not read may be damaged.
            if kind != "MPO" and getattr(image, "n_frames", 1) > 1:
                found.append("animated: only its first frame is used")
    _, dot, suffix = name.lower().rpartition(".")
    usual = Image.registered_extensions().get(dot + suffix)
    if dot and usual != kind and (usual, kind) != ("JPEG", "MPO"):
        found.append(f"suffix .{suffix} but {kind}: read as {kind}")
    return found


def _read(encoded: bytes, channels: int, name: str, max_pixels: int) -> tuple[np.ndarray, list[str]]:
    """Returns the pixels and descriptions of what was unusual about them and how it was handled."""
    if not encoded:
        raise ImageDecodeError(f"{name}: is empty")
    done: list[str] = []
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if image.width * image.height > max_pixels:
                size = f"{image.width} x {image.height}"
                raise ImageDecodeError(f"{name}: has {size} pixels, more than data.max_pixels, {max_pixels:,}")
            rotated_by_pillow = 1
            if _is_plain_jpeg(image, encoded):
                orientation = _orientation(image)
                if image.mode == "L":
                    done.append(_GREY)
                pixels = _decode_jpeg(encoded, channels)
            else:
                bits = _bits_per_sample(image, encoded)
                if isinstance(image, TiffImageFile):  # Loading rotates the pixels and drops the orientation.
                    rotated_by_pillow = _orientation(image)
                image.load()  # Before the orientation is read: that loads a PNG and ignores its errors.
                orientation = _orientation(image)
                pixels = np.asarray(_to_channels(image, bits, done).convert("L" if channels == 1 else "RGB"))
            if max(orientation, rotated_by_pillow) > 1:
                done.append("turned by EXIF or XMP: set upright")
                pixels = _upright(pixels, orientation)
    except ImageDecodeError:
        raise
    except UnidentifiedImageError:
        raise ImageDecodeError(f"{name}: cannot be read: not an image in a known format") from None
    except Exception as error:  # Decoders of damaged files raise many types, from SyntaxError to struct.error.
        raise ImageDecodeError(f"{name}: cannot be read: {one_line(error, 200)}") from None
    return pixels.reshape(*pixels.shape[:2], channels), done


def _is_plain_jpeg(image: Image.Image, encoded: bytes) -> bool:
    """Returns whether OpenCV may decode the image.

    OpenCV is faster, but silently fills in the missing part of a truncated file and converts CMYK differently.
    """
    complete = encoded.rstrip(b"\x00").endswith(_END_OF_JPEG)
    return image.format == "JPEG" and image.mode in ("RGB", "L") and complete


def _decode_jpeg(encoded: bytes, channels: int) -> np.ndarray:
    # OpenCV reads the orientation from EXIF only; Pillow also from XMP.
    flags = cv2.IMREAD_IGNORE_ORIENTATION | (cv2.IMREAD_COLOR_RGB if channels == 3 else cv2.IMREAD_GRAYSCALE)
    pixels: np.ndarray | None = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    if pixels is None:
        raise ValueError("broken JPEG data")
    return pixels


def _to_channels(image: Image.Image, bits: int, done: list[str]) -> Image.Image:
    """Converts a loaded image to 8 bits per sample without transparency; appends each conversion to `done`."""
    mode = image.mode
    deep_grey = mode.startswith("I;16") or (mode == "I" and image.format in _SCALED_TO_16)
    if mode in ("I", "F") and not deep_grey:
        kind = "floating-point numbers" if mode == "F" else "signed or 32-bit integers"
        raise ValueError(f"has {kind} pixels of unknown range; save it with 8 bits, or unsigned with 16 bits")
    conversions = {
        _GREY: deep_grey or mode in ("1", "L", "LA"),
        f"{mode}: turned to RGB": mode in ("CMYK", "LAB", "HSV", "YCbCr"),
        "palette: turned to RGB": mode in ("P", "PA"),
        f"{bits}-bit: scaled to 8 bits": bits > 8,
        "transparent: laid on white": image.has_transparency_data,
    }
    done += [conversion for conversion, applies in conversions.items() if applies]
    if deep_grey:
        return _from_deep_grey(image, bits, done)
    if image.has_transparency_data:
        _scale_transparent_colour(image, bits)
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _BACKGROUND), image)
    return image


def _from_deep_grey(image: Image.Image, bits: int, done: list[str]) -> Image.Image:
    samples = np.asarray(image).astype(np.int64)
    grey = (samples >> (bits - 8)).clip(0, 255).astype(np.uint8)
    if isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO:
        grey = 255 - grey  # Pillow inverts 8-bit images only.
    elif not grey.any():
        done.append(f"{bits}-bit with values below {1 << (bits - 8)} only: black")
    if "transparency" in image.info:
        grey[samples == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def _scale_transparent_colour(image: Image.Image, bits: int) -> None:
    """Scales a PNG's transparent colour to 8 bits, as Pillow has scaled the samples."""
    colour = image.info.get("transparency")
    if image.format != "PNG" or colour is None:
        return
    if image.mode == "L" and bits < 8:
        image.info["transparency"] = colour * 255 // ((1 << bits) - 1)
    elif image.mode == "RGB" and bits == 16:
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _bits_per_sample(image: Image.Image, encoded: bytes) -> int:
    """Returns the bits per sample that the file declares; 8 for palettes and formats with whole bytes only."""
    if image.format == "PNG" and image.mode != "P":
        return encoded[_PNG_BIT_DEPTH]
    if isinstance(image, TiffImageFile):
        return int(max(image.tag_v2.get(BITSPERSAMPLE, (8,))))
    return 16 if image.mode.startswith("I") else 8


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
        return int(value) if value in range(1, 9) else 1
    except Exception:  # A damaged EXIF block does not affect the pixels.
        return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rotates or flips pixels that are stored in one of EXIF's orientations, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        pixels = cv2.transpose(pixels)
    flips = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}  # OpenCV's flip codes: 0 is vertical, 1 is horizontal.
    return cv2.flip(pixels, flips[orientation]) if orientation in flips else pixels
