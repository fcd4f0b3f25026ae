"""Reads the weights of a run, for all writers."""

import pathlib
from typing import Any

import jax
import numpy as np

from sit_jax.errors import UserError
from sit_jax.io.checkpoint import latest_step, load_reverse
from sit_jax.io.convert.load_params import expected_shapes
from sit_jax.io.preprocessing import about_run
from sit_jax.io.runs import read_config, trained_variables
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
