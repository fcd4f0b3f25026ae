"""Lazily read tensors of a file."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable

import ml_dtypes
import numpy as np

from sit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file, with its shape, type and reader.

    Attributes:
        shape: Its shape.
        dtype: Type of its elements.
        read: Reads the tensor; returns a new array, or a view of the file, in row-major order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size in bytes, by its shape."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_float(self) -> bool:
        """Whether its elements are floating-point numbers, including bfloat16."""
        return self.dtype.kind == "f" or self.dtype == BFLOAT16


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

Tensors = dict[str, Tensor]


class FileError(UserError):
    """A file of weights cannot be read; the message names the file and the reason."""


_LONGEST_AXIS = 2**31


def check_axes(path: pathlib.Path, name: str, shape: Iterable[int]) -> None:
    """Raises a FileError if a tensor is empty, or an axis is longer than that of any model.

    An axis of zero makes a tensor of no bytes, whatever the other axes are. The message does not repeat the sizes: they
    may have thousands of digits, which Python does not print.
    """
    if not all(0 < size <= _LONGEST_AXIS for size in shape):
        raise FileError(f"{path}: {name[:200]} claims an axis that is empty or longer than {_LONGEST_AXIS:,}")


def check_total(path: pathlib.Path, tensors: Tensors, most: int) -> None:
    """Raises a FileError if tensors claim more bytes than the file can hold, which means that they overlap."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > most:
        raise FileError(f"{path}: claims {total:,} bytes of tensors, but cannot hold more than {most:,}")
