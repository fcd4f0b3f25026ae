"""Products with weights, written so that forward and backward pass both reach the fast kernels.

Left to itself, autodiff asks for weight gradients over several dimensions at a time, and XLA copies an operand into
another order for each of them. Here everything is a product of two matrices, and rows stay as they lie in memory.

Operands have the type of the computation and sums are float32. Weights are float32 masters: they are cast here, and
their gradient is not rounded on its way back to them.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Glorot's rule, as ViT and big_vision have it: it fits narrow models too, for which the original's 0.02 is too small.
DENSE_INIT = nn.initializers.xavier_uniform()


@jax.custom_vjp
def project(x: Float[Array, "*lead inputs"], kernel: Float[Array, "inputs outputs"]) -> Float[Array, "*lead outputs"]:
    """`x @ kernel` in the type of x, for a float32 kernel."""
    result = _dot(_rows(x), kernel.astype(x.dtype), 1, 0).astype(x.dtype)
    return result.reshape(*x.shape[:-1], kernel.shape[1])


def _project_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return project(x, kernel), (x, kernel)


def _project_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept
    rows = _rows(gradient)
    back = _dot(rows, kernel.astype(x.dtype), 1, 1).astype(x.dtype)
    return back.reshape(x.shape), _dot(_rows(x), rows, 0, 0).astype(kernel.dtype)


project.defvjp(_project_forward, _project_backward)


@jax.custom_vjp
def project_columns(
    x: Float[Array, "inputs columns"], kernel: Float[Array, "inputs outputs"]
) -> Float[Array, "outputs columns"]:
    """`kernel.T @ x` in the type of x, for a float32 kernel: a linear layer over the first dimension."""
    return _dot(kernel.astype(x.dtype).T, x, 1, 0).astype(x.dtype)


def _columns_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return project_columns(x, kernel), (x, kernel)


def _columns_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept
    return _dot(kernel.astype(x.dtype), gradient, 1, 0).astype(x.dtype), _dot(x, gradient, 1, 1).astype(kernel.dtype)


project_columns.defvjp(_columns_forward, _columns_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_bias(axis: int, x: Array, bias: Array) -> Array:
    """x with a float32 bias along an axis; the bias's gradient is summed up in float32."""
    return x + jnp.expand_dims(bias.astype(x.dtype), [other for other in range(x.ndim) if other != axis])


def _bias_backward(axis: int, _: None, gradient: Array) -> tuple[Array, Array]:
    others = tuple(other for other in range(gradient.ndim) if other != axis)
    return gradient, gradient.astype(jnp.float32).sum(axis=others)


_add_bias.defvjp(lambda axis, x, bias: (_add_bias(axis, x, bias), None), _bias_backward)


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _dot(left: Array, right: Array, left_dim: int, right_dim: int) -> Array:
    dimensions = (((left_dim,), (right_dim,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


class Dense(nn.Module):
    """A linear layer with the parameters of `flax.linen.Dense`.

    Attributes:
        features: Outputs.
        use_bias: Whether a bias is added.
        dtype: Type of the product.
        kernel_init: Initialiser of the kernel.
        columns: Work on the first of two dimensions instead of the last one.
    """

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Any = DENSE_INIT
    columns: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[0 if self.columns else -1], self.features))
        result = (project_columns if self.columns else project)(jnp.asarray(x, self.dtype), jnp.asarray(kernel))
        if not self.use_bias:
            return result
        bias = jnp.asarray(self.param("bias", nn.initializers.zeros, (self.features,)))
        return _add_bias(0 if self.columns else result.ndim - 1, result, bias)
