"""Reads and writes `.safetensors` files, tensor by tensor."""

import json
import pathlib
from collections.abc import Mapping

import ml_dtypes  # noqa: F401 (gives NumPy the type bfloat16, which safetensors asks it for)
import numpy as np
import safetensors

from sit_jax.errors import one_line
from sit_jax.io.convert.tensors import FileError, Tensor, Tensors, unreadable

# The types that the library reads as NumPy arrays.
_TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


def read_safetensors(path: pathlib.Path) -> Tensors:
    """Returns the tensors of a `.safetensors` file.

    Raises a FileError if the header does not match the file, or a tensor's type is not one of weights.
    """
    try:
        # The library checks the header against the file before it allocates memory.
        file = safetensors.safe_open(path, "np")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (safetensors.SafetensorError, OSError, ValueError, TypeError) as error:
        raise unreadable(path, f"is not a whole safetensors file: {one_line(error, 200)}") from None
    types = {name: str(part.get_dtype()) for name, part in slices.items()}
    unknown = sorted(set(types.values()) - set(_TYPES))
    if unknown:
        raise FileError(f"{path}: holds tensors of type {', '.join(unknown)}, which are not read from such files")

    def tensor(name: str) -> Tensor:
        is_float = types[name].startswith(("F", "BF"))
        return Tensor(tuple(slices[name].get_shape()), is_float, lambda: file.get_tensor(name))

    return {name: tensor(name) for name in slices}


def write_safetensors(path: pathlib.Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as float32 tensors, one at a time."""
    # Not by the library: it takes contiguous arrays, and transposed views would all be copied before it begins.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in state_dict.items():
        start, end = end, end + 4 * array.size
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in state_dict.values():
            file.write(np.ascontiguousarray(array, "<f4").data)
