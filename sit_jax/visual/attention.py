"""The class token's attention, computed without changes to the deployed model."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sit_jax.models import Outputs
from sit_jax.models.layers import Attention


def apply_watched(
    model: Any, variables: dict[str, Any], images: Float[Array, "batch height width channels"]
) -> tuple[Float[Array, "batch classes"], Outputs, tuple[Array, ...]]:
    """Applies a model and also returns the class token's attention.

    The class query of every attention module is computed a second time; the model itself is unchanged.

    Args:
        model: A vision transformer's module, with or without slimming.
        variables: Its variables.
        images: Normalized images.

    Returns:
        Logits, the model's `Outputs`, and for each block the class token's attention to all tokens of the block (batch,
        tokens), prefix tokens first; mean over the heads, float32, rows sum to one.
    """
    seen: list[Array] = []
    with nn.intercept_methods(_watch(seen)):
        logits, outputs = model.clone(remat=False).apply(variables, images)
    return logits, outputs, tuple(seen)


def _watch(seen: list[Array]) -> Callable[..., Any]:
    def intercept(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, Attention) and context.method_name == "__call__":
            seen.append(_class_attention(context.module, args[0]))
        return call(*args, **kwargs)

    return intercept


def _class_attention(module: Attention, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens"]:
    """Returns the first token's attention, mean over the heads, as `Attention` computes it."""
    batch, tokens, dim = x.shape
    head_dim = dim // module.num_heads
    layer: Any = module.get_variable("params", "qkv")
    x, kernel = x.astype(module.dtype), layer["kernel"].astype(module.dtype)
    query, key = x[:, 0] @ kernel[:, :dim], x @ kernel[:, dim : 2 * dim]
    if module.qkv_bias:
        bias = layer["bias"].astype(module.dtype)
        query, key = query + bias[None, :dim], key + bias[None, None, dim : 2 * dim]
    query = query.reshape(batch, module.num_heads, head_dim) * head_dim**-0.5
    key = key.reshape(batch, tokens, module.num_heads, head_dim)
    scores = jnp.einsum("bhd,bkhd->bhk", query, key, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores).mean(axis=1)
