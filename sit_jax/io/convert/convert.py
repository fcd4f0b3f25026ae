"""Implementation of `sit convert SOURCE DEST`."""

import pathlib

import numpy as np

from sit_jax.errors import UserError
from sit_jax.io.atomic_write import atomic_create
from sit_jax.io.convert.batch_counters import with_counters
from sit_jax.io.convert.read import Log, Options
from sit_jax.io.convert.safetensors_file import write_safetensors
from sit_jax.io.convert.sit_names import to_original
from sit_jax.io.convert.torch_file import require_torch, write_torch
from sit_jax.io.load import read_weights
from sit_jax.io.metadata import assumptions
from sit_jax.io.model import Model
from sit_jax.io.model_folder import is_model_folder, write_folder
from sit_jax.io.suffixes import SAFETENSORS, TORCH, suffix_of
from sit_jax.models.trees import Params


def convert(source: pathlib.Path, dest: pathlib.Path, options: Options, force: bool, log: Log) -> None:
    """Reads weights from any source of `read_weights` and writes them for sit_jax or in the original's layout.

    `dest` is a model folder if it has no suffix, else a `.pth`, `.pt` or `.safetensors` file in the original's layout;
    `force` replaces an existing one. Raises a UserError if the conversion fails; `dest` is then unchanged.
    """
    suffix = suffix_of(dest, ("", SAFETENSORS, ".pth", ".pt"))
    if options.licence is not None and suffix:
        raise UserError(f"--licence: a {suffix} file holds tensors only; a model folder says what its licence is")
    if suffix in TORCH:
        require_torch(dest)
    _check_free(source, dest, force, is_file=bool(suffix))
    model = read_weights(source, options=options, log=log)
    assumed = assumptions(model.metadata)
    if assumed:
        log(f"assumed, as for ImageNet, since the file does not say how images are read: {assumed}")
    if suffix:
        write_state_dict(dest, original_state(model, model.rtsm), replace=True)
    else:
        write_folder(dest, model.vit, model.variables, model.rtsm, model.metadata, replace=True)


def original_state(model: Model, rtsm: Params) -> dict[str, np.ndarray]:
    """Returns a model's state dict in the original's layout, with the reverse modules `rtsm` and batch counters."""
    return with_counters(to_original({**model.variables, "rtsm": rtsm}, model.vit), model.metadata)


def write_state_dict(path: pathlib.Path, state_dict: dict[str, np.ndarray], replace: bool = False) -> None:
    """Writes a file atomically: `.safetensors`, or else PyTorch's; raises a UserError if that fails."""
    is_torch = suffix_of(path, (SAFETENSORS, *TORCH)) in TORCH
    if is_torch:
        require_torch(path)
    with atomic_create(path, replace) as part:
        (write_torch if is_torch else write_safetensors)(part, state_dict)


def _check_free(source: pathlib.Path, dest: pathlib.Path, force: bool, is_file: bool) -> None:
    """Raises a UserError if the destination exists and must not be replaced."""
    mine, theirs = source.resolve(), dest.resolve()
    inside, there = source.is_dir() and mine in theirs.parents, dest.exists() or dest.is_symlink()
    if there and not force and not inside:
        raise UserError(f"{dest}: already exists; pass --force to replace it")
    if source.exists() and (inside or (there and (mine == theirs or theirs in mine.parents))):
        raise UserError(f"{dest}: is, holds or belongs to the source; choose another place")
    if not there:
        return
    if dest.is_dir() and any(dest.iterdir()) and not is_model_folder(dest):
        raise UserError(f"{dest}: is a folder, but not a model folder; --force does not replace it")
    if dest.is_dir() and is_file:
        raise UserError(f"{dest}: is a folder, but the suffix asks for a file")
