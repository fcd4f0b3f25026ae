"""The strided 3x3 convolution of the stems, with a backward pass that CPUs are fast at.

XLA's convolutions for CPU take two to five times as long for the gradients as the products in them. There they are
written as products; elsewhere the libraries' own are better.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sit_jax.models.products import dot_turned


@jax.custom_vjp
def halve(
    x: Float[Array, "batch height width inputs"], kernel: Float[Array, "3 3 inputs outputs"]
) -> Float[Array, "batch rows columns outputs"]:
    """A 3x3 convolution of stride 2 and padding 1, in the type of x; height and width are even."""
    return _convolve(x, kernel.astype(x.dtype))


def _convolve(x: Array, kernel: Array) -> Array:
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=dimensions)


def _halve_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return halve(x, kernel), (x, kernel)


def _halve_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept

    def products(x: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
        return _to_input(kernel.astype(x.dtype), gradient), _to_kernel(x, gradient)

    def convolutions(x: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
        to_input, to_kernel = jax.vjp(_convolve, x, kernel.astype(x.dtype))[1](gradient)
        return to_input, to_kernel.astype(kernel.dtype)

    slopes: tuple[Array, Array] = jax.lax.platform_dependent(x, kernel, gradient, cpu=products, default=convolutions)
    return slopes


halve.defvjp(_halve_forward, _halve_backward)


def _to_kernel(x: Array, gradient: Array) -> Array:
    """The kernel's gradient, a product for each of its rows."""
    batch, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    # Neighbours in a row lie next to one another: two of the three columns are one piece.
    pairs = padded.reshape(batch, height // 2 + 1, 2, width // 2 + 1, 2 * channels)
    slopes = gradient.reshape(-1, gradient.shape[-1])
    rows = []
    for row in (pairs[:, :-1, 0], pairs[:, :-1, 1], pairs[:, 1:, 0]):
        window = jnp.concatenate([row[:, :, :-1], row[:, :, 1:, :channels]], axis=-1)
        flat = window.reshape(-1, 3 * channels)
        rows.append(dot_turned(flat, slopes))
    return jnp.stack(rows).reshape(3, 3, channels, -1)


def _to_input(kernel: Array, gradient: Array) -> Array:
    """The input's gradient: every place of the output spreads over nine of the input, of which some overlap."""
    batch, height, width, outputs = gradient.shape
    channels = kernel.shape[2]
    weights = kernel.transpose(3, 0, 1, 2).reshape(outputs, -1)
    spread = jnp.matmul(gradient.reshape(-1, outputs), weights, preferred_element_type=jnp.float32)
    tap = spread.reshape(batch, height, width, 3, 3, channels)

    def after(values: Array, down: int, right: int) -> Array:
        """The values of the next row or column; zeros behind the last."""
        return jnp.pad(values, ((0, 0), (0, down), (0, right), (0, 0)))[:, down:, right:]

    even = tap[:, :, :, 1, 1], tap[:, :, :, 1, 2] + after(tap[:, :, :, 1, 0], 0, 1)
    left = tap[:, :, :, 2, 1] + after(tap[:, :, :, 0, 1], 1, 0)
    right = tap[:, :, :, 2, 2] + after(tap[:, :, :, 2, 0], 0, 1)
    right = right + after(tap[:, :, :, 0, 2], 1, 0) + after(tap[:, :, :, 0, 0], 1, 1)
    result = jnp.stack([jnp.stack(even, 3), jnp.stack([left, right], 3)], 2)
    return result.reshape(batch, 2 * height, 2 * width, channels).astype(gradient.dtype)


class Halving(nn.Module):
    """`halve` with the parameters of `flax.linen.Conv` without bias.

    Attributes:
        features: Channels that come out.
        dtype: Type of the products.
        kernel_init: Initialiser of the kernel.
    """

    features: int
    dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width inputs"]) -> Float[Array, "batch rows columns outputs"]:
        kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features))
        return halve(jnp.asarray(x, self.dtype), jnp.asarray(kernel))
