"""Reads the weights of runs."""

import pathlib
from collections.abc import Callable

from sit_jax.io.checkpoint import FOLDER
from sit_jax.io.run_weights import run_weights
from sit_jax.io.runs import CONFIG, read_config
from sit_jax.io.weights import Weights
from sit_jax.models.architecture import Architecture


def is_run(path: pathlib.Path) -> bool:
    """Whether a path is the folder of a run, or of one of its checkpoints."""
    folder, _ = _run_and_step(path)
    return (folder / FOLDER).is_dir() and (folder / CONFIG).is_file()


def read_run(path: pathlib.Path, ema: bool, reverse: bool, log: Callable[[str], None]) -> Weights:
    """The weights of a run's newest checkpoint, or of the one that the path names.

    Args:
        path: The folder of a run, or of a checkpoint in it.
        ema: The moving average instead of the weights.
        reverse: Also the reverse modules, where the run trained any.
        log: Is told what was found.

    Raises:
        UserError: There is no whole checkpoint, or its model is no vision transformer.
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
