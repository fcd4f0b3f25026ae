"""Reads the weights of runs."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax.checkpoint import FOLDER, load_reverse
from sit_jax.convert.weights import Weights
from sit_jax.errors import UserError
from sit_jax.models import build_model, build_reverse
from sit_jax.models.architecture import Architecture
from sit_jax.run import trained_variables
from sit_jax.workdir import CONFIG, read_config


def is_run(path: pathlib.Path) -> bool:
    """Whether a path is the folder of a run, or of one of its checkpoints."""
    folder, _ = _run_and_step(path)
    return (folder / FOLDER).is_dir() and (folder / CONFIG).is_file()


def read_run(path: pathlib.Path, ema: bool, reverse: bool, say: Callable[[str], None]) -> Weights:
    """The weights of a run's newest checkpoint, or of the one that the path names.

    Args:
        path: The folder of a run, or of a checkpoint in it.
        ema: The moving average instead of the weights.
        reverse: Also the reverse modules, where the run trained any.
        say: Is told what was found.

    Raises:
        UserError: There is no whole checkpoint, or its model is no vision transformer.
    """
    folder, step = _run_and_step(path)
    arch = read_config(folder).model.architecture
    if not isinstance(arch, Architecture):
        raise UserError(f"{folder}: its model is a {arch.family}; only vision transformers can be converted")
    config, variables = trained_variables(folder, ema, step)
    trained = arch.is_slimmed and config.loss.token > 0
    modules = load_reverse(folder, _reverse_shapes(arch), step) if reverse and trained else {}
    kind = f"{'student' if arch.is_slimmed else 'model'} {config.model.name}".strip()
    having = " with RTSMs" if modules else ""
    say(f"found: a run of sit_jax, {kind}{having}, {arch.num_classes} classes, {arch.image_size} px")
    if trained and not reverse:
        say("changed: RTSMs left out")
    trees = (variables["params"], variables.get("batch_stats", {}), modules)
    params, stats, modules = (jax.tree.map(lambda x: np.asarray(x, np.float32), tree) for tree in trees)
    data = config.data
    about: dict[str, Any] = {
        "preprocessing": {
            "mean": list(data.mean),
            "std": list(data.std),
            "interpolation": data.interpolation,
            "crop_fraction": data.crop_fraction,
            "resize": data.resize,
        },
        "provenance": {"run": folder.resolve().name, "step": step, "ema": ema, "data": data.name},
    }
    return Weights(arch, params, stats, modules, about)


def _run_and_step(path: pathlib.Path) -> tuple[pathlib.Path, int | None]:
    if path.parent.name == FOLDER and path.name.isdecimal():
        return path.parent.parent, int(path.name)
    return path, None


def _reverse_shapes(arch: Architecture) -> Any:
    images = jax.ShapeDtypeStruct((1, arch.image_size, arch.image_size, arch.in_channels), jnp.float32)
    model, key = build_model(arch), jax.random.key(0)
    _, outputs = jax.eval_shape(model.apply, jax.eval_shape(model.init, key, images), images)
    return jax.eval_shape(build_reverse(arch).init, key, outputs.tokens)["params"]
