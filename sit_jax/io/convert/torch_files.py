"""Reads the `.pth` files of `torch.save`, in the zip format and the legacy format, without PyTorch."""

import io
import math
import pathlib
import struct
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sit_jax.io.convert.pickles import PickleError, Rebuilt, Storage, read_pickle
from sit_jax.io.convert.tensors import BFLOAT16, FileError, Tensor, check_axes

# The first value of the legacy format, and the version that follows it.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001

# The fixed part of a local file header in a zip file; the name and the extra field follow it.
_LOCAL_HEADER = struct.Struct("<4s22xHH")

_ELEMENTS = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": BFLOAT16,
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


class _Place(NamedTuple):
    """Location of a storage's bytes in the file."""

    start: int
    nbytes: int


class TorchFile(NamedTuple):
    """The contents of a file.

    Attributes:
        value: The saved value, with tensors as `Rebuilt`.
        tensor: Makes a named `Rebuilt` readable; raises a FileError if it is not within the file.
    """

    value: Any
    tensor: Callable[[str, Rebuilt], Tensor]


def read_torch(path: pathlib.Path) -> TorchFile:
    """Reads a file of `torch.save`; tensor data are read lazily.

    Raises:
        FileError: The file is damaged, of another format or byte order, or contains objects other than tensors and
            plain values.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
            read = _read_zip if start == b"PK\x03\x04" else _read_legacy
            value, places = read(file, path.stat().st_size)
    except PickleError as error:
        raise FileError(f"{path}: {error}") from None
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, struct.error, ValueError, KeyError) as error:
        raise FileError(f"{path}: is damaged or cut off: {error}") from None
    return TorchFile(value, lambda name, rebuilt: _tensor(path, name, rebuilt, places))


def _read_zip(file: BinaryIO, size: int) -> tuple[Any, dict[str, _Place]]:
    places: dict[str, _Place] = {}
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        programs = [name for name in entries if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(programs) != 1:
            raise PickleError("is a zip file, but none that torch.save wrote: it has no data.pkl")
        root = programs[0].removesuffix("data.pkl")
        # torch.save does not compress, so no entry can be larger than the file.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise PickleError("is a zip file, but none that torch.save wrote: it is compressed")
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            raise PickleError("was written by a big-endian machine; save it anew on another one")
        value = read_pickle(io.BytesIO(archive.read(programs[0])))
        for name, entry in entries.items():
            if name.startswith(f"{root}data/"):
                places[name.removeprefix(f"{root}data/")] = _entry_place(file, entry, size)
    return value, places


def _entry_place(file: BinaryIO, entry: zipfile.ZipInfo, size: int) -> _Place:
    file.seek(entry.header_offset)
    signature, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if signature != b"PK\x03\x04":
        raise PickleError("is damaged or cut off: an entry of the zip file is not where it should be")
    place = _Place(entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length, entry.file_size)
    if place.start + place.nbytes > size:
        raise PickleError("is damaged or cut off: a storage ends behind the end of the file")
    return place


class _Bounded:
    """A file whose `read` never requests more memory than the size of the file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self.readline, self.tell = file.readline, file.tell

    def read(self, count: int) -> bytes:
        return self._file.read(max(0, min(count, self._size - self._file.tell())))


def _read_legacy(file: BinaryIO, size: int) -> tuple[Any, dict[str, _Place]]:
    """Reads the legacy format: five pickles, then the length and bytes of each storage."""
    file.seek(0)
    bounded: Any = _Bounded(file, size)
    try:
        magic = read_pickle(bounded)
    except PickleError as error:
        if "would run code" in str(error):
            raise
        raise PickleError("is no file that torch.save wrote") from None
    if magic != _LEGACY_MAGIC:
        raise PickleError("is a pickle, but none that torch.save wrote; save it anew with torch.save")
    version, system = read_pickle(bounded), read_pickle(bounded)
    if version != _LEGACY_VERSION or not isinstance(system, dict):
        raise PickleError("is of a version of torch.save's old format that nobody wrote")
    if system.get("little_endian") is not True:
        raise PickleError("was written by a big-endian machine; save it anew on another one")
    value, keys = read_pickle(bounded), read_pickle(bounded)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise PickleError("is damaged: its list of storages is none")
    kinds = _element_sizes(value)
    places: dict[str, _Place] = {}
    for key in keys:
        (count,) = struct.unpack("<q", bounded.read(8))
        place = _Place(file.tell(), count * kinds.get(key, 0))
        if count < 0 or place.start + place.nbytes > size or key not in kinds:
            raise PickleError("is damaged or cut off: a storage ends behind the end of the file")
        places[key] = place
        file.seek(place.start + place.nbytes)
    return value, places


def _element_sizes(value: Any) -> dict[str, int]:
    """Returns storage key -> bytes per element, for all tensors in a value; each container is visited once."""
    sizes: dict[str, int] = {}
    waiting, seen = [value], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, Rebuilt | Storage):
            storage = item.storage if isinstance(item, Rebuilt) else item
            sizes[storage.key] = _element(storage).itemsize
        elif isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            waiting += item.values() if isinstance(item, dict) else item
    return sizes


def _element(storage: Storage) -> np.dtype:
    if storage.kind not in _ELEMENTS:
        raise PickleError(f"holds tensors of a {storage.kind}, which no weights of a model are")
    return _ELEMENTS[storage.kind]


def _tensor(path: pathlib.Path, name: str, rebuilt: Rebuilt, places: dict[str, _Place]) -> Tensor:
    storage, offset, shape, strides = rebuilt
    check_axes(path, name, shape)
    try:
        dtype = _element(storage)
    except PickleError as error:
        raise FileError(f"{path}: {error}") from None
    place = places.get(storage.key, _Place(0, 0))
    count = math.prod(shape)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    available = min(place.nbytes // dtype.itemsize, storage.elements)
    if offset + extent > available or count > available:
        raise FileError(f"{path}: is damaged or cut off: a tensor of shape {shape} does not lie within its storage")

    def read() -> np.ndarray:
        start = place.start + offset * dtype.itemsize
        with path.open("rb") as file:
            file.seek(start)
            flat = np.empty(extent, dtype)
            if file.readinto(flat.view(np.uint8).data) != flat.nbytes:
                raise FileError(f"{path}: is cut off")
        if count == extent and strides == _row_major(shape):
            return flat.reshape(shape)
        # The stride of an axis of length one is never used, so it may be any number.
        steps = tuple(stride * dtype.itemsize * (size > 1) for size, stride in zip(shape, strides, strict=True))
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False))

    return Tensor(shape, dtype, read)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
