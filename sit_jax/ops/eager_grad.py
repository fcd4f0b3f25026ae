"""Scalar functions whose gradients are computed together with their value."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Scalar = Callable[..., Float[Array, ""]]


def with_eager_grad(function: Scalar) -> Scalar:
    """The same function, which computes its gradients in the forward pass.

    The gradient of a scalar is known up to a factor as soon as its value is. So what the function computes on the way
    is freed before the next one runs, and nothing is recomputed. `function` itself is the plain twin.

    Args:
        function: Of pytrees of floats to a float32 scalar; what must not get a gradient is behind `stop_gradient`.
    """
    wrapped = jax.custom_jvp(function)

    def rule(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
        value, grads = jax.value_and_grad(function, argnums=tuple(range(len(primals))))(*primals)
        products = jax.tree.map(lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)), grads, tangents)
        return value, jnp.stack(jax.tree.leaves(products)).sum()

    wrapped.defjvp(rule)
    return wrapped
