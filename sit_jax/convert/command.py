"""The body of `sit convert SOURCE DEST`."""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np

from sit_jax.convert.arguments import Options
from sit_jax.convert.original import to_original
from sit_jax.convert.read import CONFIG_FILE, FORMAT, Say, read_weights
from sit_jax.convert.weights import Weights
from sit_jax.errors import UserError
from sit_jax.export.folder import save_folder, write_weights
from sit_jax.export.preprocessing import assumptions
from sit_jax.export.writing import write_torch


def convert(source: pathlib.Path, dest: pathlib.Path, options: Options, force: bool, say: Say) -> None:
    """Reads weights from anywhere and writes them for sit_jax or in the original's layout.

    Args:
        source: See `read_weights`.
        dest: A model folder where it has no suffix; a `.pth`, `.pt` or `.safetensors` file in the original's layout.
        options: What is read and changed.
        force: Replace what lies at `dest`.
        say: Is called with each line about what was found and changed.

    Raises:
        UserError: One line; nothing is written then, and what lay at `dest` is still there.
    """
    writer = _writer(dest)
    if options.licence is not None and dest.suffix:
        raise UserError(f"--licence: a {dest.suffix} file holds tensors only; a model folder says what its licence is")
    _check_free(source, dest, force)
    weights = read_weights(source, options=options, say=say)
    assumed = assumptions(weights.about)
    if assumed:
        say(f"assumed of pictures, as for ImageNet, since the file does not say: {assumed}")
    write_whole(dest, weights, writer)


Writer = Callable[[pathlib.Path, Weights], None]


def _writer(dest: pathlib.Path) -> Writer:
    writers: dict[str, Writer] = {
        "": lambda path, weights: save_folder(path, weights, bool(weights.reverse)),
        ".safetensors": lambda path, weights: write_weights(path, weights, bool(weights.reverse)),
        ".pth": _write_torch,
        ".pt": _write_torch,
    }
    if dest.suffix not in writers:
        raise UserError(f"{dest}: cannot be a {dest.suffix} file; give a folder without suffix, .safetensors or .pth")
    if writers[dest.suffix] is _write_torch:
        try:
            import torch  # noqa: F401
        except ImportError:
            raise UserError(
                f"{dest}: writing .pth files needs PyTorch: pip install torch, or write .safetensors"
            ) from None
    return writers[dest.suffix]


def _write_torch(path: pathlib.Path, weights: Weights) -> None:
    import torch

    tree = {"params": weights.params, "batch_stats": weights.batch_stats}
    state = to_original({**tree, "reverse": weights.reverse} if weights.reverse else tree, weights.arch)
    tensors = {key: torch.from_numpy(np.require(value, requirements=["C", "W"])) for key, value in state.items()}
    write_torch(path, tensors)


def _check_free(source: pathlib.Path, dest: pathlib.Path, force: bool) -> None:
    """Raises a UserError where something lies at the destination that must not be replaced."""
    mine, theirs = source.resolve(), dest.resolve()
    inside, there = source.is_dir() and mine in theirs.parents, dest.exists() or dest.is_symlink()
    if there and not force and not inside:
        raise UserError(f"{dest}: is there already; pass --force to replace it")
    if source.exists() and (inside or (there and (mine == theirs or theirs in mine.parents))):
        raise UserError(f"{dest}: is, holds or belongs to the source; choose another place")
    if not there:
        return
    if dest.is_dir() and any(dest.iterdir()) and not _is_model_folder(dest):
        raise UserError(f"{dest}: is a folder, but no model folder; --force does not replace it")
    if dest.is_dir() and dest.suffix:
        raise UserError(f"{dest}: is a folder, but the suffix asks for a file")


def _is_model_folder(path: pathlib.Path) -> bool:
    try:
        values = json.loads((path / CONFIG_FILE).read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.get("format") == FORMAT


def write_whole(dest: pathlib.Path, weights: Weights, writer: Writer) -> None:
    """Writes beside the destination and renames: it is the old thing or the whole new one.

    Raises:
        UserError: It cannot be written; nothing is left behind.
    """
    part, old = (dest.with_name(f".{dest.name}.{word}{dest.suffix}") for word in ("part", "old"))
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)
        writer(part, weights)
        if dest.is_dir() and not dest.is_symlink():
            # A folder cannot be renamed onto another one.
            _remove(old)
            dest.rename(old)
        part.rename(dest)
    except OSError as error:
        raise UserError(f"{dest}: cannot be written: {error.strerror or error}") from None
    finally:
        if old.exists() and not dest.exists():
            old.rename(dest)
        _remove(part)
        _remove(old)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
