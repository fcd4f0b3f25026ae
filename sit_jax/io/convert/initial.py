"""Initial weights of a run."""

import pathlib

from sit_jax.errors import ConfigError, UserError
from sit_jax.io.convert.compare import check_start
from sit_jax.io.convert.options import Options
from sit_jax.io.convert.read import Log, silent
from sit_jax.io.load import read_weights
from sit_jax.io.model import Model
from sit_jax.models.architecture import Architecture


def initial_weights(path: str | pathlib.Path, arch: Architecture, log: Log = silent) -> Model:
    """Returns initial weights for a model, from any source that `read_weights` reads.

    Hyperparameters that the file does not determine are those of the new model. Position embeddings are interpolated to
    its resolution; heads for other classes are set to zero. Parameters that the file's model lacks, such as a student's
    slimming modules, are absent. Raises a ConfigError if the file cannot be read or is of another model.
    """
    changes = Options(image_size=arch.image_size, num_classes=arch.num_classes, rtsm=False, like=arch)
    try:
        model = read_weights(path, options=changes, log=log)
    except UserError as error:
        raise ConfigError("init", str(error)) from None
    check_start(model.vit, arch, str(path))
    return model
