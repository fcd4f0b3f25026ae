"""The forward pass for deployment: includes the weights and, optionally, the normalization."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from sit_jax.io.inference import inference_model
from sit_jax.io.weights import Weights

Forward = Callable[[Shaped[Array, "batch height width channels"]], Float[Array, "batch classes"]]


def make_forward(weights: Weights, raw_input: bool) -> Forward:
    """Returns the function from images to logits, including its weights, for any platform.

    Args:
        weights: The model.
        raw_input: Whether it takes uint8 pixels and normalizes them as `metadata` says; otherwise it takes normalized
            float32 images.
    """
    variables = {"params": weights.params, "batch_stats": weights.batch_stats}
    prepared = inference_model(weights.arch, variables, attention="plain")
    preprocessing = weights.metadata["preprocessing"] if raw_input else None

    def forward(images: Shaped[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        x = images if preprocessing is None else normalize_with(images, preprocessing)
        return prepared.apply(prepared.weights, x)

    return forward


def normalize_with(
    pixels: Shaped[Array, "batch height width channels"], preprocessing: dict[str, Any]
) -> Float[Array, "batch height width channels"]:
    """Converts uint8 pixels to float32 images, normalized by `mean` and `std` per channel."""
    mean, std = (jnp.asarray(preprocessing[name], jnp.float32)[None, None, None] for name in ("mean", "std"))
    return (pixels.astype(jnp.float32) / 255.0 - mean) / std
