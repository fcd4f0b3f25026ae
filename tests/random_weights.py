"""Models with weights as after a training: nothing is zero or one, BatchNorm's statistics least of all."""

from typing import Any

import jax
import numpy as np
import tiny

from sit_jax.io.convert.load_params import expected_shapes
from sit_jax.io.model import Model
from sit_jax.models.architecture import Architecture

PREPROCESSING = {"interpolation": "bicubic", "crop_fraction": 0.875, "resize": "crop"}


def draw(arch: Architecture = tiny.STUDENT, rtsm: bool = False, seed: int = 0) -> Model:
    """Random weights of a model."""
    rng = np.random.default_rng(seed)

    def leaf(path: tuple[Any, ...], x: Any) -> np.ndarray:
        name, shape = path[-1].key, x.shape
        if name in ("var", "scale"):
            values = rng.uniform(0.5, 2.0, shape)
        elif name == "kernel":
            values = rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1]))
        else:
            values = 0.1 * rng.standard_normal(shape)
        return np.asarray(values, np.float32)

    tree = jax.tree_util.tree_map_with_path(leaf, expected_shapes(arch, rtsm))
    means = {"mean": [0.4] * arch.in_channels, "std": [0.2] * arch.in_channels}
    metadata = {
        "class_names": [f"class {index}" for index in range(arch.num_classes)],
        "preprocessing": {**PREPROCESSING, **means},
        "licence": "Apache-2.0",
    }
    return Model(arch, {"params": tree["params"], "batch_stats": tree["batch_stats"]}, metadata, tree["rtsm"])


def variables(weights: Model) -> dict[str, Any]:
    """What the model's `apply` takes."""
    return {"params": weights.params, "batch_stats": weights.batch_stats}


def images(arch: Architecture, count: int = 3, seed: int = 1) -> np.ndarray:
    """Normalised images, channels last."""
    shape = (count, *arch.image_shape, arch.in_channels)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pixels(arch: Architecture, count: int = 3, seed: int = 1) -> np.ndarray:
    """Pictures, uint8."""
    shape = (count, *arch.image_shape, arch.in_channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
