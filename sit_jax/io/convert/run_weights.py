"""Reads the weights of run directories."""

import pathlib
from collections.abc import Callable

from sit_jax.io.checkpoint import FOLDER
from sit_jax.io.run_weights import run_weights
from sit_jax.io.runs import CONFIG, read_config
from sit_jax.io.weights import Weights
from sit_jax.models.architecture import Architecture


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
