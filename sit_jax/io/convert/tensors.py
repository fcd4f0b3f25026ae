"""Tensors that lie in a file until they are wanted."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable

import ml_dtypes
import numpy as np

from sit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file: what it is, and how to get it.

    Attributes:
        shape: Its shape.
        dtype: The type of its elements.
        read: Reads it; a fresh array, or a view of the file, in row-major order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Its size in bytes, by its shape."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_float(self) -> bool:
        """Whether its elements are floating-point numbers, bfloat16 included."""
        return self.dtype.kind == "f" or self.dtype == BFLOAT16


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

Tensors = dict[str, Tensor]


class FileError(UserError):
    """A file of weights cannot be read; the message names it and says why."""


_LONGEST_AXIS = 2**31


def check_axes(path: pathlib.Path, name: str, shape: Iterable[int]) -> None:
    """Raises a FileError where a tensor holds nothing, or an axis is longer than any of a model's.

    An axis of zero makes a tensor of no bytes, whatever the others claim. The claims are not repeated: they may have
    thousands of digits, which Python does not print.
    """
    if not all(0 < size <= _LONGEST_AXIS for size in shape):
        raise FileError(f"{path}: {name[:200]} claims an axis that is empty or longer than {_LONGEST_AXIS:,}")


def check_total(path: pathlib.Path, tensors: Tensors, most: int) -> None:
    """Raises a FileError where tensors claim more bytes than a file can hold: they lie on top of one another."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > most:
        raise FileError(f"{path}: claims {total:,} bytes of tensors, but cannot hold more than {most:,}")
