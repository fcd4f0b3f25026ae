"""Image decoding."""

import contextlib
import io
import re
import struct
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from sit_jax.data.formats import FORMATS, identify
from sit_jax.errors import ImageDecodeError, one_line

# Pillow warns about damaged metadata, which does not affect the pixels, and about large images, which are rejected.
warnings.filterwarnings("ignore", module=r"PIL\.")
# Texts and colour profiles of more than 1 MB are valid; the limit on all of a file's metadata stays.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

_WHITE_IS_ZERO = 0
# Offset of the byte of a PNG file that holds the bits per sample.
_PNG_BIT_DEPTH = 24
# Formats whose samples Pillow scales to 16 bits when it opens them as 32-bit integers.
_SCALED_TO_16 = ("PNG", "PPM")
_END_OF_JPEG = b"\xff\xd9"
_RESTARTS = b"\xff\xdd"
# Data of no particular meaning for a JPEG decoder, without markers.
_FILLER = bytes(97 * index % 255 for index in range(1, 65))
# Bytes per value of each EXIF type.
_EXIF_SIZES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4)
_BACKGROUND = "white"
_LONG = 10
_GREY = "grey: repeated over the model's channels"
# Samples of more than 8 bits are dark if all are below this after scaling to 8 bits: 12 bits stored as 16.
_DARK = 16
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(encoded: bytes, channels: int, name: str = "image", max_pixels: int = 80_000_000) -> np.ndarray:
    """Decodes an image and applies its EXIF or XMP orientation; of an animation, the first frame.

    Transparent pixels are composited on white, samples of more than 8 bits are scaled to 8, CMYK and palette images are
    converted to RGB. Pixels of unknown range (floats, signed integers, 32-bit integers) are rejected.

    Returns uint8 pixels (height, width, channels), grey for 1 channel and RGB for 3. Raises an ImageDecodeError if the
    data are not an image, are damaged, or have more than `max_pixels` pixels.
    """
    image = decode_image(encoded, channels, name, max_pixels)
    return np.asarray(image).reshape(image.height, image.width, channels)


def decode_image(encoded: bytes, channels: int, name: str, max_pixels: int) -> Image.Image:
    """Decodes as `decode`, to a Pillow image of mode L for 1 channel and RGB for 3."""
    return _read(encoded, channels, name, max_pixels)[0]


def findings(encoded: bytes, name: str, max_pixels: int) -> list[str]:
    """Returns descriptions of what is unusual about an image and how `decode` handles it; empty for a plain image.

    The suffix of `name` is one such property. Raises an ImageDecodeError as `decode` does.
    """
    pixels, found = _read(encoded, 3, name, max_pixels)
    if max(pixels.size) > _LONG * min(pixels.size):
        what = "a centre crop keeps its middle only, stretching distorts it"
        found.append(f"longer than {_LONG} times its shorter side: {what}")
    with _open(encoded, max_pixels) as image:
        kind = str(image.format)
        if kind == "JPEG" and isinstance(image, ImageFile.ImageFile) and _is_damaged_jpeg(image, encoded):
            found.append("damaged JPEG data: read, but parts may be grey or wrong")
        if _is_damaged_exif(image.info.get("exif", b"")):
            found.append("damaged EXIF: used as far as it can be read")
        with contextlib.suppress(Exception):  # Frames that `decode` does not read may be damaged.
            if kind != "MPO" and getattr(image, "n_frames", 1) > 1:
                found.append("animated: only its first frame is used")
    _, dot, suffix = name.lower().rpartition(".")
    usual = Image.registered_extensions().get(dot + suffix)
    if dot and usual != kind and {usual, kind} != {"JPEG", "MPO"}:
        found.append(f"suffix .{suffix} but {kind}: read as {kind}")
    return found


def _open(encoded: bytes, max_pixels: int) -> Image.Image:
    # Pillow rejects twice its own limit, also of images within an icon: it must not be below ours.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    return Image.open(io.BytesIO(encoded), formats=FORMATS)


