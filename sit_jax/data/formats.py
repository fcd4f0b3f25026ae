"""Formats of image files, and what files are that are neither images nor weights."""

# Pillow's names of the formats that are read: pixels only, no PostScript or other programs. TGA is last: its files have
# no signature.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI", "ICO", "TGA")
# Suffixes, in lower case, of the images in a folder.
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
    | {".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".qoi", ".tga"}
)
# First bytes of a zip archive, as files of PyTorch and NumPy are.
ZIP = b"PK\x03\x04"
# Number of bytes that `identify` needs.
START = 512

_PAGE = "is a web page: download the file again"
_SIGNATURES = (
    (b"version https://git-lfs.github.com", "is a Git LFS pointer, not the file itself: run git lfs pull"),
    (b"<!doctype html", _PAGE),
    (b"<html", _PAGE),
    (b"<svg", "is an SVG drawing: convert it to PNG"),
    (b"<?xml", "is XML, such as an SVG drawing: convert it to PNG, or download the file again"),
    (b"%pdf", "is a PDF file: convert it to PNG"),
    (b"%!ps", "is a PostScript file: convert it to PNG"),
    (ZIP.lower(), "is a zip archive: unpack it"),
    (b"\x1f\x8b", "is compressed with gzip: unpack it"),
)
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")


def identify(start: bytes) -> str:
    """Returns what a file that cannot be read is, and what to do, by its first `START` bytes; empty if unknown."""
    if not start:
        return "is empty"
    brands = start[8 : int.from_bytes(start[:4])] if start[4:8] == b"ftyp" else b""
    if any(brand in brands for brand in _HEIC):
        return "is a HEIC image, which is not read: convert it to JPEG"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((what for signature, what in _SIGNATURES if text.startswith(signature)), "")
