"""Features: what a backbone computes of an image, by name."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sit_jax.models.architecture import Architecture
from sit_jax.models.layers import layer_norm
from sit_jax.models.reverse import ReverseTokenSlimming
from sit_jax.models.trees import Params
from sit_jax.models.vit import Outputs

Grid = Literal["rtsm", "spread"]


class Features(NamedTuple):
    """Features of a batch of images, float32.

    Attributes:
        pooled: What a head would read, (batch, `arch.feature_dim`).
        prefix_tokens: Class token, distillation token and registers after the last norm, (batch, prefix, dim).
        patch_tokens: Patch tokens after the last norm, (batch, tokens, dim): the kept ones, or those of the full grid.
    """

    pooled: Float[Array, "batch features"]
    prefix_tokens: Float[Array, "batch prefix dim"]
    patch_tokens: Float[Array, "batch _ dim"]


def select_features(
    arch: Architecture,
    outputs: Outputs,
    grid: Grid | None = None,
    *,
    params: Params,
    rtsm: Params,
    dtype: DTypeLike = jnp.float32,
) -> Features:
    """Selects the features among a model's outputs.

    Args:
        arch: The architecture.
        outputs: The outputs of the model for a batch of images.
        grid: How a slimmed model's patch tokens are brought back to the full grid: by the last block's reverse module
            (`rtsm`), or by `spread_tokens`; None leaves the kept tokens.
        params: The model's parameters, whose last norm is applied to the recovered tokens (`rtsm`).
        rtsm: The parameters of the reverse modules (`rtsm`).
        dtype: Type of the matrix products.
    """
    patches: Any = outputs.patch_tokens
    if grid == "spread":
        patches = spread_tokens(patches, outputs.assignments)
    elif grid == "rtsm" and arch.is_slimmed:
        module = ReverseTokenSlimming(arch.num_patches, jnp.dtype(dtype), parent=None)
        patches = module.apply({"params": rtsm[f"blocks_{arch.depth - 1}"]}, outputs.tokens[-1])
        if not arch.norm_after_pool:
            patches = layer_norm(arch.norm_eps, dtype, None).apply({"params": params["norm"]}, patches)
    return Features(*(jnp.asarray(x, jnp.float32) for x in (outputs.features, outputs.prefix_tokens, patches)))


def spread_tokens(
    tokens: Float[Array, "batch _kept dim"], assignments: Sequence[Float[Array, "batch _tokens _kept"]]
) -> Float[Array, "batch _patches dim"]:
    """Spreads merged tokens back: a token becomes the mean of the tokens that it was merged into, weighted by A.

    Args:
        tokens: The tokens after the last reducer.
        assignments: Each reducer's assignment A, in order.

    Returns:
        The tokens of the full grid; zeros for a token that no reducer has kept.
    """
    for assignment in reversed(assignments):
        total = assignment.sum(axis=2, keepdims=True)
        weights = jnp.where(total > 0, assignment / jnp.maximum(total, 1e-30), 0)
        tokens = jnp.einsum("bnk,bkc->bnc", weights, tokens.astype(jnp.float32))
    return tokens
