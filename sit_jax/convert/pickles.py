"""Reads what `torch.save` pickles, without PyTorch and without running anything.

A pickle is a program for a small stack machine, and an ordinary unpickler runs whatever it names. The machine here
knows plain values, containers and the few names that tensors are written with. It imports and calls nothing: a name
becomes a constructor of ours, or the file is refused.
"""

import pickletools
import warnings
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

from sit_jax.convert.pickle_names import DICTS, DTYPES, INERT, PARAMETERS, TENSORS
from sit_jax.errors import UserError

# Opcodes in a checkpoint: some fifty per tensor, the optimizer's included. Ten million are a minute's work.
_MOST_OPCODES = 10_000_000


class Inert:
    """A value that is of no use here, kept as what it is called: `argparse.Namespace`, a NumPy scalar, a device."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}>"


class Storage(NamedTuple):
    """A tensor's memory, as the pickle names it.

    Attributes:
        kind: The storage's class, such as `FloatStorage`, which says the type of its elements.
        key: The name of its bytes in the file.
        elements: How many elements it claims to hold (bytes, for an `UntypedStorage`).
    """

    kind: str
    key: str
    elements: int


class Rebuilt(NamedTuple):
    """A tensor, as the pickle describes it: nothing of it is checked yet.

    Attributes:
        storage: Where its elements lie.
        offset: Its first element in the storage.
        shape: Its shape.
        strides: Its strides in elements.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class PickleError(UserError):
    """A pickle holds something else than weights and plain values, or is damaged."""


def read_pickle(stream: BinaryIO) -> Any:
    """Reads one pickle.

    Args:
        stream: Where it begins; left standing behind it. It must not give more memory for a `read` than it has bytes,
            as `io.BytesIO` does not.

    Returns:
        The value: dictionaries with strings and numbers for keys, lists, tuples, plain values, `Rebuilt` tensors, and
        `Inert` for the rest.

    Raises:
        PickleError: It is damaged, or names anything that is not on the list; the message has the name.
    """
    machine = _Machine()
    try:
        with warnings.catch_warnings():
            # Of damaged text.
            warnings.simplefilter("ignore", DeprecationWarning)
            for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
                if count > _MOST_OPCODES:
                    raise PickleError("the pickle inside goes on for ever")
                machine.step(opcode.name, argument)
        return machine.result()
    except PickleError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, UnicodeError) as error:
        raise PickleError(f"the pickle inside is damaged: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


class _Global(NamedTuple):
    name: str


class _Mark:
    pass


_MARK = _Mark()

# Opcodes whose argument is the value.
_CONSTANTS = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    }
)


