"""Reads the weights of run directories."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sit_jax.errors import UserError
from sit_jax.io.checkpoint import FOLDER, latest_step, load_reverse
from sit_jax.io.convert.load_params import expected_shapes
from sit_jax.io.preprocessing import about_run
from sit_jax.io.runs import CONFIG, read_config, trained_variables
from sit_jax.io.weights import Weights
from sit_jax.models.architecture import Architecture


def run_weights(
    folder: pathlib.Path, ema: bool = False, step: int | None = None, with_reverse: bool = False
) -> Weights:
    """Reads the weights of a run's checkpoint.

    Args:
        folder: The run directory.
        ema: Read the moving average instead of the weights.
        step: Step of the checkpoint; the newest if None.
        with_reverse: Also read the reverse modules.

    Raises:
        UserError: There is no such checkpoint, the model is not a vision transformer, or it was trained without reverse
            modules.
    """
    arch = read_config(folder).model.architecture
    if not isinstance(arch, Architecture):
        raise UserError(f"{folder}: its model is a {arch.family}; only vision transformers can be converted")
    config, variables = trained_variables(folder, ema, step)
    step = latest_step(folder) if step is None else step
    reverse: dict[str, Any] = {}
    if with_reverse:
        if not arch.is_slimmed or config.loss.token == 0:
            raise UserError(f"{folder}: was trained without reverse modules, so none can be written")
        reverse = load_reverse(folder, expected_shapes(arch, reverse=True)["reverse"], step)
    trees = (variables["params"], variables.get("batch_stats", {}), reverse)
    params, stats, reverse = (jax.tree.map(lambda x: np.asarray(x, np.float32), tree) for tree in trees)
    return Weights(arch, params, stats, reverse, about_run(config, folder, step, ema))


def is_run(path: pathlib.Path) -> bool:
    """Returns whether a path is a run directory, or one of its checkpoints."""
    folder, _ = _run_and_step(path)
    return (folder / FOLDER).is_dir() and (folder / CONFIG).is_file()


def read_run(path: pathlib.Path, ema: bool, reverse: bool, log: Callable[[str], None]) -> Weights:
    """Returns the weights of a run's newest checkpoint, or of the checkpoint that the path names.

    Args:
        path: A run directory, or a checkpoint in it.
        ema: Read the moving average instead of the weights.
        reverse: Also read the reverse modules if the run has them.
        log: Called with each line about what was found.

    Raises:
        UserError: There is no complete checkpoint, or its model is not a vision transformer.
    """
    folder, step = _run_and_step(path)
    config = read_config(folder)
    arch = config.model.architecture
    trained = isinstance(arch, Architecture) and arch.is_slimmed and config.loss.token > 0
    weights = run_weights(folder, ema, step, with_reverse=reverse and trained)
    kind = f"{'student' if weights.arch.is_slimmed else 'model'} {config.model.name}".strip()
    having = " with RTSMs" if weights.reverse else ""
    log(f"found: a run of sit_jax, {kind}{having}, {weights.arch.num_classes} classes, {weights.arch.image_size} px")
    if trained and not reverse:
        log("changed: RTSMs left out")
    return weights


def _run_and_step(path: pathlib.Path) -> tuple[pathlib.Path, int | None]:
    if path.parent.name == FOLDER and path.name.isdecimal():
        return path.parent.parent, int(path.name)
    return path, None
