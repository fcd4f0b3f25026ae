"""Atomic output: files and folders are written to a temporary sibling and renamed."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from sit_jax.errors import UserError


@contextlib.contextmanager
def atomic_create(path: pathlib.Path, replace: bool = False) -> Iterator[pathlib.Path]:
    """As `atomic_replace`; raises a UserError if the path cannot be written, or exists and `replace` is not set."""
    if not replace and (path.exists() or path.is_symlink()):
        raise UserError(f"{path}: already exists; remove it or choose another path")
    try:
        with atomic_replace(path) as part:
            yield part
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def atomic_replace(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary sibling to write to, and replaces an existing file or folder with it if the block succeeds.

    The target of a symbolic link is replaced, not the link. A folder can only be replaced with a folder. If writing
    fails, with an OSError, temporary files are removed and the old file or folder is unchanged.
    """
    if path.is_symlink():
        path = pathlib.Path(os.path.realpath(path))
    part, old = (path.with_name(f".{path.name}.{word}") for word in ("part", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)
        yield part
        if part.is_dir() and path.is_dir():
            _remove(old)
            path.rename(old)  # A folder cannot be renamed to an existing one.
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            if old.exists() and not path.exists():
                old.rename(path)
            _remove(part)
            _remove(old)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
