"""What a source of images is: a sequence of (encoded bytes, label) with class names.

Sources travel to loader processes by pickle, and open their files there.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from sit_jax.errors import ImageDecodeError, UserError, one_line


class Example(NamedTuple):
    """One image as it is stored.

    Attributes:
        image: Encoded bytes (PNG, JPEG).
        label: Class index; -1 where no class is right.
        name: File or record that it came from, for messages.
        labels: All right classes where a source has `multi_label`; else empty.
    """

    image: bytes
    label: int
    name: str = "picture"
    labels: tuple[int, ...] = ()


def read_picture(path: str, label: int = -1, name: str = "") -> Example:
    """Reads an image's file.

    Args:
        path: The file.
        label: Its class index; -1 if unknown.
        name: What messages call it; the path if empty.

    Raises:
        ImageDecodeError: The file cannot be read, whatever the reason.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            os.set_blocking(file.fileno(), True)
            return Example(file.read(), label, name or path)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte in it.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ImageDecodeError(f"{name or path}: cannot be read: {reason}") from None


def _open_at_once(path: str, flags: int) -> int:
    """Opens a pipe that nothing writes to, too, instead of waiting for a writer; such a pipe is empty."""
    return os.open(path, flags | os.O_NONBLOCK)


class Source(Protocol):
    """Random access to a split of a data set.

    Attributes:
        class_names: Names of the classes, by index.
        multi_label: Whether several classes, or none, may be right.
    """

    class_names: Sequence[str]
    multi_label: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """The stored image; raises a ImageDecodeError if only this one cannot be read, else a UserError."""
        ...


@contextlib.contextmanager
def writing(place: object, key: str = "") -> Iterator[None]:
    """Turns what a full disk or a folder without permission raises into a UserError that names the place.

    Args:
        place: What is written.
        key: The configuration's key or the option that names it, if any.
    """
    prefix = f"{key}: " if key else ""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # Not the file system: a download that failed.
            reason = one_line(error)
            raise UserError(f"{prefix}{place} cannot be prepared: {type(error).__name__}: {reason}") from None
        raise UserError(f"{prefix}{place} cannot be written: {error.strerror or error}") from None
    except RuntimeError as error:
        # The ArrayRecord writer is C++ and says so in its own way.
        match = re.search(r"(?:write|open|close|flush)\(\) failed: ([^;]+)", str(error))
        if match is None:
            raise
        raise UserError(f"{prefix}{place} cannot be written: {match[1]}") from None
