"""Atomic output: files and folders are written to a temporary sibling and renamed."""

import contextlib
import json
import math
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from sit_jax.errors import UserError


@contextlib.contextmanager
def atomic_create(path: pathlib.Path, replace: bool = False) -> Iterator[pathlib.Path]:
    """Yields a temporary sibling to write a file or folder to, and renames it if the block succeeds.

    Args:
        path: The file or folder.
        replace: Whether to replace an existing file or folder.

    Raises:
        UserError: The path exists or cannot be written; temporary files are then removed.
    """
    if not replace and (path.exists() or path.is_symlink()):
        raise UserError(f"{path}: is there already; remove it or choose another place")
    try:
        with atomic_replace(path) as part:
            yield part
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def atomic_replace(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary sibling to write to, and replaces an existing file or folder with it if the block succeeds.

    A folder can only be replaced with a folder.

    Raises:
        OSError: The path cannot be written; temporary files are then removed, and the old file or folder is unchanged.
    """
    part, old = (path.with_name(f".{path.name}.{word}") for word in ("part", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)
        yield part
        if part.is_dir() and path.is_dir() and not path.is_symlink():
            _remove(old)
            path.rename(old)  # A folder cannot be renamed to an existing one.
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            if old.exists() and not path.exists():
                old.rename(path)
            _remove(part)
            _remove(old)


def write_safetensors(path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[np.ndarray]) -> None:
    """Writes float32 tensors one at a time; the library's own writer needs all of them in memory.

    Args:
        path: The file.
        shapes: Key -> shape, in the order of `tensors`.
        tensors: The arrays.

    Raises:
        OSError: The file cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array, (name, shape) in zip(tensors, shapes.items(), strict=True):
            assert array.shape == shape, name
            file.write(np.ascontiguousarray(array, "<f4").data)


def require_torch(path: pathlib.Path) -> None:
    """Raises a UserError if PyTorch, which writes `.pth` files, is not installed."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise UserError(f"{path}: writing .pth files needs PyTorch: pip install torch, or write .safetensors") from None


def write_torch(path: pathlib.Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes a PyTorch file with `torch.save`.

    Raises:
        OSError: The file cannot be written. (On a full disk, PyTorch itself raises a RuntimeError of many lines.)
    """
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


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
