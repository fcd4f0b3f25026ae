"""The matrix product of a linear layer in mixed precision, with weight gradients in float32."""

import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree


def keep_kernels(*arrays: Array | None, dtype: DTypeLike, inexact: bool = True) -> list[Array | None]:
    """Replaces Flax's `promote_dtype` in a linear layer: casts the first array, the inputs; kernel and bias stay."""
    inputs, *params = arrays
    return [*promote_dtype(inputs, dtype=dtype, inexact=inexact), *params]


def cast_kernels(tree: PyTree, dtype: DTypeLike) -> PyTree:
    """Returns variables with kernels cast to the type of the matrix products; the others keep their type."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray(x, dtype) if path[-1].key == "kernel" else x, tree
    )


def plain_dot_general(
    x: Array, kernel: Array, dimensions: object, precision: jax.lax.PrecisionLike = None, **_: object
) -> Array:
    """Computes `dot_general` with autodiff: in bfloat16, the kernel's gradient is rounded to bfloat16."""
    return jnp.tensordot(x, kernel.astype(x.dtype), 1, precision=precision, preferred_element_type=jnp.float32)


def dot_general(
    x: Array, kernel: Array, dimensions: object, precision: jax.lax.PrecisionLike = None, **_: object
) -> Array:
    """Computes the product of a layer's inputs with its kernel over the inputs' last axis, in float32.

    The operands have the type of the inputs in all three products, including those of the backward pass. Sums are
    float32, and the kernel's gradient is rounded only to the kernel's type, so not at all for float32 parameters.
    Autodiff rounds it to the inputs' type, or uses float32 operands.

    Args:
        x: Inputs, (..., inputs).
        kernel: (inputs, outputs), float32 or the type of the inputs.
        dimensions: Dimension numbers; must be those of a linear layer.
        precision: Precision of float32 products.
    """
    if x.dtype != jnp.float32:
        return _product(x, kernel)
    # Flattened to a matrix: for the kernel's gradient, XLA for CPUs transposes inputs with several leading axes, and
    # recomputes the operations that produce them.
    rows = plain_dot_general(x.reshape(-1, x.shape[-1]), kernel, dimensions, precision)
    return rows.reshape(*x.shape[:-1], kernel.shape[-1])


@jax.custom_vjp
def _product(x: Array, kernel: Array) -> Array:
    return plain_dot_general(x, kernel, dimensions=None)


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel), (x, kernel)


def _product_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = saved
    grad = grad.astype(x.dtype)
    to_x = jnp.tensordot(grad, kernel.astype(x.dtype), (-1, 1), preferred_element_type=jnp.float32).astype(x.dtype)
    lead = tuple(range(x.ndim - 1))
    return to_x, jnp.tensordot(x, grad, (lead, lead), preferred_element_type=kernel.dtype)


_product.defvjp(_product_forward, _product_backward)
