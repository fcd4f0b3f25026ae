"""Implementations of softmax attention, selected by name."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sit_jax.errors import ConfigError, one_line

# (query, key, value, bias) -> result; the bias is optional.
Attend = Callable[..., Array]

_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def plain_attention(
    query: Float[Array, "batch heads tokens size"],
    key: Float[Array, "batch heads others size"],
    value: Float[Array, "batch heads others size"],
    bias: Float[Array, "batch others"] | None = None,
) -> Float[Array, "batch heads tokens size"]:
    """Computes attention with softmax in float32, with autodiff; the bias of a key is added to its scores.

    The sum of the exponentials divides the result, which is smaller than the attention weights.
    """
    return _forward(query, key, value, bias)[0]


def _forward(query: Array, key: Array, value: Array, bias: Array | None) -> tuple[Array, tuple[Array | None, ...]]:
    scaled = query * query.shape[-1] ** -0.5
    scores = _einsum("bhqd,bhkd->bhqk", scaled, key)
    if bias is not None:
        scores = scores + bias[:, None, None]
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(value.dtype)
    mixed = (_einsum("bhqk,bhkd->bhqd", weights, value) / total).astype(value.dtype)
    return mixed, (scaled, key, value, bias, weights, total, mixed)


@jax.custom_vjp
def attention(
    query: Float[Array, "batch heads tokens size"],
    key: Float[Array, "batch heads others size"],
    value: Float[Array, "batch heads others size"],
    bias: Float[Array, "batch others"] | None = None,
) -> Float[Array, "batch heads tokens size"]:
    """Computes `plain_attention` with a custom backward pass that reads the scores half as often as autodiff does.

    It computes the weighted mean of the weights' gradient from the result (Dao et al., FlashAttention, appendix B.2).
    """
    return _forward(query, key, value, bias)[0]


def _attention_backward(saved: tuple[Any, ...], grad: Array) -> tuple[Array, Array, Array, Array | None]:
    scaled, key, value, bias, weights, total, mixed = saved
    dtype = value.dtype
    probabilities = weights / total
    mean = (grad.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    to_scores = probabilities * (_einsum("bhqd,bhkd->bhqk", grad, value) - mean)
    to_bias = None if bias is None else to_scores.sum(axis=(1, 2)).astype(bias.dtype)
    to_scores = to_scores.astype(dtype)
    to_query = _einsum("bhqk,bhkd->bhqd", to_scores, key) * scaled.shape[-1] ** -0.5
    to_key = _einsum("bhqk,bhqd->bhkd", to_scores, scaled)
    to_value = _einsum("bhqk,bhqd->bhkd", probabilities.astype(dtype), grad)
    return to_query.astype(dtype), to_key.astype(dtype), to_value.astype(dtype), to_bias


attention.defvjp(_forward, _attention_backward)


def cudnn_attention(
    query: Array, key: Array, value: Array, bias: Array | None = None, implementation: Literal["cudnn", "xla"] = "cudnn"
) -> Array:
    """Computes attention with cuDNN's fused kernel, on GPUs that support it, in bfloat16.

    A bias is in two additional channels of the keys, since cuDNN trains with a bias for even numbers of tokens only.
    """
    size = query.shape[-1]
    if bias is not None:
        query, key, value = _bias_in_channels(query, key, value, bias)
    query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    mixed = jax.nn.dot_product_attention(query, key, value, scale=size**-0.5, implementation=implementation)
    return mixed.transpose(0, 2, 1, 3)[..., :size]


def _bias_in_channels(query: Array, key: Array, value: Array, bias: Array) -> tuple[Array, Array, Array]:
    """Appends channels that add the bias to the scores: rounded to the type of the keys, and what rounding lost.

    They are 8, since cuDNN needs heads whose width is a multiple of that.
    """
    scaled = bias * query.shape[-1] ** 0.5
    rounded = scaled.astype(key.dtype)
    parts = jnp.stack([rounded, (scaled - rounded).astype(key.dtype)], axis=-1)
    parts = jnp.broadcast_to(parts[:, None], (*key.shape[:3], 2))
    ones = jnp.ones((*query.shape[:3], 2), query.dtype)
    return _pad(jnp.concatenate([query, ones], -1), 6), _pad(jnp.concatenate([key, parts], -1), 6), _pad(value, 8)


def _pad(x: Array, channels: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, channels)))


def choose(name: str, dtype: DTypeLike, num_heads: int, head_dim: int, biased: bool = False) -> str:
    """Returns the name in `ATTENTION` of the attention that a model uses.

    Args:
        name: A name, or `auto` for cuDNN's attention if the default device supports it, otherwise XLA's.
        dtype: Type of the matrix products.
        num_heads: Number of heads.
        head_dim: Width of a head.
        biased: Whether the attention has a bias.

    Raises:
        ConfigError: cuDNN's attention is requested but not supported.
    """
    if name not in ("auto", "cudnn"):
        return name
    problem = _why_no_cudnn(jnp.dtype(dtype).name, num_heads, head_dim, biased)
    if problem and name == "cudnn":
        raise ConfigError("attention", f"cudnn does not run here: {problem}; use auto or xla")
    return "xla" if problem else "cudnn"


@functools.cache
def _why_no_cudnn(dtype: str, num_heads: int, head_dim: int, biased: bool) -> str:
    if dtype != "bfloat16":
        return f"it needs dtype bfloat16, not {dtype}"
    if jax.default_backend() != "gpu":
        return f"it needs an NVIDIA GPU, not a {jax.default_backend().upper()}"
    example = jax.ShapeDtypeStruct((2, num_heads, 197, head_dim), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((2, 197), jnp.float32) if biased else None
    try:
        jax.jit(cudnn_attention).lower(example, example, example, bias).compile()
    except (RuntimeError, ValueError, NotImplementedError) as error:  # No cuDNN, or a cuDNN or GPU that is too old.
        return one_line(error, 200)
    return ""


ATTENTION: dict[str, Attend] = {"xla": attention, "plain": plain_attention, "cudnn": cudnn_attention}
