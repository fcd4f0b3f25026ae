"""Reads `.safetensors` and `.npz` files, tensor by tensor."""

import math
import pathlib
import tokenize
import warnings
import zipfile
import zlib
from typing import Any

import numpy as np
import safetensors

from sit_jax.errors import one_line
from sit_jax.io.convert.tensors import BFLOAT16, FileError, Tensor, Tensors, check_axes

_SAFETENSORS_TYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}

# Weights compress little, but zeros compress a thousandfold: a file that claims a larger ratio is rejected.
_MOST_COMPRESSED = 20
_SMALL = 2**26


def read_safetensors(path: pathlib.Path) -> Tensors:
    """Returns the tensors of a `.safetensors` file.

    Raises:
        FileError: The header does not match the file, or a tensor's type is not one of weights.
    """
    try:
        # The library checks the header against the file before it allocates memory.
        file: Any = safetensors.safe_open(path, "np")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        described = {name: (tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()}
    except (safetensors.SafetensorError, OSError, ValueError, TypeError) as error:
        raise FileError(f"{path}: is no whole safetensors file: {one_line(error, 200)}") from None
    unknown = sorted({kind for _, kind in described.values()} - set(_SAFETENSORS_TYPES))
    if unknown:
        raise FileError(f"{path}: holds tensors of type {', '.join(unknown)}, which no weights of a model are")

    def tensor(name: str) -> Tensor:
        shape, kind = described[name]
        check_axes(path, name, shape)
        return Tensor(shape, _SAFETENSORS_TYPES[kind], lambda: np.asarray(file.get_tensor(name)))

    return {name: tensor(name) for name in described}


def read_npz(path: pathlib.Path) -> Tensors:
    """Returns the arrays of a `.npz` file; pickled objects are rejected.

    Raises:
        FileError: The file is damaged, claims more than it can hold, or contains objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
            total = sum(entry.file_size for entry in entries)
            if total > max(_SMALL, _MOST_COMPRESSED * path.stat().st_size):
                raise FileError(
                    f"{path}: claims {total:,} bytes of arrays, which cannot be weights of this file's size"
                )
            return {entry.filename.removesuffix(".npy"): _npz_tensor(path, archive, entry) for entry in entries}
    except FileError:
        raise
    except (*_ZIP_ERRORS, *_HEADER_ERRORS) as error:
        raise FileError(f"{path}: is damaged or cut off: {one_line(error, 200)}") from None


_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError)
# Message of Python's parser, with which NumPy reads array headers, for an invalid header.
_HEADER_ERRORS = (ValueError, TypeError, KeyError, SyntaxError, tokenize.TokenError, MemoryError)


def _npz_tensor(path: pathlib.Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Tensor:
    name = entry.filename.removesuffix(".npy")
    with archive.open(entry) as file, warnings.catch_warnings():
        # Of headers written by Python 2.
        warnings.simplefilter("ignore")
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(file)
        header = file.tell()
    if dtype.hasobject:
        raise FileError(f"{path}: {name} holds Python objects, which would run code; only plain arrays are read")
    if dtype.kind not in "fiub" and dtype != np.dtype("V2"):
        raise FileError(f"{path}: {name} is of type {dtype}, which no weights of a model are")
    if dtype == np.dtype("V2"):
        # How NumPy saves types that it does not know, such as JAX's bfloat16.
        dtype = BFLOAT16
    check_axes(path, name, shape)
    if math.prod(shape) * dtype.itemsize + header != entry.file_size:
        raise FileError(f"{path}: {name} claims shape {shape}, but its size is another one")

    def read() -> np.ndarray:
        try:
            with zipfile.ZipFile(path) as archive, archive.open(entry) as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return (
                    np.ascontiguousarray(np.lib.format.read_array(file, allow_pickle=False)).reshape(shape).view(dtype)
                )
        except (*_ZIP_ERRORS, *_HEADER_ERRORS) as error:
            raise FileError(f"{path}: {name} is damaged: {one_line(error, 200)}") from None

    return Tensor(tuple(shape), dtype, read)
