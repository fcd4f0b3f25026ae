"""The forward pass over folded weights: logits and nothing else, a pure function.

Beside the products hardly anything is left: a sum of squares per norm, GELU, softmax. Every product is a matrix times
a matrix with the batch among the rows; queries, keys and values come from one of them.

Where a kernel comes in halves (`fold`), each is a product of its own that gives half of the columns. XLA for CPU copies
a weight matrix into the order that its kernel reads, in one thread, and with a few dozen tokens that takes as long as
the product; two halves are copied and multiplied at the same time. All else is done on whole matrices: XLA works off
what lies between products in one thread, however it is divided, and some microseconds for each piece.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sit_jax.inference.fold import Folded
from sit_jax.models.architecture import Architecture
from sit_jax.models.gelu import exact_gelu
from sit_jax.models.slimming import SLIMMING_NORM_EPS

# Without its gradient by hand, so that there is forward mode, too.
_gelu = exact_gelu.fun
Attend = Callable[[Array, Array, Array], Array]


def forward(
    arch: Architecture,
    weights: Folded,
    images: Float[Array, "batch height width channels"],
    dtype: Any = jnp.float32,
    attend: Attend | None = None,
) -> Float[Array, "batch classes"]:
    """Logits in evaluation mode, float32.

    Args:
        arch: The model's shape.
        weights: What `fold` made of its weights.
        images: Normalised images of the model's size.
        dtype: Type of the stream and of the products' factors; sums, norms and softmax are float32.
        attend: Attention over (batch, tokens, heads, size), queries scaled; the one below where None.
    """
    attend = attend or attention
    batch = images.shape[0]
    patches = _stem(arch, weights["stem"], images.astype(dtype), dtype)
    patches = patches.reshape(batch, arch.num_patches, arch.dim) + weights["positions"]
    prefix = jnp.broadcast_to(weights["prefix"], (batch, arch.num_prefix_tokens, arch.dim))
    x = jnp.concatenate([prefix, patches], axis=1).astype(dtype)
    for block in range(arch.depth):
        layers = weights[f"blocks_{block}"]
        # Behind the last block only the prefix is read: the patches are its keys and values and no more.
        used = arch.num_prefix_tokens if block == arch.depth - 1 else x.shape[1]
        x = x[:, :used] + _attention_branch(arch, layers, x, used, attend)
        x = x + _mlp_branch(arch, layers, x)
        if block in arch.slimming:
            x = _slim(arch, weights[f"slimming_{block}"], x)
    heads = ["head", "distillation_head"] if arch.distillation_token else ["head"]
    logits = [_normed_product(arch.norm_eps, x[:, i], weights[name]) for i, name in enumerate(heads)]
    return jnp.stack(logits).mean(axis=0)


def attention(
    query: Float[Array, "batch queries heads size"],
    key: Float[Array, "batch tokens heads size"],
    value: Float[Array, "batch tokens heads size"],
) -> Float[Array, "batch queries heads size"]:
    """Softmax attention, queries scaled. The softmax's sum divides the result, which is smaller than the weights."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    shares = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    # With heads before tokens: the other order is four times slower on CPU.
    mixed = jnp.einsum("bhqk,bkhd->bhqd", shares.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return (mixed / shares.sum(axis=-1, keepdims=True)).astype(value.dtype).transpose(0, 2, 1, 3)


def _attention_branch(
    arch: Architecture, layers: Folded, x: Float[Array, "batch tokens dim"], used: int, attend: Attend
) -> Float[Array, "batch used dim"]:
    """What attention adds to the first `used` tokens."""
    batch, tokens, dim = x.shape
    qkv = _normed_product(arch.norm_eps, x, layers["qkv"]).astype(x.dtype)
    qkv = qkv.reshape(batch, tokens, 3, arch.num_heads, dim // arch.num_heads)
    mixed = attend(qkv[:, :used, 0], qkv[:, :, 1], qkv[:, :, 2]).reshape(batch, used, dim)
    return _shifted(_product(mixed, layers["proj"]), layers["proj"]).astype(x.dtype)


def _mlp_branch(
    arch: Architecture, layers: Folded, x: Float[Array, "batch tokens dim"]
) -> Float[Array, "batch tokens dim"]:
    hidden = _gelu(_normed_product(arch.norm_eps, x, layers["fc1"])).astype(x.dtype)
    return _shifted(_product(hidden, layers["fc2"]), layers["fc2"]).astype(x.dtype)


def _slim(arch: Architecture, layers: Folded, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch kept dim"]:
    """TSM: the patches' softmax-weighted sums. Divided by the softmax's sums at the end, when they are fewest."""
    prefix, patches = x[:, : arch.num_prefix_tokens], x[:, arch.num_prefix_tokens :]
    hidden = _gelu(_normed_product(SLIMMING_NORM_EPS, patches, layers["fc1"])).astype(x.dtype)
    scores = _product(hidden, layers["fc2"])
    shares = jnp.exp(scores - scores.max(axis=1, keepdims=True))
    kept = jnp.einsum("bnk,bnc->bkc", shares.astype(x.dtype), patches, preferred_element_type=jnp.float32)
    kept = kept / shares.sum(axis=1)[:, :, None]
    return jnp.concatenate([prefix, kept.astype(x.dtype)], axis=1)


def _stem(
    arch: Architecture, layers: Folded, x: Float[Array, "batch height width channels"], dtype: Any
) -> Float[Array, "batch rows columns dim"]:
    """The convolutions, each but the last followed by its bias and its nonlinearity."""
    shapes = [(kernel // 2, stride) for _, kernel, stride in arch.conv_stem_layers]
    if arch.stem_projection:
        shapes.append((0, arch.stem_projection))
    nonlinearity = jax.nn.relu if arch.stem_projection else _gelu
    for index, (padding, stride) in enumerate(shapes, start=1):
        layer = layers[f"conv{index}"]
        sides = ((padding, padding),) * 2
        axes = ("NHWC", "HWIO", "NHWC")
        kernel = layer["kernel"].astype(dtype)
        x = jax.lax.conv_general_dilated(x, kernel, (stride, stride), sides, dimension_numbers=axes)
        if "bias" in layer:
            x = nonlinearity(_shifted(x.astype(jnp.float32), layer)).astype(dtype)
    return x


def _normed_product(epsilon: float, x: Float[Array, "*lead dim"], layer: Folded) -> Float[Array, "*lead out"]:
    """LayerNorm and the linear layer behind it, float32."""
    return _shifted(_product(x, layer) * _inverse_norm(epsilon, x), layer)


def _inverse_norm(epsilon: float, x: Float[Array, "*lead dim"]) -> Float[Array, "*lead 1"]:
    """What is left of LayerNorm on mean-free tokens: one over the standard deviation."""
    squares = jnp.square(x.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    return jax.lax.rsqrt(squares / x.shape[-1] + epsilon)


def _product(x: Float[Array, "*lead dim"], layer: Folded) -> Float[Array, "*lead out"]:
    """`x @ kernel` with float32 sums, as one matrix product, or one for each half of the kernel's columns."""
    kernel, flat = layer["kernel"], x.reshape(-1, x.shape[-1])
    halves = kernel if isinstance(kernel, list) else [kernel]
    products = [jnp.dot(flat, half.astype(x.dtype), preferred_element_type=jnp.float32) for half in halves]
    result = jnp.concatenate(products, axis=1)
    return result.reshape(*x.shape[:-1], result.shape[1])


def _shifted(x: Float[Array, "*lead out"], layer: Folded) -> Float[Array, "*lead out"]:
    return x + layer["bias"].reshape((1,) * (x.ndim - 1) + (-1,))
