"""Reads the pickles of `torch.save` without PyTorch and without executing code.

A pickle is a program for a stack machine, and an ordinary unpickler imports and calls every name in it. Here, Python's
unpickler finds only what this module defines: a name maps to one of its constructors, or the file is rejected. A pickle
can put no other callable on the stack.
"""

import pickle
import warnings
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

from sit_jax.errors import UserError, one_line
from sit_jax.io.convert.pickle_names import DICTS, DTYPES, INERT, PARAMETERS, TENSORS

# Limit of reads: a checkpoint has some fifty opcodes per tensor, including the optimizer's, of one to three reads each.
_MOST_READS = 20_000_000


class Inert:
    """An unused value, represented by its name: `argparse.Namespace`, a NumPy scalar, a set.

    Calls and insertions are ignored.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def __call__(self, *_: object) -> "Inert":
        return self

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, item: object) -> None:
        """Ignores an item."""

    extend = append


class Storage(NamedTuple):
    """A tensor's storage, as the pickle describes it.

    Attributes:
        kind: The storage's class, such as `FloatStorage`, which determines the type of its elements.
        key: The name of its bytes in the file.
        elements: Its claimed number of elements (bytes, for an `UntypedStorage`).
    """

    kind: str
    key: str
    elements: int


class Rebuilt(NamedTuple):
    """A tensor, as the pickle describes it; not validated.

    Attributes:
        storage: The storage of its elements.
        offset: Index of its first element in the storage.
        shape: Its shape.
        strides: Its strides in elements.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class PickleError(UserError):
    """A pickle is damaged, or contains objects other than weights and plain values."""


def read_pickle(stream: BinaryIO) -> Any:
    """Reads one pickle.

    Args:
        stream: Positioned at the start of the pickle; afterwards, at its end. Its `read` must not allocate more memory
            than it has bytes, unlike that of `io.BytesIO`.

    Returns:
        The value: dictionaries with strings and numbers as keys, lists, tuples, plain values, `Rebuilt` tensors, and
        `Inert` for other values.

    Raises:
        PickleError: The pickle is damaged, or contains a name that is not allowed, which the message states.
    """
    try:
        with warnings.catch_warnings():
            # Raised for damaged text.
            warnings.simplefilter("ignore", DeprecationWarning)
            return _Unpickler(_Counted(stream), encoding="latin-1").load()
    except PickleError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, EOFError, pickle.PickleError) as error:
        raise PickleError(f"the pickle inside is damaged: {one_line(error, 200)}") from None


class _Counted:
    """A stream with a limited number of reads, so that an endless pickle ends."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._reads = stream, 0
        self.readline = stream.readline

    def read(self, count: int) -> bytes:
        self._reads += 1
        if self._reads > _MOST_READS:
            raise PickleError("the pickle inside goes on for ever")
        data = self._stream.read(count)
        if len(data) < count:
            raise EOFError("it is cut off")
        return data


class _Dict(dict[Any, Any]):
    """A dictionary that ignores keys other than names and numbers: hashing a nested tuple can take forever."""

    def __init__(self, *arguments: Any) -> None:
        """Takes the items of the first dictionary among the arguments of a call in the pickle."""
        super().__init__(next((x for x in arguments if isinstance(x, dict)), {}))

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, str | int | float):
            super().__setitem__(key, value)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Rebuilt:
    def sizes(values: Any) -> tuple[int, ...]:
        if not isinstance(values, tuple) or not all(type(value) is int and value >= 0 for value in values):
            raise PickleError("the pickle inside is damaged: a tensor's shape or strides are no whole numbers")
        return values

    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0:
        raise PickleError("the pickle inside is damaged: a tensor has no storage")
    if len(sizes(shape)) != len(sizes(strides)) or len(shape) > 8:
        raise PickleError("the pickle inside is damaged: a tensor's strides do not fit its shape")
    return Rebuilt(storage, offset, shape, strides)


def _parameter(tensor: Any, *_: Any) -> Rebuilt:
    if not isinstance(tensor, Rebuilt):
        raise PickleError("the pickle inside is damaged: a parameter is no tensor")
    return tensor


# The Python implementation: the C one has no table of opcodes, and allocates memory for any index of its memo.
_Base: Any = pickle._Unpickler


class _Unpickler(_Base):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        full = f"{module}.{name}"
        for names, builder in ((DICTS, _Dict), (TENSORS, _tensor), (PARAMETERS, _parameter)):
            if full in names:
                return builder
        module, _, name = full.rpartition(".")
        is_storage = module in ("torch", "torch.cuda", "torch.storage") and name.endswith("Storage")
        if is_storage or full in INERT | DTYPES or module == "numpy.dtypes":
            return Inert(full)
        raise PickleError(
            f"the pickle inside would run code: it names {full[:100]}; "
            "only tensors and plain values are read (torch.save(model.state_dict(), PATH) writes such a file)"
        )

    def persistent_load(self, pid: Any) -> Storage:
        """Returns the storage of a persistent id: `('storage', class, key, device, elements)`, in old files a view."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise PickleError("the pickle inside is damaged: a storage is not described")
        kind, key, count = pid[1], pid[2], pid[4]
        if not isinstance(kind, Inert) or not isinstance(key, str) or type(count) is not int or count < 0:
            raise PickleError("the pickle inside is damaged: a storage is not described")
        if len(pid) > 5 and pid[5] is not None:
            raise PickleError(
                "holds views of storages, as PyTorch before 0.4 wrote them; save it anew with a newer one"
            )
        return Storage(kind.name.rpartition(".")[2], key, count)

    def _dict_to_mark(self) -> None:
        items, found = self.pop_mark(), _Dict()
        for key, value in zip(items[::2], items[1::2], strict=True):
            found[key] = value
        self.append(found)

    def _build(self) -> None:
        """Sets the state of an object.

        Inert objects have no state, and dictionaries with attributes (PyTorch's `_metadata`) do not need it.
        """
        self.stack.pop()
        if not isinstance(self.stack[-1], Inert | dict):
            raise PickleError("the pickle inside would run code: it sets the state of an object")

    def _reduce_with_keywords(self) -> None:
        self.stack.pop()
        _Base.load_reduce(self)

    def _refuse(self) -> None:
        raise PickleError("the pickle inside uses an extension or a frozen set, which no weights need")

    dispatch: dict[int, Callable[[Any], Any]] = {  # noqa: RUF012 (as in the class below it)
        **_Base.dispatch,
        pickle.FRAME[0]: lambda self: self.read(8),  # The contents of the frame are read as usual.
        pickle.EMPTY_DICT[0]: lambda self: self.append(_Dict()),
        pickle.DICT[0]: _dict_to_mark,
        pickle.EMPTY_SET[0]: lambda self: self.append(Inert("set")),
        pickle.ADDITEMS[0]: lambda self: self.pop_mark(),
        pickle.BYTEARRAY8[0]: _Base.load_binbytes8,
        pickle.NEWOBJ[0]: _Base.load_reduce,
        pickle.NEWOBJ_EX[0]: _reduce_with_keywords,
        pickle.BUILD[0]: _build,
        **dict.fromkeys((pickle.EXT1[0], pickle.EXT2[0], pickle.EXT4[0], pickle.FROZENSET[0]), _refuse),
    }
