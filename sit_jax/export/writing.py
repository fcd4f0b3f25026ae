"""Outputs are whole or not there: they are written beside their place and renamed."""

import contextlib
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from sit_jax.errors import UserError


@contextlib.contextmanager
def whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a temporary sibling to write a file or a folder to, and renames it when the block ends well.

    Raises:
        UserError: There is something at the place already, or it cannot be written; then nothing is left behind.
    """
    if path.exists() or path.is_symlink():
        raise UserError(f"{path}: is there already; remove it or choose another place")
    try:
        with replacing(path) as part:
            yield part
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a temporary sibling to write to, and puts it in the place of an older file when the block ends well.

    Raises:
        OSError: It cannot be written; then nothing is left behind, and the older file is as it was.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)
        yield part
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            _remove(part)


def write_torch(path: pathlib.Path, state_dict: dict[str, Any]) -> None:
    """Writes PyTorch's own kind of file.

    Raises:
        OSError: It cannot be written. PyTorch raises a RuntimeError of many lines where the disk is full.
    """
    import torch

    try:
        with path.open("wb") as file:
            torch.save(state_dict, file)
    except RuntimeError as error:
        # What the operating system said comes first; PyTorch then fails to end the file that it began.
        first = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(first, "strerror", None) or (str(first).splitlines() or ["PyTorch gives up"])[0][:200]
        raise OSError(reason) from None


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
