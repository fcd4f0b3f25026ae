"""The forward passes that are timed: one function makes them all, so that what is measured is what users run."""

from typing import Any

import jax

from sit_jax.models import build_model
from sit_jax.models.architecture import Architecture
from sit_jax.models.regnet import RegNetArchitecture


def prepare_forward(
    arch: Architecture | RegNetArchitecture, variables: dict[str, Any], dtype: str = "float32"
) -> tuple[Any, Any]:
    """A model as it is used for inference.

    Args:
        arch: Its shape.
        variables: `{'params': ..., 'batch_stats': ...}`.
        dtype: Type of the products, `float32` or `bfloat16`.

    Returns:
        The jitted function `(prepared, images) -> logits`, of normalised images (batch, height, width, channels), and
        the weights as it takes them, on the device.
    """
    module = build_model(arch, dtype=dtype)
    placed = jax.device_put({name: tree for name, tree in variables.items() if tree})
    return jax.jit(lambda weights, images: module.apply(weights, images)[0]), placed
