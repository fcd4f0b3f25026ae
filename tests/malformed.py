"""Image files: broken ones, and unusual ones that are fine."""

import gzip
import io
import struct
import zlib

import images
import numpy as np
import skimage.data
from PIL import Image

PHOTO = Image.fromarray(skimage.data.chelsea()).resize((90, 60))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """An image as a file of a format."""
    encoded = io.BytesIO()
    if kind == "JPEG":
        options.setdefault("quality", 95)
    image.save(encoded, kind, **options)
    return encoded.getvalue()


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size: tuple[int, int], bits: int, colour: int, rows: bytes, key: bytes = b"") -> bytes:
    """A PNG file, grey (`colour` 0) or RGB (2); each row begins with the byte of its filter, `key` is transparent."""
    header = _png_chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0))
    transparent = _png_chunk(b"tRNS", key) if key else b""
    data = _png_chunk(b"IDAT", zlib.compress(rows)) + _png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + transparent + data


def _huge_jpeg() -> bytes:
    start = JPEG.index(b"\xff\xc0")
    return JPEG[: start + 5] + struct.pack(">HH", 60000, 60000) + JPEG[start + 9 :]


JPEG = images.jpeg(np.asarray(PHOTO))
PNG = saved(PHOTO, "PNG")
GIF = saved(PHOTO.convert("P"), "GIF")
BMP = saved(PHOTO, "BMP")
TIFF = saved(PHOTO, "TIFF")
WEBP = saved(PHOTO, "WEBP", lossless=True)

# File name -> bytes that are not an image, or only a part of one.
BROKEN: dict[str, bytes] = {
    "empty.jpg": b"",
    "text.jpg": b"not a picture at all, but a note to myself",
    "jpeg_half.jpg": JPEG[: len(JPEG) // 2],
    "jpeg_without_end.jpg": JPEG[:-200],
    "jpeg_tables_gone.jpg": JPEG[:2] + JPEG[JPEG.index(b"\xff\xda") :],
    "jpeg_huge_header.jpg": _huge_jpeg(),
    "png_half.png": PNG[: len(PNG) // 2],
    "png_huge_header.png": png((50000, 50000), 8, 2, b"x"),
    "png_bad_checksum.png": PNG[:20] + bytes([PNG[20] ^ 255]) + PNG[21:],
    "png_bad_data.png": PNG[:60] + bytes(len(PNG) - 120) + PNG[-60:],
    "gif_half.gif": GIF[: len(GIF) // 2],
    "bmp_half.bmp": BMP[: len(BMP) // 2],
    "tiff_half.tif": TIFF[: len(TIFF) // 2],
    "webp_half.webp": WEBP[: len(WEBP) // 2],
    "float.tif": saved(Image.fromarray(np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)), "TIFF"),
    "int32.tif": saved(Image.fromarray(np.arange(600, dtype=np.int32).reshape(20, 30) % 256), "TIFF"),
}


# What is in place of an image or of weights -> its first bytes, and a word of the message.
FOREIGN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
    "page": (b"\n<!DOCTYPE html><html><head>404</head></html>", "web page"),
    "heic": (struct.pack(">I", 24) + b"ftypmif1" + bytes(4) + b"mif1heic" + bytes(200), "HEIC"),
    "gzip": (gzip.compress(b"weights"), "gzip"),
    "postscript": (saved(PHOTO, "EPS"), "PostScript"),
}


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def _png_with(kind: bytes, data: bytes) -> bytes:
    return PNG[:33] + _png_chunk(kind, data) + PNG[33:]


_MIDDLE = len(JPEG) // 2
_DEEP = (np.asarray(PHOTO.convert("L"), np.uint16) << 8) + 77

_SUFFIXES = {"jfif": "JPEG", "avif": "AVIF", "jp2": "JPEG2000", "ppm": "PPM", "tga": "TGA", "apng": "PNG"}
# File name -> bytes that are an image, and a word of what `sit data check` says of it (empty: nothing).
ODD: dict[str, tuple[bytes, str]] = {
    "plain.jpg": (JPEG, ""),
    "plain.png": (PNG, ""),
    "grey.jpg": (saved(PHOTO.convert("L"), "JPEG"), "grey"),
    "cmyk.jpg": (saved(PHOTO.convert("CMYK"), "JPEG"), "CMYK"),
    "deep.png": (saved(Image.fromarray(_DEEP), "PNG"), "16-bit"),
    "palette.png": (saved(PHOTO.convert("P"), "PNG"), "palette"),
    "palette_transparent.png": (saved(PHOTO.convert("P"), "PNG", transparency=bytes(range(256))), "transparent"),
    "alpha.png": (saved(PHOTO.convert("RGBA"), "PNG"), "transparent"),
    "animated.gif": (saved(PHOTO, "GIF", save_all=True, append_images=[PHOTO.rotate(90)]), "animated"),
    "jpeg_called.png": (JPEG, "suffix"),
    "turned.jpg": (saved(PHOTO, "JPEG", exif=_exif(6)), "EXIF"),
    "bad_orientation.jpg": (saved(PHOTO, "JPEG", exif=_exif(77)), ""),
    "bad_exif.jpg": (saved(PHOTO, "JPEG", exif=b"Exif\x00\x00" + b"\xff" * 40), "damaged EXIF"),
    "cut_exif.jpg": (saved(PHOTO, "JPEG", exif=_exif(6)[:-6]), "damaged EXIF"),
    "early_end.jpg": (JPEG[:_MIDDLE] + b"\xff\xd9", "damaged JPEG"),
    "damaged.jpg": (JPEG[:_MIDDLE] + bytes(400) + JPEG[_MIDDLE + 400 :], "damaged JPEG"),
    "twice.jpg": (JPEG + JPEG, ""),
    "progressive.jpg": (saved(PHOTO, "JPEG", progressive=True), ""),
    "restarts.jpg": (saved(PHOTO, "JPEG", restart_marker_rows=1), ""),
    "long_text.png": (_png_with(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3_000_000))), ""),
    "long_profile.png": (_png_with(b"iCCP", b"icc\0\0" + zlib.compress(bytes(3_000_000))), ""),
    "12_in_16.png": (saved(Image.fromarray(_DEEP >> 4), "PNG"), "dark"),
    "bad_icc.jpg": (saved(PHOTO, "JPEG", icc_profile=b"\x00garbage" * 30), ""),
    "one_pixel.png": (saved(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"), ""),
    "line.jpg": (saved(Image.new("RGB", (500, 1), (200, 100, 50)), "JPEG"), "longer"),
    "trailing_zeros.jpg": (JPEG + bytes(64), ""),
    "trailing_text.jpg": (JPEG + b"notes", ""),
    "web.webp": (WEBP, ""),
    **{f"photo.{suffix}": (saved(PHOTO, kind), "") for suffix, kind in _SUFFIXES.items()},
}
