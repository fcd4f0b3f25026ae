"""The class token's attention, computed without changes to the deployed model."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from sit_jax.models import Outputs
from sit_jax.models.layers import Attention
from sit_jax.models.trees import Params, Variables


def apply_watched(
    model: nn.Module, variables: Variables, images: Float[Array, "batch height width channels"]
) -> tuple[Float[Array, "batch classes"], Outputs, tuple[Array, ...]]:
    """Applies a model and also returns the class token's attention.

    The class query of every attention module is computed a second time; the model itself is unchanged. The attention is
    that to all tokens of each block, prefix tokens first; mean over the heads, float32, rows sum to one.
    """
    attention: list[Array] = []

    def intercept(
        call: Callable[..., PyTree],
        args: tuple[PyTree, ...],
        kwargs: dict[str, PyTree],
        context: nn.module.InterceptorContext,
    ) -> PyTree:
        if isinstance(context.module, Attention) and context.method_name == "__call__":
            attention.append(_class_attention(context.module, args[0]))
        return call(*args, **kwargs)

    forward = nn.apply(lambda module: module(images), model.clone(remat=False))
    with nn.intercept_methods(intercept):
        logits, outputs = forward(variables)
    return logits, outputs, tuple(attention)


def _class_attention(module: Attention, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens"]:
    """Returns the first token's attention, mean over the heads, as `Attention` computes it."""
    batch, tokens, dim = x.shape
    head_dim = dim // module.num_heads
    layer: Params = module.get_variable("params", "qkv")
    x, kernel = x.astype(module.dtype), layer["kernel"].astype(module.dtype)
    query, key = x[:, 0] @ kernel[:, :dim], x @ kernel[:, dim : 2 * dim]
    if module.qkv_bias:
        bias = layer["bias"].astype(module.dtype)
        query, key = query + bias[None, :dim], key + bias[None, None, dim : 2 * dim]
    query = query.reshape(batch, module.num_heads, head_dim) * head_dim**-0.5
    key = key.reshape(batch, tokens, module.num_heads, head_dim)
    scores = jnp.einsum("bhd,bkhd->bhk", query, key, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores).mean(axis=1)
