"""Weights for a run to start from."""

import pathlib

from sit_jax.errors import ConfigError, UserError
from sit_jax.io.convert.compare import check_start
from sit_jax.io.convert.options import Options
from sit_jax.io.convert.read import Log, read_weights, silent
from sit_jax.io.weights import Weights
from sit_jax.models.architecture import Architecture


def initial_weights(path: str | pathlib.Path, arch: Architecture, log: Log = silent) -> Weights:
    """Weights to start a model from, out of anything that `read_weights` reads.

    What the file does not tell is taken from the model that starts. Positions are interpolated to its resolution;
    heads of other classes become zeros.

    Args:
        path: A file of weights, a model folder, or a run.
        arch: The model that starts.
        log: Is called with each line about what was found and changed.

    Returns:
        The weights, without what the file's model lacks (a student's slimming modules, say).

    Raises:
        ConfigError: The file cannot be read, or is of another model (see `check_start`).
    """
    changes = Options(image_size=arch.image_size, num_classes=arch.num_classes, reverse=False, like=arch)
    try:
        weights = read_weights(path, options=changes, log=log)
    except UserError as error:
        raise ConfigError("init", str(error)) from None
    check_start(weights.arch, arch, str(path))
    return weights
