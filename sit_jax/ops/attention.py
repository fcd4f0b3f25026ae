"""Implementations of softmax attention, selected by name."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sit_jax.errors import ConfigError, one_line

Attend = Callable[[Array, Array, Array], Array]

_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def plain_attention(
    query: Float[Array, "batch heads tokens size"],
    key: Float[Array, "batch heads others size"],
    value: Float[Array, "batch heads others size"],
) -> Float[Array, "batch heads tokens size"]:
    """Computes attention with softmax in float32, with autodiff.

    The sum of the exponentials divides the result, which is smaller than the attention weights.
    """
    return _forward(query, key, value)[0]


def _forward(query: Array, key: Array, value: Array) -> tuple[Array, tuple[Array, ...]]:
    scaled = query * query.shape[-1] ** -0.5
    scores = _einsum("bhqd,bhkd->bhqk", scaled, key)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(value.dtype)
    mixed = (_einsum("bhqk,bhkd->bhqd", weights, value) / total).astype(value.dtype)
    return mixed, (scaled, key, value, weights, total, mixed)


@jax.custom_vjp
def attention(
    query: Float[Array, "batch heads tokens size"],
    key: Float[Array, "batch heads others size"],
    value: Float[Array, "batch heads others size"],
) -> Float[Array, "batch heads tokens size"]:
    """Computes `plain_attention` with a custom backward pass that reads the scores half as often as autodiff does.

    It computes the weighted mean of the weights' gradient from the result (Dao et al., FlashAttention, appendix B.2).
    """
    return _forward(query, key, value)[0]


def _attention_backward(saved: tuple[Array, ...], grad: Array) -> tuple[Array, Array, Array]:
    scaled, key, value, weights, total, mixed = saved
    dtype = value.dtype
    probabilities = weights / total
    mean = (grad.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    to_scores = (probabilities * (_einsum("bhqd,bhkd->bhqk", grad, value) - mean)).astype(dtype)
    to_query = _einsum("bhqk,bhkd->bhqd", to_scores, key) * scaled.shape[-1] ** -0.5
    to_key = _einsum("bhqk,bhqd->bhkd", to_scores, scaled)
    to_value = _einsum("bhqk,bhqd->bhkd", probabilities.astype(dtype), grad)
    return to_query.astype(dtype), to_key.astype(dtype), to_value.astype(dtype)


attention.defvjp(_forward, _attention_backward)


def cudnn_attention(query: Array, key: Array, value: Array) -> Array:
    """Computes attention with cuDNN's fused kernel, on GPUs that support it, in bfloat16."""
    query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    mixed = jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    return mixed.transpose(0, 2, 1, 3)


def choose(name: str, dtype: DTypeLike, num_heads: int, head_dim: int) -> str:
    """Returns the name in `ATTENTION` of the attention that a model uses.

    Args:
        name: A name, or `auto` for cuDNN's attention if the default device supports it, otherwise XLA's.
        dtype: Type of the matrix products.
        num_heads: Number of heads.
        head_dim: Width of a head.

    Raises:
        ConfigError: cuDNN's attention is requested but not supported.
    """
    if name not in ("auto", "cudnn"):
        return name
    problem = _why_no_cudnn(jnp.dtype(dtype).name, num_heads, head_dim)
    if problem and name == "cudnn":
        raise ConfigError("attention", f"cudnn does not run here: {problem}; use auto or xla")
    return "xla" if problem else "cudnn"


@functools.cache
def _why_no_cudnn(dtype: str, num_heads: int, head_dim: int) -> str:
    if dtype != "bfloat16":
        return f"it needs dtype bfloat16, not {dtype}"
    if jax.default_backend() != "gpu":
        return f"it needs an NVIDIA GPU, not a {jax.default_backend().upper()}"
    example = jax.ShapeDtypeStruct((2, num_heads, 197, head_dim), jnp.bfloat16)
    try:
        jax.jit(cudnn_attention).lower(example, example, example).compile()
    except (RuntimeError, ValueError, NotImplementedError) as error:  # No cuDNN, or a cuDNN or GPU that is too old.
        return one_line(error, 200)
    return ""


ATTENTION: dict[str, Attend] = {"xla": attention, "plain": plain_attention, "cudnn": cudnn_attention}
