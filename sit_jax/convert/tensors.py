"""Tensors that lie in a file until they are wanted."""

import dataclasses
import math
import pathlib
from collections.abc import Callable

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


def check_total(path: pathlib.Path, tensors: Tensors, most: int) -> None:
    """Raises a FileError where tensors claim more bytes than a file can hold: they lie on top of one another."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > most:
        raise FileError(f"{path}: claims {total:,} bytes of tensors, but cannot hold more than {most:,}")
