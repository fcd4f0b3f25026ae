"""Linear layers and the MLP of two of them, written so that forward and backward pass both reach the fast kernels.

Left to itself, autodiff asks for weight gradients over several dimensions at a time, and XLA copies an operand into
another order for each of them. Here everything is a product of two matrices, and rows stay as they lie in memory.

XLA for CPUs has two libraries for products, and the faster one takes a left matrix only as it lies in memory, its rows
contracted over their length. It is also the only one with kernels for bfloat16: what it does not take is computed in
float32, four to five times as slowly on a CPU with AMX. So there the left matrix is turned round first.

Operands have the type of the computation, sums and biases are float32, and results are rounded once. Weights are
float32 masters: they are cast here, and their gradient is not rounded on its way back to them.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sit_jax.models.gelu import exact_gelu, gelu_and_slope

# Glorot's rule, as ViT and big_vision have it: it fits narrow models too, for which the original's 0.02 is too small.
DENSE_INIT = nn.initializers.xavier_uniform()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear(
    columns: bool,
    x: Float[Array, "..."],
    kernel: Float[Array, "inputs outputs"],
    bias: Float[Array, " outputs"] | None,
) -> Float[Array, "..."]:
    """A linear layer, in the type of x.

    Args:
        columns: Whether it works on the first of x's two dimensions, `kernel.T @ x`, rather than on the last one.
        x: (..., inputs), or (inputs, columns).
        kernel: In float32.
        bias: In float32, if any.
    """
    return _affine(columns, x, kernel, bias).astype(x.dtype)


def _linear_forward(
    columns: bool, x: Array, kernel: Array, bias: Array | None
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    return linear(columns, x, kernel, bias), (x, kernel, bias)


def _linear_backward(
    columns: bool, kept: tuple[Array, Array, Array | None], gradient: Array
) -> tuple[Array, Array, Array | None]:
    x, kernel, bias = kept
    to_x = _to_input(columns, kernel, gradient).astype(x.dtype)
    return to_x, _to_kernel(columns, x, gradient), None if bias is None else _to_bias(columns, gradient)


linear.defvjp(_linear_forward, _linear_backward)


def gelu_mlp(
    columns: bool,
    x: Float[Array, "..."],
    kernel1: Float[Array, "inputs hidden"],
    bias1: Float[Array, " hidden"],
    kernel2: Float[Array, "hidden outputs"],
    bias2: Float[Array, " outputs"],
) -> Float[Array, "..."]:
    """Two linear layers with exact GELU between, in the type of x; the arguments are those of `linear`.

    Of what lies between, only GELU's input is kept for the backward pass, in the type of x: GELU and its slope come
    from it in one pass.
    """
    if columns:
        return _matrix_mlp(columns, x, kernel1, bias1, kernel2, bias2)
    return _matrix_mlp(columns, _rows(x), kernel1, bias1, kernel2, bias2).reshape(*x.shape[:-1], kernel2.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matrix_mlp(columns: bool, x: Array, kernel1: Array, bias1: Array, kernel2: Array, bias2: Array) -> Array:
    return linear(columns, exact_gelu(linear(columns, x, kernel1, bias1)), kernel2, bias2)


def _mlp_forward(
    columns: bool, x: Array, kernel1: Array, bias1: Array, kernel2: Array, bias2: Array
) -> tuple[Array, tuple[Array, ...]]:
    # Without the barrier XLA keeps the float32 result of the product, too, or instead.
    hidden = jax.lax.optimization_barrier(linear(columns, x, kernel1, bias1))
    return linear(columns, exact_gelu(hidden), kernel2, bias2), (x, hidden, kernel1, kernel2)


def _mlp_backward(columns: bool, kept: tuple[Array, ...], gradient: Array) -> tuple[Array, ...]:
    x, hidden, kernel1, kernel2 = kept
    active, slope = gelu_and_slope(hidden)
    # Rounded when it is the slope's product, not before.
    to_hidden = (_to_input(columns, kernel2, gradient) * slope).astype(x.dtype)
    to_x = _to_input(columns, kernel1, to_hidden).astype(x.dtype)
    to_kernel1 = _to_kernel(columns, x, to_hidden)
    to_kernel2 = _to_kernel(columns, active.astype(x.dtype), gradient)
    return to_x, to_kernel1, _to_bias(columns, to_hidden), to_kernel2, _to_bias(columns, gradient)


_matrix_mlp.defvjp(_mlp_forward, _mlp_backward)


def _affine(columns: bool, x: Array, kernel: Array, bias: Array | None) -> Array:
    """The layer's result in float32."""
    kernel = kernel.astype(x.dtype)
    if columns:
        result = dot_turned(kernel, x)
        return result if bias is None else result + bias[:, None]
    result = _dot(_rows(x), kernel, 1, 0)
    result = result if bias is None else result + bias[None]
    return result.reshape(*x.shape[:-1], kernel.shape[1])


