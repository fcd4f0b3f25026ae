"""Reads and writes `.safetensors` files, tensor by tensor."""

import json
import pathlib
from collections.abc import Mapping

import ml_dtypes  # noqa: F401 (gives NumPy the type bfloat16, which safetensors asks it for)
import numpy as np
import safetensors

from sit_jax.errors import listed, one_line
from sit_jax.io.convert.tensors import FileError, Tensor, Tensors, unreadable
from sit_jax.io.runs import read_object

# The types that the library reads as NumPy arrays.
_NAMES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32"},
    **{"int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"},
}


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
    unknown = sorted(set(types.values()) - set(_NAMES.values()))
    if unknown:
        raise FileError(f"{path}: holds tensors of type {', '.join(unknown)}, which are not read from such files")

    def tensor(name: str) -> Tensor:
        is_float = types[name].startswith(("F", "BF"))
        return Tensor(tuple(slices[name].get_shape()), is_float, lambda: file.get_tensor(name))

    return {name: tensor(name) for name in slices}


def read_sharded(index: pathlib.Path) -> Tensors:
    """Returns the tensors of the shards that a `model.safetensors.index.json` lists.

    Raises a UserError if the index is not valid, names a file outside of its folder, or a shard or a tensor is missing.
    """
    names = read_object(index).get("weight_map")
    if not names or not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
        raise FileError(f"{index}: weight_map must map names of tensors to files")
    found: Tensors = {}
    for shard in sorted(set(names.values())):
        if pathlib.PurePath(shard).name != shard:
            raise FileError(f"{index}: {shard[:100]!r} is not a file of this folder")
        if not (index.parent / shard).is_file():
            raise FileError(f"{index}: the shard {shard[:100]} is missing")
        tensors = read_safetensors(index.parent / shard)
        missing = sorted(name for name, where in names.items() if where == shard and name not in tensors)
        if missing:
            raise FileError(f"{index}: the shard {shard[:100]} lacks {listed(missing, most=8)}")
        found |= {name: tensor for name, tensor in tensors.items() if names.get(name, shard) == shard}
    return found


def write_safetensors(path: pathlib.Path, state_dict: Mapping[str, np.ndarray], same_types: bool = False) -> None:
    """Writes arrays as float32 tensors, and integers or with `same_types` all in their own types, one at a time."""
    # Not by the library: it takes contiguous arrays, and transposed views would all be copied before it begins.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    types = {
        name: array.dtype if same_types or array.dtype.kind == "i" else np.dtype(np.float32)
        for name, array in state_dict.items()
    }
    end = 0
    for name, array in state_dict.items():
        start, end = end, end + types[name].itemsize * array.size
        header[name] = {"dtype": _NAMES[types[name].name], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, array in state_dict.items():
            file.write(np.ascontiguousarray(array, types[name]).tobytes())
