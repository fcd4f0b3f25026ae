"""Reads and writes the files of `torch.save`. PyTorch does it, and is imported only then."""

import functools
import pathlib
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping

import numpy as np

from sit_jax.errors import UserError
from sit_jax.io.convert.tensors import FileError

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


class _Ignored:
    """An empty object, made instead of one of the classes above: a file then cannot make them do anything."""

    def __new__(cls, *_: object) -> "_Ignored":
        return object.__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


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
        raise UserError(
            f'{path}: needs PyTorch, which is not installed: pip install "sit_jax[convert]", or use .safetensors'
        ) from None


def read_torch(path: pathlib.Path) -> object:
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
        with warnings.catch_warnings(), torch.serialization.safe_globals([*_stand_ins()]):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # Of any type: the unpickler hands the values in the file to PyTorch's functions.
        raise FileError(f"{path}: {_reason(error)}") from None


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
    advice = "save the state_dict alone, torch.save(model.state_dict(), PATH), or write .safetensors"
    if not_allowed:
        return f"contains {not_allowed[1][:100]}, but only tensors and plain values are read; {advice}"
    text = str(error).rpartition("WeightsUnpickler error:")[2]
    text = " ".join(re.split(r"In PyTorch 2\.6|Check the documentation|frame #|Exception raised", text)[0].split())
    return f"is damaged, or torch.load(weights_only=True) does not read it: {text[:200] or type(error).__name__}"


def write_torch(path: pathlib.Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes a PyTorch file with `torch.save`; raises an OSError where PyTorch raises a RuntimeError of many lines."""
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