def _to_input(columns: bool, kernel: Array, gradient: Array) -> Array:
    """The gradient of the layer's input, in float32."""
    kernel = kernel.astype(gradient.dtype)
    if columns:
        return _dot(kernel, gradient, 1, 0)
    return _dot(_rows(gradient), kernel, 1, 1).reshape(*gradient.shape[:-1], kernel.shape[0])


def _to_kernel(columns: bool, x: Array, gradient: Array) -> Array:
    """The gradient of the layer's kernel, in float32."""
    return _dot(x, gradient, 1, 1) if columns else dot_turned(_rows(x), _rows(gradient))


def _to_bias(columns: bool, gradient: Array) -> Array:
    """The gradient of the layer's bias, in float32."""
    values = gradient.astype(jnp.float32)
    return values.sum(axis=1) if columns else _rows(values).sum(axis=0)


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _dot(left: Array, right: Array, left_dim: int, right_dim: int) -> Array:
    dimensions = (((left_dim,), (right_dim,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def dot_turned(left: Array, right: Array) -> Array:
    """`left.T @ right`; in bfloat16 on a CPU, `left` is turned round in memory first."""
    rows, columns = left.shape
    piece = next((size for size in (16, 8, 4, 2, 3, 5, 7) if columns % size == 0 and size < columns), 0)

    def plain(left: Array, right: Array) -> Array:
        return _dot(left, right, 0, 0)

    def turned(left: Array, right: Array) -> Array:
        # XLA puts a plain transpose back into the product; one of three dimensions it leaves alone.
        columns_first = left.reshape(rows, -1, piece).transpose(1, 2, 0).reshape(columns, rows)
        return _dot(columns_first, right, 1, 0)

    # In float32 both of XLA's libraries take equally long.
    if left.dtype != jnp.bfloat16 or not piece or rows == 1:
        return plain(left, right)
    result: Array = jax.lax.platform_dependent(left, right, cpu=turned, default=plain)
    return result


class Weights(nn.Module):
    """The parameters of `flax.linen.Dense`, by the same names, without the product.

    Attributes:
        inputs: Features that go in.
        features: Features that come out.
    """

    inputs: int
    features: int

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "inputs outputs"], Float[Array, " outputs"]]:
        """The kernel and the bias."""
        return _kernel(self, DENSE_INIT, self.inputs, self.features), _bias(self, self.features)


class Dense(nn.Module):
    """A linear layer with the parameters of `flax.linen.Dense`.

    Attributes:
        features: Outputs.
        use_bias: Whether a bias is added.
        dtype: Type of the product.
        kernel_init: Initialiser of the kernel.
    """

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Any = DENSE_INIT

    @nn.compact
    def __call__(self, x: Float[Array, "*lead inputs"]) -> Float[Array, "*lead outputs"]:
        kernel = _kernel(self, self.kernel_init, x.shape[-1], self.features)
        bias = _bias(self, self.features) if self.use_bias else None
        return linear(False, jnp.asarray(x, self.dtype), kernel, bias)


def _kernel(module: nn.Module, init: Any, inputs: int, outputs: int) -> Array:
    return jnp.asarray(module.param("kernel", init, (inputs, outputs)))


def _bias(module: nn.Module, outputs: int) -> Array:
    return jnp.asarray(module.param("bias", nn.initializers.zeros, (outputs,)))


class Mlp(nn.Module):
    """Two linear layers with exact GELU between, with the parameters of `flax.linen.Dense` layers `fc1` and `fc2`.

    Attributes:
        hidden_dim: Features between the layers.
        out_dim: Features that come out.
        dtype: Type of the products.
        columns: Work on the first of two dimensions instead of the last one.
    """

    hidden_dim: int
    out_dim: int
    dtype: Any = jnp.float32
    columns: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        inputs = x.shape[0 if self.columns else -1]
        first = Weights(inputs, self.hidden_dim, name="fc1")()
        second = Weights(self.hidden_dim, self.out_dim, name="fc2")()
        return gelu_mlp(self.columns, jnp.asarray(x, self.dtype), *first, *second)
