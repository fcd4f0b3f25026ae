"""The forward pass as it is deployed: weights folded, the preprocessing within where wanted."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from sit_jax.io.inference import inference_model
from sit_jax.io.weights import Weights

Forward = Callable[[Shaped[Array, "batch height width channels"]], Float[Array, "batch classes"]]


def make_forward(weights: Weights, raw_input: bool) -> Forward:
    """The function from images to logits, its weights within, for any platform.

    Args:
        weights: The model.
        raw_input: It takes uint8 pixels and normalises them as `metadata` says; else normalised float32 images.
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
    """uint8 pixels as float32 images, standardised by `mean` and `std` per channel."""
    mean, std = (jnp.asarray(preprocessing[name], jnp.float32)[None, None, None] for name in ("mean", "std"))
    return (pixels.astype(jnp.float32) / 255.0 - mean) / std
