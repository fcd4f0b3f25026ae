"""Reads and writes the files of `torch.save`. PyTorch does it, and is imported only then."""

import functools
import pathlib
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from sit_jax.config import JsonObject
from sit_jax.errors import UserError, one_line
from sit_jax.io.convert.tensors import BLOCK_NORM, FileError, Tensor, Tensors, check_total, unreadable

if TYPE_CHECKING:
    import torch

# What checkpoints hold in addition to weights: arguments, scores, paths, default factories. The values are not needed.
_IGNORED = (
    *("argparse.Namespace", "types.SimpleNamespace", "datetime.datetime", "datetime.timedelta", "torch.Generator"),
    *("pathlib.Path", "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath"),
    *("pathlib._local.PosixPath", "pathlib._local.WindowsPath"),
    *("numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
    *("builtins.dict", "builtins.list", "builtins.int", "builtins.float", "builtins.str", "builtins.slice"),
    *("builtins.object", "copyreg._reconstructor"),
)

# The types that NumPy and `.safetensors` have as well.
_NUMPY = {f"torch.{x}" for x in ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")}
# Keys under which training programs store weights and their moving averages, in search order.
_WEIGHTS = ("state_dict", "model", "model_state_dict", "module")
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_ADVICE = "save the state_dict alone, torch.save(model.state_dict(), PATH), or write .safetensors"


class _Ignored:
    """An object made instead of one of the classes above, with its state: a file cannot make them do anything."""

    state: object = None

    def __new__(cls, *_: object) -> "_Ignored":
        return object.__new__(cls)

    def __setstate__(self, state: object) -> None:
        self.state = state


def _plain_dict(*_: object) -> dict[object, object]:
    """Stands for `defaultdict`: PyTorch's unpickler sets the items of other dictionaries only."""
    return {}


@functools.cache
def _stand_ins() -> tuple[Callable[..., object], ...]:
    """Returns what is made for each allowed name; PyTorch looks it up by its module and name."""
    _plain_dict.__module__, _plain_dict.__name__, _plain_dict.__qualname__ = "collections", *["defaultdict"] * 2
    split = (full.rpartition(".") for full in _IGNORED)
    return _plain_dict, *(type(name, (_Ignored,), {"__module__": module}) for module, _, name in split)


def require_torch(path: pathlib.Path) -> None:
    """Raises a UserError if PyTorch, which reads and writes `.pth` files, is not installed."""
    try:
        import torch  # noqa: F401
    except ImportError:
        problem = 'needs PyTorch, which is not installed: pip install "sit_jax[convert]", or use .safetensors'
        raise UserError(f"{path}: {problem}") from None


def read_torch(path: pathlib.Path, ema: bool, log: Callable[[str], None], key: str = "") -> tuple[Tensors, JsonObject]:
    """Returns the weights in a file of `torch.save`, or their moving average, and the arguments of the program.

    `key` is that of the weights in the file, with dots for nested dictionaries; they are found if it is empty. Raises a
    UserError if the file contains no weights, several models, or cannot be read, or PyTorch is not installed.
    """
    value = _load(path)
    if not isinstance(value, dict):
        raise FileError(f"{path}: does not contain a dictionary of weights, but a {type(value).__name__}")
    found = dict(_models(value))
    if key and key not in found:
        raise FileError(f"{path}: --key {key}: there are no weights; there are {', '.join(found) or 'none'}")
    averages = [name for name in found if name.rpartition(".")[2] in _AVERAGES]
    if ema and not averages:
        raise FileError(f"{path}: contains no moving average of the weights; leave out --ema")
    usual = [name for name in ("", *_WEIGHTS) if name in found]
    choices = averages if ema else usual or [name for name in found if name not in averages] or averages
    chosen = key or next(iter(choices), "")
    tensors = found.get(chosen) or _tensors(value)
    if not tensors or (len(choices) > 1 and not (key or usual or ema)):
        some = ", ".join(str(name)[:50] for name in list(found or value)[:8]) or "none"
        several = f"contains several models, under {some}: give sit convert --key NAME"
        raise FileError(f"{path}: {several if found else f'contains no weights; its keys are {some}; {_ADVICE}'}")
    if chosen:
        others = ", ".join(repr(other) for other in found if other != chosen)
        log(f"read: the weights under {chosen!r}" + (f" (there is also {others})" if others else ""))
    check_total(path, sum(x.numel() * x.element_size() for x in tensors.values()))
    args = value.get("args")
    state = args.state if isinstance(args, _Ignored) else args
    read = {name: _lazy(path, name, x) for name, x in tensors.items()}
    return read, state if isinstance(state, dict) else {}


def _models(
    value: dict[object, object], where: str = "", depth: int = 3
) -> "Iterator[tuple[str, dict[str, torch.Tensor]]]":
    """Yields the keys and the tensors of the transformers in nested dictionaries, such as those of a checkpoint."""
    tensors = _tensors(value)
    if any(BLOCK_NORM.search(name) for name in tensors):
        yield where, tensors
    for name, inner in value.items():
        if depth and isinstance(inner, dict):
            yield from _models(inner, f"{where}.{str(name)[:50]}".lstrip("."), depth - 1)


def _tensors(value: object) -> "dict[str, torch.Tensor]":
    """Returns the tensors in a dictionary; empty for another value."""
    import torch

    items = value.items() if isinstance(value, dict) else ()
    return {str(key): x for key, x in items if isinstance(x, torch.Tensor)}


def _lazy(path: pathlib.Path, name: str, tensor: "torch.Tensor") -> Tensor:
    import torch

    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.device.type != "cpu":
        raise FileError(f"{path}: {name[:200]} is sparse, nested, quantized or without data; dense tensors are read")

    def read() -> np.ndarray:
        """Returns a copy, in float32 if NumPy has no such type."""
        try:
            copy = tensor.detach().clone(memory_format=torch.contiguous_format)
            if copy.dtype == torch.bfloat16:
                return copy.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return (copy if str(copy.dtype) in _NUMPY else copy.to(torch.float32)).numpy()
        except RuntimeError as error:
            raise FileError(f"{path}: {name[:200]} cannot be read: {one_line(error, 200)}") from None

    return Tensor(tuple(tensor.shape), tensor.is_floating_point(), read)


def _load(path: pathlib.Path) -> object:
    """Reads a file of `torch.save`, in the zip format or the legacy format, without running code that is in it.

    Tensors of the zip format stay in the file (memory-mapped) until they are used. Raises a UserError if the file is
    damaged, is of another format, or contains other objects than tensors and plain values.
    """
    require_torch(path)
    import torch

    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        if is_zip:
            _check_zip(path)
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals([*_stand_ins()]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # Of any type: the unpickler hands the values in the file to PyTorch's functions.
        raise unreadable(path, _reason(error), zipped=True) from None


def _check_zip(path: pathlib.Path) -> None:
    """Checks that all entries are as long as they claim: PyTorch would allocate that, and map compressed bytes."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is a compressed zip file, or a TorchScript archive")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its entries are longer than the file")


def _reason(error: Exception) -> str:
    """Returns what is wrong with a file, without PyTorch's advice to run the code in it."""
    not_allowed = re.search(r"GLOBAL (\S+)", str(error))
    if not_allowed:
        return f"contains {not_allowed[1][:100]}, but only tensors and plain values are read; {_ADVICE}"
    text = str(error).rpartition("WeightsUnpickler error:")[2]
    text = " ".join(re.split(r"In PyTorch 2\.6|Check the documentation|frame #|Exception raised", text)[0].split())
    return f"is damaged, or torch.load(weights_only=True) does not read it: {text[:200] or type(error).__name__}"


def write_torch(path: pathlib.Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes a PyTorch file with `torch.save`; raises an OSError, for a full disk as well."""
    import torch

    tensors = {key: torch.from_numpy(np.require(x, requirements=["C", "W"])) for key, x in state_dict.items()}
    try:
        with path.open("wb") as file:
            torch.save(tensors, file)
    except RuntimeError as error:
        # The operating system's error is first; PyTorch then fails to finish the file.
        first = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(first, "strerror", None) or (str(first).splitlines() or ["PyTorch gives up"])[0][:200]
        raise OSError(reason) from None
