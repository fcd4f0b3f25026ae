"""The forward pass as it is deployed: BatchNorm folded into the convolutions, the preprocessing within where wanted."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from sit_jax.convert.weights import Weights
from sit_jax.models import build_model
from sit_jax.models.layers import BatchNorm

Forward = Callable[[Shaped[Array, "batch height width channels"]], Float[Array, "batch classes"]]

_EPSILON = BatchNorm.epsilon


def make_forward(weights: Weights, raw_input: bool) -> Forward:
    """The function from pictures to logits, its weights within.

    Args:
        weights: The model.
        raw_input: It takes uint8 pixels and normalises them as `about` says; else normalised float32 images.
    """
    model = build_model(weights.arch)
    variables = {"params": fold_batch_norm(weights.params, weights.batch_stats)}
    stats = jax.tree.map(np.zeros_like, weights.batch_stats)
    preprocessing = weights.about["preprocessing"] if raw_input else None

    def forward(images: Shaped[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        x = images if preprocessing is None else normalize_with(images, preprocessing)
        with nn.intercept_methods(_only_shift):
            logits, _ = model.apply({**variables, "batch_stats": stats}, x)
        return logits

    return forward


def normalize_with(
    pixels: Shaped[Array, "batch height width channels"], preprocessing: dict[str, Any]
) -> Float[Array, "batch height width channels"]:
    """uint8 pixels as float32 images, standardised by `mean` and `std` per channel."""
    mean, std = (jnp.asarray(preprocessing[name], jnp.float32)[None, None, None] for name in ("mean", "std"))
    return (pixels.astype(jnp.float32) / 255.0 - mean) / std


def fold_batch_norm(params: dict[str, Any], batch_stats: dict[str, Any]) -> dict[str, Any]:
    """Parameters with the factors of the stem's BatchNorms in its kernels; only their shifts (`bias`) remain."""
    norms = batch_stats.get("stem", {})
    stem = dict(params["stem"])
    for name, stats in norms.items():
        conv, norm = name.replace("bn", "conv"), stem[name]
        # In float64, so that folding costs one rounding.
        factor = np.asarray(norm["scale"], np.float64) / np.sqrt(np.asarray(stats["var"], np.float64) + _EPSILON)
        kernel = np.asarray(stem[conv]["kernel"], np.float64) * factor
        shift = np.asarray(norm["bias"], np.float64) - np.asarray(stats["mean"], np.float64) * factor
        stem[conv] = {"kernel": kernel.astype(np.float32)}
        stem[name] = {"scale": np.ones_like(norm["scale"]), "bias": shift.astype(np.float32)}
    return {**params, "stem": stem}


def _only_shift(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
    if not isinstance(context.module, BatchNorm) or context.method_name != "__call__":
        return call(*args, **kwargs)
    bias: Any = context.module.get_variable("params", "bias")
    return (args[0] + bias[None, None, None]).astype(context.module.dtype)
