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

# Weights hardly compress; all zeros compress a thousandfold, and a file that claims to be made of them is a trap.
_MOST_COMPRESSED = 20
_SMALL = 2**26


def read_safetensors(path: pathlib.Path) -> Tensors:
    """The tensors of a `.safetensors` file.

    Raises:
        FileError: The header and the file do not agree, or the tensors are of a type that no weights are.
    """
    try:
        # The library checks the header against the file before it allocates anything.
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
    """The arrays of a `.npz` file; pickled objects are refused.

    Raises:
        FileError: The file is damaged, claims more than it can hold, or holds objects.
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
# What Python's own parser, which NumPy reads an array's header with, says of one that is none.
_HEADER_ERRORS = (ValueError, TypeError, KeyError, SyntaxError, tokenize.TokenError, MemoryError)


def _npz_tensor(path: pathlib.Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Tensor:
    name = entry.filename.removesuffix(".npy")
    with archive.open(entry) as file, warnings.catch_warnings():
        # Of headers that Python 2 wrote.
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
        # How NumPy saves a type that it does not know, which JAX's bfloat16 is.
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
