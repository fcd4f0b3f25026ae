"""Writes and reads safetensors files tensor by tensor, so that a model never lies in memory twice."""

import json
import math
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from sit_jax.errors import UserError

_ALIGNMENT = 8


class Tensor(NamedTuple):
    """A tensor to write, made when its turn comes.

    Attributes:
        name: Its key.
        array: Its values; float32.
    """

    name: str
    array: np.ndarray


def write(path: pathlib.Path, shapes: dict[str, tuple[int, ...]], tensors: Iterable[Tensor]) -> None:
    """Writes float32 tensors.

    The library's own writer holds a copy of all of them, and scrambles arrays that are not contiguous.

    Args:
        path: The file.
        shapes: Key -> shape, in the order of `tensors`.
        tensors: One at a time.

    Raises:
        OSError: The file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor, (name, shape) in zip(tensors, shapes.items(), strict=True):
            assert (tensor.name, tensor.array.shape) == (name, shape), tensor.name
            file.write(np.ascontiguousarray(tensor.array, "<f4").data)


def read(path: pathlib.Path, shapes: dict[str, tuple[int, ...]]) -> Iterator[Tensor]:
    """Reads tensors that are all expected and all there; their names and shapes are checked before anything is read.

    Raises:
        UserError: The file is missing or damaged, a tensor is missing, left over, of another shape or type, or holds
            values that are not finite.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            _check(path, file, shapes)
            for name in shapes:
                array = file.get_tensor(name)
                if not np.isfinite(array).all():
                    raise UserError(f"{path}: {name} holds values that are not finite")
                yield Tensor(name, array)
    except (SafetensorError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read: {reason}") from None


def keys(path: pathlib.Path) -> list[str]:
    """The names of a file's tensors.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read: {reason}") from None


def _check(path: pathlib.Path, file: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    present = set(file.keys())
    missing, extra = sorted(shapes.keys() - present), sorted(present - shapes.keys())
    problems = [f"missing {_listed(missing)}"] if missing else []
    problems += [f"left over {_listed(extra)}"] if extra else []
    if problems:
        raise UserError(f"{path}: holds the weights of another model: {', '.join(problems)}")
    for name, shape in shapes.items():
        part = file.get_slice(name)
        found = tuple(part.get_shape())
        if found != shape:
            raise UserError(f"{path}: {name} has the shape {found}, the model's is {shape}")
        if part.get_dtype() != "F32":
            raise UserError(f"{path}: {name} is {part.get_dtype()}; a model folder holds float32 (F32)")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
