"""Scalar functions whose gradients are computed together with their values."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

Scalar = Callable[..., Float[Array, ""]]


def with_eager_grad(function: Scalar) -> Scalar:
    """Returns an equivalent function that computes its gradients in the forward pass.

    The gradient of a scalar is known up to a factor as soon as its value is. Thus the residuals of the function are
    freed before the next one runs, and nothing is recomputed. `function` itself is the plain reference.

    Args:
        function: Maps pytrees of floats to a float32 scalar; apply `stop_gradient` to inputs that must not get a
            gradient.
    """
    wrapped = jax.custom_jvp(function)

    def rule(primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]) -> tuple[Array, Array]:
        value, grads = jax.value_and_grad(function, argnums=tuple(range(len(primals))))(*primals)
        products = jax.tree.map(lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)), grads, tangents)
        return value, jnp.stack(jax.tree.leaves(products)).sum()

    wrapped.defjvp(rule)
    return wrapped
