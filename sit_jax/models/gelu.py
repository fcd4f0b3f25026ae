"""GELU by the error function (Flax's default is the tanh approximation), with its slope."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def exact_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU in the type of x, computed in float32.

    As in PyTorch, `x / 2 * (1 + erf(x / sqrt 2))`: JAX's own takes `erfc`, which on CPU works out two branches, and its
    derivative runs over the array four times and keeps three more of them. Here the backward pass is one pass over `x`.
    """
    value = x.astype(jnp.float32)
    return (value * _normal_share(value)).astype(x.dtype)


def _gelu_forward(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    return exact_gelu(x), x


def _gelu_backward(x: Float[Array, "..."], gradient: Float[Array, "..."]) -> tuple[Float[Array, "..."]]:
    _, slope = gelu_and_slope(x)
    return ((gradient.astype(jnp.float32) * slope).astype(x.dtype),)


exact_gelu.defvjp(_gelu_forward, _gelu_backward)


def gelu_and_slope(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """GELU and its derivative at x, both in float32."""
    value = x.astype(jnp.float32)
    share = _normal_share(value)
    return value * share, share + value * jnp.exp(-0.5 * value * value) / math.sqrt(2 * math.pi)


def _normal_share(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The share of the normal distribution that lies below x."""
    return 0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))
