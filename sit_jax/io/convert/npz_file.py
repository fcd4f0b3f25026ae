"""Reads `.npz` files, array by array."""

import math
import pathlib
import tokenize
import warnings
import zipfile
import zlib

import ml_dtypes
import numpy as np

from sit_jax.errors import one_line
from sit_jax.io.convert.tensors import FileError, Tensor, Tensors, check_total, unreadable

# Message of Python's parser, with which NumPy reads array headers, for an invalid header.
_HEADER_ERRORS = (ValueError, TypeError, KeyError, SyntaxError, tokenize.TokenError, MemoryError)
_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError, *_HEADER_ERRORS)


def read_npz(path: pathlib.Path) -> Tensors:
    """Returns the arrays of a `.npz` file.

    Raises a FileError if the file is damaged, claims more than it can hold, or contains pickled objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
            check_total(path, sum(entry.file_size for entry in entries))
            return {entry.filename.removesuffix(".npy"): _tensor(path, archive, entry) for entry in entries}
    except _ERRORS as error:
        raise unreadable(path, f"is damaged or cut off: {one_line(error, 200)}", zipped=True) from None


def _tensor(path: pathlib.Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Tensor:
    name = entry.filename.removesuffix(".npy")
    with archive.open(entry) as file, warnings.catch_warnings(action="ignore"):  # Of headers written by Python 2.
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(file)
        header = file.tell()
    if dtype.hasobject:
        raise FileError(f"{path}: {name} holds Python objects, which would run code; only plain arrays are read")
    # NumPy saves types that it does not know as bytes; the one of two bytes is JAX's bfloat16.
    is_bfloat16 = dtype == np.dtype("V2")
    if dtype.kind not in "fiub" and not is_bfloat16:
        raise FileError(f"{path}: {name} is of type {dtype}, which no weights of a model are")
    if math.prod(shape) * dtype.itemsize + header != entry.file_size:
        raise FileError(f"{path}: {name} claims shape {shape}, but its size is another one")

    def read() -> np.ndarray:
        try:
            with (
                zipfile.ZipFile(path) as archive,
                archive.open(entry) as file,
                warnings.catch_warnings(action="ignore"),
            ):
                array = np.lib.format.read_array(file, allow_pickle=False)
        except _ERRORS as error:
            raise FileError(f"{path}: {name} is damaged: {one_line(error, 200)}") from None
        return array.view(ml_dtypes.bfloat16) if is_bfloat16 else array

    return Tensor(tuple(shape), is_bfloat16 or dtype.kind == "f", read)
