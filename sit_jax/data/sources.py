"""Image sources: sequences of (encoded bytes, label) with class names.

Sources are pickled to loader processes and open their files there.
"""

import codecs
import contextlib
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, TextIO

import numpy as np
from jaxtyping import Int

from sit_jax.errors import ImageDecodeError, UserError, one_line

# One transformed example; numbers are arrays of shape ().
ExampleArrays = dict[str, np.ndarray]


class Example(NamedTuple):
    """One stored image: encoded bytes (PNG, JPEG), class index (-1 if no class is correct), and its name for messages.

    `labels` has all correct classes if the source has `multi_label`; it is empty otherwise.
    """

    image: bytes
    label: int
    name: str = "image"
    labels: tuple[int, ...] = ()


def read_image(path: str, label: int = -1, name: str = "") -> Example:
    """Reads an image file; raises an ImageDecodeError with `name`, or the path, if that is not possible."""
    try:
        # Opened without blocking: a pipe without a writer is read as empty.
        with open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            os.set_blocking(file.fileno(), True)
            return Example(file.read(), label, name or path)
    except (OSError, ValueError) as error:  # ValueError: the path contains a null byte.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ImageDecodeError(f"{name or path}: cannot be read: {reason}") from None


# The former name, which users' programs import.
read_picture = read_image


def read_lines(file: TextIO) -> Iterator[str]:
    """Yields the lines of a list of files, encoded as file names are, or as a byte order mark says (UTF-8, UTF-16)."""
    encoded = file.buffer.read()
    is_utf16 = encoded.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = encoded.decode("utf-16", "replace") if is_utf16 else os.fsdecode(encoded.removeprefix(codecs.BOM_UTF8))
    yield from text.split("\n")


def nfc(name: str) -> str:
    """Returns a name in the Unicode form NFC; macOS stores names in another form, which looks the same."""
    return unicodedata.normalize("NFC", name)


class Source(Protocol):
    """Random access to a split of a data set.

    Attributes:
        class_names: Names of the classes, by index.
        multi_label: Whether an image may have several correct classes, or none.
    """

    class_names: Sequence[str]
    multi_label: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Returns the stored image; raises an ImageDecodeError if only this one cannot be read, else a UserError."""
        ...


def evenly_spread(total: int, count: int) -> Int[np.ndarray, " chosen"]:
    """Returns up to `count` indices below `total`, evenly spread, from the first to the last."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int))


@contextlib.contextmanager
def writing(place: object, key: str = "") -> Iterator[None]:
    """Converts the errors of a full disk or a missing permission to a UserError that names the place, and its key."""
    prefix = f"{key}: " if key else ""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # Not a file system error, but a failed download.
            reason = one_line(error)
            raise UserError(f"{prefix}{place} cannot be prepared: {type(error).__name__}: {reason}") from None
        raise UserError(f"{prefix}{place} cannot be written: {error.strerror or error}") from None
    except RuntimeError as error:
        # The ArrayRecord writer is C++ and has its own messages.
        match = re.search(r"(?:write|open|close|flush)\(\) failed: ([^;]+)", str(error))
        if match is None:
            raise
        raise UserError(f"{prefix}{place} cannot be written: {match[1]}") from None
