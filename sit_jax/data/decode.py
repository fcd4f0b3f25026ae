"""From a file's bytes to pixels, whatever the file turns out to be."""

import io
import warnings
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sit_jax.errors import PictureError

# Pictures beyond `max_pixels` are refused here by name; Pillow's own warning would come on top.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_ORIENTATION = 0x0112
_END_OF_JPEG = b"\xff\xd9"
_BACKGROUND = "white"
_LONG = 10
_SUFFIXES = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "MPO": ("jpg", "jpeg", "mpo"),
    "PNG": ("png", "apng"),
    "GIF": ("gif",),
    "BMP": ("bmp",),
    "TIFF": ("tif", "tiff"),
    "WEBP": ("webp",),
}


def decode(encoded: bytes, channels: int, name: str = "picture", max_pixels: int = 80_000_000) -> np.ndarray:
    """Decodes a picture, turned upright by its EXIF orientation; the first frame of an animation.

    Transparent pixels are laid on white, 16-bit grey is scaled to 8 bits, CMYK and palettes become RGB.

    Args:
        encoded: The file's bytes.
        channels: 1 for grey, 3 for RGB.
        name: What messages call the picture.
        max_pixels: More than these are not decoded.

    Returns:
        Pixels, uint8 (height, width, channels).

    Raises:
        PictureError: The bytes are no picture, a broken or cut-off one, or one of too many pixels.
    """
    if not encoded:
        raise PictureError(f"{name}: is empty")
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if image.width * image.height > max_pixels:
                size = f"{image.width} x {image.height}"
                raise PictureError(f"{name}: has {size} pixels, more than data.max_pixels, {max_pixels:,}")
            if _is_plain_jpeg(image, encoded):
                pixels = _decode_jpeg(encoded, channels)
            else:
                pixels = np.asarray(_to_channels(image, channels))
    except PictureError:
        raise
    except Exception as error:  # Decoders of damaged files raise anything, from SyntaxError to struct.error.
        raise PictureError(f"{name}: cannot be read: {_reason(error)}") from None
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def findings(encoded: bytes, name: str, max_pixels: int) -> list[str]:
    """What is unusual about a picture, each with what `decode` makes of it; empty for a plain one.

    Args:
        encoded: The file's bytes.
        name: Its file name, for the suffix.
        max_pixels: As for `decode`.

    Raises:
        PictureError: `decode` would raise it.
    """
    decode(encoded, 3, name, max_pixels)
    found = []
    with Image.open(io.BytesIO(encoded)) as image:
        mode, kind = image.mode, str(image.format)
        if mode in ("L", "LA", "1"):
            found.append("grey: repeated over the channels")
        if mode in ("CMYK", "YCCK"):
            found.append("CMYK: turned to RGB")
        if _is_deep(mode):
            found.append("16-bit: scaled to 8 bits")
        if mode in ("P", "PA"):
            found.append("palette: turned to RGB")
        if image.has_transparency_data:
            found.append("transparent: laid on white")
        if getattr(image, "n_frames", 1) > 1 and kind != "MPO":
            found.append("animated: only its first frame is used")
        if _orientation(image) > 1:
            found.append("turned by EXIF: set upright")
        if max(image.size) > _LONG * min(image.size):
            what = "a centre crop keeps its middle only, stretching distorts it"
            found.append(f"longer than {_LONG} times its shorter side: {what}")
        suffix = name.rsplit(".", 1)[-1].lower() if "." in name else ""
        if suffix and kind in _SUFFIXES and suffix not in _SUFFIXES[kind]:
            found.append(f"suffix .{suffix} but {kind}: read as {kind}")
    return found


def _is_plain_jpeg(image: Image.Image, encoded: bytes) -> bool:
    """Whether OpenCV may decode it: that is faster, but fills up what is missing of a truncated file without a word,
    and has its own idea of CMYK."""
    complete = encoded.rstrip(b"\x00").endswith(_END_OF_JPEG)
    return image.format == "JPEG" and image.mode in ("RGB", "L") and complete


def _decode_jpeg(encoded: bytes, channels: int) -> np.ndarray:
    flags = cv2.IMREAD_COLOR_RGB if channels == 3 else cv2.IMREAD_GRAYSCALE
    pixels: np.ndarray | None = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    if pixels is None:
        raise ValueError("broken JPEG data")
    return pixels


def _to_channels(image: Image.Image, channels: int) -> Image.Image:
    image.load()
    orientation = _orientation(image)
    if _is_deep(image.mode):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, _BACKGROUND)
        image = Image.alpha_composite(ground, image)
    if orientation > 1:
        # Only what was decoded is turned; the tag travels with the file's own Image object.
        image.getexif()[_ORIENTATION] = orientation
        image = ImageOps.exif_transpose(image)
    return image.convert("L" if channels == 1 else "RGB")


def _is_deep(mode: str) -> bool:
    return mode == "I" or mode.startswith("I;16")


def _orientation(image: Image.Image) -> int:
    try:
        value: Any = image.getexif().get(_ORIENTATION, 1)
        return value if value in range(1, 9) else 1
    except Exception:  # A broken EXIF block says nothing about the pixels.
        return 1


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no picture in a known format"
    return " ".join(str(error).split())[:200] or type(error).__name__
