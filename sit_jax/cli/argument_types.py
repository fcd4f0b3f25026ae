"""Types of words on the command line, for argparse: a number, or one line that says what is wrong with it."""

import argparse
import pathlib
from collections.abc import Callable


def positive(text: str) -> int:
    """A whole number from 1 on."""
    value = _number(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, is {value}")
    return value


def between(least: int, most: int, hint: str = "") -> Callable[[str], int]:
    """The type of whole numbers within bounds; `hint` says where others find what they want."""

    def bounded(text: str) -> int:
        value = _number(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be from {least} to {most}, is {value}{hint and f'; {hint}'}")
        return value

    return bounded


def fraction(text: str) -> float:
    """A number above 0 and below 1."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, is {text!r}") from None
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and below 1, is {text}")
    return value


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, is {text!r}") from None


def folder(text: str) -> pathlib.Path:
    """A local folder, not the address of a bucket."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is no folder; mount the bucket, as launch/README.md says")
    return pathlib.Path(text)
