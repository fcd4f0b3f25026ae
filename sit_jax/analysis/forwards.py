"""The forward passes that `sit benchmark` and benchmarks/ time: those of `sit predict` and `sit_jax.load`."""

from typing import Any

import jax

from sit_jax.inference import prepare
from sit_jax.models.architecture import Architecture
from sit_jax.models.regnet import RegNetArchitecture


def prepare_forward(
    arch: Architecture | RegNetArchitecture, variables: dict[str, Any], batch: int, dtype: str = "float32"
) -> tuple[Any, Any]:
    """A model as it is used for inference.

    Args:
        arch: Its shape.
        variables: `{'params': ..., 'batch_stats': ...}`.
        batch: Images that it will be given at a time.
        dtype: Type of the products, `float32` or `bfloat16`.

    Returns:
        The jitted function `(prepared, images) -> logits`, of normalised images (batch, height, width, channels), and
        the weights as it takes them, on the device.
    """
    model = prepare(arch, {name: tree for name, tree in variables.items() if tree}, dtype)
    return jax.jit(model.apply, compiler_options=model.options(batch)), jax.device_put(model.weights)
