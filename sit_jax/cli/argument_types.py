"""Types of command-line arguments, for `type=` of argparse."""

import argparse
import math
import pathlib
from collections.abc import Callable
from typing import Any


def _number(kind: type, name: str, valid: Callable[[float], bool], bounds: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {name}, got {text!r}") from None
        if not valid(value):
            raise argparse.ArgumentTypeError(f"must be {bounds.format(text)}")
        return value

    return parse


def integer(least: int, most: float = math.inf, hint: str = "") -> Callable[[str], int]:
    """The type of integers from `least` to `most`; `hint` is appended to the error message."""
    bounds = f"at least {least}" if most == math.inf else f"from {least} to {most}"
    return _number(int, "an integer", lambda value: least <= value <= most, f"{bounds}, got {{}}{hint}")


positive = integer(1)


def above_0(below: float) -> Callable[[str], float]:
    """The type of numbers above 0 and below a bound."""
    return _number(float, "a number", lambda value: 0 < value < below, f"above 0 and below {below:g}, got {{}}")


def folder(text: str) -> pathlib.Path:
    """A local folder, not the address of a bucket."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is not a folder; mount the bucket, as launch/README.md says")
    return pathlib.Path(text)
