"""Types of command-line arguments, for `type=` of argparse."""

import argparse
import math
import pathlib
from collections.abc import Callable


def integer(least: int, most: float = math.inf, hint: str = "") -> Callable[[str], int]:
    """The type of integers from `least` to `most`; `hint` is appended to the error message."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None
        if not least <= value <= most:
            bounds = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {value}{hint}")
        return value

    return parse


positive = integer(1)


def above_0(below: float) -> Callable[[str], float]:
    """The type of numbers above 0 and below a bound."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
        if not 0 < value < below:
            raise argparse.ArgumentTypeError(f"must be above 0 and below {below:g}, got {text}")
        return value

    return parse


def folder(text: str) -> pathlib.Path:
    """A local folder, not the address of a bucket."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is not a folder; mount the bucket, as launch/README.md says")
    return pathlib.Path(text)