class _Machine:
    """The stack, the memo, and one method per kind of opcode."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._stopped = False

    def result(self) -> Any:
        if not self._stopped or len(self._stack) != 1:
            raise PickleError("the pickle inside is cut off")
        return self._stack[0]

    def step(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self._stack.append(argument)
        elif name in _FIXED:
            self._stack.append(_FIXED[name]())
        elif name in _HANDLERS:
            _HANDLERS[name](self, argument)
        else:
            raise PickleError(f"the pickle inside uses {name}, which no weights need")

    def mark(self, _: Any) -> None:
        self._stack.append(_MARK)

    def stop(self, _: Any) -> None:
        self._stopped = True

    def pop(self, _: Any = None) -> Any:
        return self._stack.pop()

    def pop_mark(self, _: Any = None) -> list[Any]:
        """Everything above the last mark, which goes too."""
        for index in range(len(self._stack) - 1, -1, -1):
            if self._stack[index] is _MARK:
                items = self._stack[index + 1 :]
                del self._stack[index:]
                return items
        raise PickleError("the pickle inside is damaged: a mark is missing")

    def duplicate(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def put(self, index: Any) -> None:
        self._memo[int(index)] = self._stack[-1]

    def memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def get(self, index: Any) -> None:
        self._stack.append(self._memo[int(index)])

    def tuple_of(self, size: int) -> None:
        items = [self._stack.pop() for _ in range(size)][::-1]
        self._stack.append(tuple(items))

    def tuple_to_mark(self, _: Any) -> None:
        self._stack.append(tuple(self.pop_mark()))

    def list_to_mark(self, _: Any) -> None:
        self._stack.append(self.pop_mark())

    def dict_to_mark(self, _: Any) -> None:
        items = self.pop_mark()
        self._stack.append({})
        self._set(items)

    def append(self, _: Any) -> None:
        self._extend([self._stack.pop()])

    def appends(self, _: Any) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Inert):
            raise PickleError("the pickle inside is damaged: it appends to what is no list")

    def add_items(self, _: Any) -> None:
        # Sets hold no weights.
        self.pop_mark()

    def set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def set_items(self, _: Any) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Inert):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise PickleError("the pickle inside is damaged: it sets items of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Other keys name no weights, and hashing a nested tuple can take for ever.
            if isinstance(key, str | int | float):
                target[key] = value

    def find_global(self, argument: Any) -> None:
        self._stack.append(_known(".".join(str(argument).split(" ", 1))))

    def find_stacked_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleError("the pickle inside is damaged: a name is no text")
        self._stack.append(_known(f"{module}.{name}"))

    def reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(_call(function, arguments))

    def instance(self, argument: Any) -> None:
        self._stack.append(_call(_known(".".join(str(argument).split(" ", 1))), tuple(self.pop_mark())))

    def object(self, _: Any) -> None:
        function, *arguments = self.pop_mark()
        self._stack.append(_call(function, tuple(arguments)))

    def new_object_with_keywords(self, _: Any) -> None:
        self._stack.pop()
        self.reduce(None)

    def build(self, _: Any) -> None:
        """The state of an object: inert ones have none, and dictionaries with attributes (PyTorch's `_metadata`) need
        none."""
        self._stack.pop()
        if not isinstance(self._stack[-1], Inert | dict):
            raise PickleError("the pickle inside would run code: it sets the state of an object")

    def persistent_id(self, _: Any) -> None:
        self._stack.append(_storage(self._stack.pop()))


_FIXED: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": lambda: Inert("set"),
}

_HANDLERS: dict[str, Callable[[_Machine, Any], Any]] = {
    "PROTO": lambda machine, argument: None,
    "FRAME": lambda machine, argument: None,
    "STOP": _Machine.stop,
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "DUP": _Machine.duplicate,
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "TUPLE": _Machine.tuple_to_mark,
    "TUPLE1": lambda machine, argument: machine.tuple_of(1),
    "TUPLE2": lambda machine, argument: machine.tuple_of(2),
    "TUPLE3": lambda machine, argument: machine.tuple_of(3),
    "LIST": _Machine.list_to_mark,
    "DICT": _Machine.dict_to_mark,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.add_items,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.find_global,
    "STACK_GLOBAL": _Machine.find_stacked_global,
    "REDUCE": _Machine.reduce,
    "INST": _Machine.instance,
    "OBJ": _Machine.object,
    "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.new_object_with_keywords,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent_id,
}


def _known(name: str) -> Any:
    """What a name in the pickle becomes."""
    if name in DICTS | TENSORS | PARAMETERS | INERT:
        return _Global(name)
    module, _, last = name.rpartition(".")
    if module in ("torch", "torch.cuda", "torch.storage") and last.endswith("Storage"):
        return _Global(name)
    if name in DTYPES or module == "numpy.dtypes":
        return Inert(name)
    raise PickleError(
        f"the pickle inside would run code: it names {name[:100]}; "
        "only tensors and plain values are read (torch.save(model.state_dict(), PATH) writes such a file)"
    )


def _call(function: Any, arguments: Any) -> Any:
    """What a call in the pickle becomes; only names of the list get here."""
    if isinstance(function, Inert):
        return function
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
        raise PickleError("the pickle inside would run code: it calls what is no name")
    name = function.name
    if name in TENSORS:
        storage, offset, shape, strides = arguments[:4]
        return _tensor(storage, offset, shape, strides)
    if name in PARAMETERS:
        if arguments and isinstance(arguments[0], Rebuilt):
            return arguments[0]
        raise PickleError("the pickle inside is damaged: a parameter is no tensor")
    if name in DICTS:
        return next((argument for argument in arguments if isinstance(argument, dict)), {})
    return Inert(name)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> Rebuilt:
    def sizes(values: Any) -> tuple[int, ...]:
        if not isinstance(values, tuple) or not all(type(value) is int and value >= 0 for value in values):
            raise PickleError("the pickle inside is damaged: a tensor's shape or strides are no whole numbers")
        return values

    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0:
        raise PickleError("the pickle inside is damaged: a tensor has no storage")
    if len(sizes(shape)) != len(sizes(strides)) or len(shape) > 8:
        raise PickleError("the pickle inside is damaged: a tensor's strides do not fit its shape")
    return Rebuilt(storage, offset, shape, strides)


def _storage(description: Any) -> Storage:
    """A persistent id as PyTorch writes it: `('storage', class, key, device, elements)`, and a view in old files."""
    if not isinstance(description, tuple) or len(description) < 5 or description[0] != "storage":
        raise PickleError("the pickle inside is damaged: a storage is not described")
    kind, key, count = description[1], description[2], description[4]
    if not isinstance(kind, _Global) or not isinstance(key, str) or type(count) is not int or count < 0:
        raise PickleError("the pickle inside is damaged: a storage is not described")
    if len(description) > 5 and description[5] is not None:
        raise PickleError("holds views of storages, as PyTorch before 0.4 wrote them; save it anew with a newer one")
    return Storage(kind.name.rpartition(".")[2], key, count)