def _read(encoded: bytes, channels: int, name: str, max_pixels: int) -> tuple[Image.Image, list[str]]:
    """Returns the pixels and descriptions of what was unusual about them and how it was handled."""
    done: list[str] = []
    limit = f" pixels, more than data.max_pixels, {max_pixels:,}"
    try:
        with _open(encoded, max_pixels) as image:
            if image.width * image.height > max_pixels:
                raise ImageDecodeError(f"{name}: has {image.width} x {image.height}{limit}")
            bits = _bits_per_sample(image, encoded)
            # Loading rotates the pixels of a TIFF and drops the orientation.
            rotated_by_pillow = _orientation(image) if isinstance(image, TiffImageFile) else 1
            if channels == 1:
                image.draft("L", None)  # A JPEG's brightness is stored.
            image.load()  # Before the orientation is read: that loads a PNG and ignores its errors.
            orientation = _orientation(image)
            pixels = _to_channels(image, bits, done)
            mode = "L" if channels == 1 else "RGB"
            pixels = pixels if pixels.mode == mode else pixels.convert(mode)
            if bits > 8 and (highest := np.asarray(pixels).max()) < _DARK:
                below, word = (_DARK, "dark") if highest else (1, "black")
                done.append(f"{bits}-bit with values below {below << (bits - 8)} only: {word}")
    except ImageDecodeError:
        raise
    except Image.DecompressionBombError as error:
        count = re.search(r"\d+", str(error))
        raise ImageDecodeError(f"{name}: has {int(count[0]):,}{limit}" if count else f"{name}: {error}") from None
    except Exception as error:  # Decoders of damaged files raise many types, from SyntaxError to struct.error.
        unknown = isinstance(error, UnidentifiedImageError)
        problem = "not an image in a known format" if unknown else one_line(error, 200)
        raise ImageDecodeError(f"{name}: {identify(encoded) or f'cannot be read: {problem}'}") from None
    if max(orientation, rotated_by_pillow) > 1:
        done.append("turned by EXIF or XMP: set upright")
        pixels = pixels.transpose(_UPRIGHT[orientation]) if orientation > 1 else pixels
    return pixels, done


def _is_damaged_jpeg(image: ImageFile.ImageFile, encoded: bytes) -> bool:
    """Returns whether a readable JPEG, which is open but not loaded, has less or more data than its pixels need.

    libjpeg fills in missing data and skips superfluous data, and Pillow does not say so. But other bytes after complete
    data do not change the pixels, and, if all pixels are stored once and in one piece, other bytes at the end do.
    """
    start = image.fp.tell() if image.fp else 0  # The file is read up to the pixels' data.
    data = encoded[: encoded.find(_END_OF_JPEG, start)].rstrip(b"\xff")
    pixels = _load_jpeg(encoded)
    if _load_jpeg(data + _FILLER + _END_OF_JPEG) != pixels:
        return True
    if "progressive" in image.info or _RESTARTS in encoded[:start]:
        return False
    return _load_jpeg(data[:-8] + _FILLER[:8] + _END_OF_JPEG) == pixels


def _load_jpeg(encoded: bytes) -> bytes:
    with contextlib.suppress(Exception), Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        return image.tobytes()
    return b""


def _is_damaged_exif(exif: bytes) -> bool:
    """Returns whether the main directory, if there is one, is cut off or refers to data beyond the end."""
    data = exif.removeprefix(b"Exif\0\0")
    order = ">" if data.startswith(b"MM") else "<"
    try:
        (start,) = struct.unpack_from(f"{order}4xL", data)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        entries = [struct.unpack_from(f"{order}2xHLL", data, start + 2 + 12 * index) for index in range(count)]
    except struct.error:
        return bool(data)
    sizes = ((number * _EXIF_SIZES[kind] if kind < len(_EXIF_SIZES) else 0, at) for kind, number, at in entries)
    return any(size > 4 and at + size > len(data) for size, at in sizes)


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
        return _from_deep_grey(image, bits)
    if image.has_transparency_data:
        _scale_transparent_colour(image, bits)
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _BACKGROUND), image)
    return image


def _from_deep_grey(image: Image.Image, bits: int) -> Image.Image:
    samples = np.asarray(image).astype(np.int64)
    grey = (samples >> (bits - 8)).clip(0, 255).astype(np.uint8)
    if isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO:
        grey = 255 - grey  # Pillow inverts 8-bit images only.
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
