"""The parts of a vision transformer: stems, attention, block, drop path, normalisation.

Everything takes a `dtype` for the products and keeps softmax, statistics and parameters in float32.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sit_jax.models.architecture import Architecture
from sit_jax.models.convolution import Halving
from sit_jax.models.gelu import exact_gelu
from sit_jax.models.products import DENSE_INIT, Dense, Mlp

TOKEN_INIT = nn.initializers.normal(0.02)
CONV_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

# As CaiT and DeiT-III have it for models of up to 24 blocks.
LAYER_SCALE_INIT = 1e-4


def dense(features: int, dtype: jnp.dtype, name: str, use_bias: bool = True, head: bool = False) -> Dense:
    """A linear layer; `head` starts a classification head near zero."""
    init = TOKEN_INIT if head else DENSE_INIT
    return Dense(features, use_bias=use_bias, dtype=dtype, kernel_init=init, name=name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def normalise(
    epsilon: float, dtype: Any, x: Float[Array, "*lead dim"], scale: Float[Array, " dim"], bias: Float[Array, " dim"]
) -> Float[Array, "*lead dim"]:
    """LayerNorm over the last dimension, in float32, as `dtype`.

    The variance is the two-pass one, since the fast one loses digits on large means. Of the backward pass autodiff
    makes more sums and more passes than it takes.
    """
    return _normalise_forward(epsilon, dtype, x, scale, bias)[0]


def _normalise_forward(
    epsilon: float, dtype: Any, x: Array, scale: Array, bias: Array
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    values = x.astype(jnp.float32)
    mean = values.mean(axis=-1, keepdims=True)
    centred = values - mean
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + epsilon)
    result = centred * (inverse * _last(scale, x)) + _last(bias, x)
    return result.astype(dtype), (x, mean, inverse, scale)


def _normalise_backward(
    epsilon: float, dtype: Any, kept: tuple[Array, Array, Array, Array], gradient: Array
) -> tuple[Array, Array, Array]:
    x, mean, inverse, scale = kept
    slopes = gradient.astype(jnp.float32)
    normed = (x.astype(jnp.float32) - mean) * inverse
    along = slopes * _last(scale, x)
    shift, stretch = along.mean(axis=-1, keepdims=True), (along * normed).mean(axis=-1, keepdims=True)
    lead = tuple(range(x.ndim - 1))
    to_x = (inverse * (along - shift - normed * stretch)).astype(x.dtype)
    return to_x, (slopes * normed).sum(axis=lead), slopes.sum(axis=lead)


normalise.defvjp(_normalise_forward, _normalise_backward)


def _last(vector: Array, x: Array) -> Array:
    """A vector as an array that broadcasts against x along its last dimension."""
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))


class LayerNorm(nn.Module):
    """LayerNorm with the parameters of `flax.linen.LayerNorm`.

    Attributes:
        epsilon: Added to the variance.
        dtype: Type of the result; all else is float32.
    """

    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*lead dim"]) -> Float[Array, "*lead dim"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return normalise(self.epsilon, self.dtype, x, jnp.asarray(scale), jnp.asarray(bias))


class BatchNorm(nn.Module):
    """BatchNorm as PyTorch keeps it: the running variance is the unbiased one, which `flax.linen.BatchNorm` has biased.

    Under `jit` a batch sharded over a mesh gives the statistics of the global batch.

    Attributes:
        dtype: Type of the result; statistics are float32.
        momentum: Share of the old running value that is kept (PyTorch's 0.1 is 0.9 here).
        epsilon: Added to the variance.
    """

    dtype: Any = jnp.float32
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width dim"], train: bool
    ) -> Float[Array, "batch height width dim"]:
        features = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, features)
        bias = self.param("bias", nn.initializers.zeros, features)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, features)
        running_var = self.variable("batch_stats", "var", jnp.ones, features)
        if train:
            values = x.astype(jnp.float32)
            mean = values.mean(axis=(0, 1, 2))
            var = jnp.square(values - mean[None, None, None]).mean(axis=(0, 1, 2))
            if not self.is_initializing():
                count = x.size // x.shape[-1]
                unbiased = var * (count / max(1, count - 1))
                running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
                running_var.value = self.momentum * running_var.value + (1 - self.momentum) * unbiased
        else:
            mean, var = running_mean.value, running_var.value
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        shift = bias - mean * factor
        return (x * factor[None, None, None] + shift[None, None, None]).astype(self.dtype)


def _project_patches(arch: Architecture, dtype: jnp.dtype, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The strided convolution `proj` of the module that calls: one token per patch."""
    size = (arch.stem_projection,) * 2
    return nn.Conv(arch.dim, size, size, "VALID", dtype=dtype, kernel_init=CONV_INIT, name="proj")(x)


class PatchStem(nn.Module):
    """One strided convolution that turns each patch into a token (ViT's patch embedding)."""

    arch: Architecture
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch rows columns dim"]:
        return _project_patches(self.arch, self.dtype, images)


class ConvStem(nn.Module):
    """The convolutional stems.

    `conv4` has four 3x3 convolutions of stride 2, `conv6` two of stride 1 besides (the paper's models); each is
    followed by BatchNorm, and by GELU but for the last. `conv7` has one 7x7 convolution of stride 2 and two 3x3 ones,
    each followed by BatchNorm and ReLU, and a projection of 8x8 patches (`4_2` in LV-ViT's token-labelling repository).
    """

    arch: Architecture
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch rows columns dim"]:
        layers, side = self.arch.conv_stem_layers, self.arch.stem_projection
        x = images
        for index, (features, kernel, stride) in enumerate(layers, start=1):
            # Explicit padding: 'SAME' at stride 2 pads one side only, PyTorch's padding pads both.
            window, padding = (kernel, kernel), kernel // 2
            conv: nn.Module = nn.Conv(features, window, stride, padding, use_bias=False, dtype=self.dtype)
            if (kernel, stride) == (3, 2) and x.shape[1] % 2 == x.shape[2] % 2 == 0:
                conv = Halving(features, self.dtype)
            x = conv.copy(kernel_init=CONV_INIT, name=f"conv{index}")(x)
            x = BatchNorm(dtype=self.dtype, name=f"bn{index}")(x, train)
            if side:
                x = nn.relu(x)
            elif index < len(layers):
                x = exact_gelu(x)
        return _project_patches(self.arch, self.dtype, x) if side else x


@jax.custom_vjp
def attend(
    query: Float[Array, "batch heads tokens size"],
    key: Float[Array, "batch heads others size"],
    value: Float[Array, "batch heads others size"],
) -> Float[Array, "batch heads tokens size"]:
    """Attention with softmax in float32, heads before tokens.

    The sum of the exponentials divides the result, which is smaller than the weights. And on CPU the products run
    several times faster in this order of dimensions, without a softmax fused into them.
    """
    return _attend_forward(query, key, value)[0]


def _attend_forward(query: Array, key: Array, value: Array) -> tuple[Array, tuple[Array, ...]]:
    scaled = query * query.shape[-1] ** -0.5
    scores = _einsum("bhqd,bhkd->bhqk", scaled, key)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(value.dtype)
    mixed = (_einsum("bhqk,bhkd->bhqd", weights, value) / total).astype(value.dtype)
    return mixed, (scaled, key, value, weights, total, mixed)


def _attend_backward(kept: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array]:
    scaled, key, value, weights, total, mixed = kept
    dtype = value.dtype
    shares = weights / total
    along = (gradient.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    slopes = (shares * (_einsum("bhqd,bhkd->bhqk", gradient, value) - along)).astype(dtype)
    to_query = _einsum("bhqk,bhkd->bhqd", slopes, key) * scaled.shape[-1] ** -0.5
    to_key = _einsum("bhqk,bhqd->bhkd", slopes, scaled)
    to_value = _einsum("bhqk,bhqd->bhkd", shares.astype(dtype), gradient)
    return to_query.astype(dtype), to_key.astype(dtype), to_value.astype(dtype)


def _einsum(spec: str, left: Array, right: Array) -> Array:
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)


attend.defvjp(_attend_forward, _attend_backward)


class Attention(nn.Module):
    """Multi-head self-attention with softmax in float32."""

    num_heads: int
    qkv_bias: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        batch, tokens, dim = x.shape
        head_dim = dim // self.num_heads
        qkv = dense(3 * dim, self.dtype, "qkv", self.qkv_bias)(x)
        query, key, value = qkv.reshape(batch, tokens, 3, self.num_heads, head_dim).transpose(2, 0, 3, 1, 4)
        mixed = attend(query, key, value).transpose(0, 2, 1, 3).reshape(batch, tokens, dim)
        return dense(dim, self.dtype, "proj")(mixed)


def drop_path(
    branch: Float[Array, "batch tokens dim"], rate: float | Float[Array, ""], key: Array | None
) -> Float[Array, "batch tokens dim"]:
    """Stochastic depth: drops a residual branch per example and scales the others up.

    Args:
        branch: The residual branch.
        rate: Share of the examples that lose it.
        key: Random key; None drops nothing.
    """
    if key is None:
        return branch
    keep = 1.0 - rate
    kept = jax.random.bernoulli(key, keep, (branch.shape[0], 1, 1))
    return branch * (kept / keep).astype(branch.dtype)


class Block(nn.Module):
    """Pre-norm transformer block whose residual branches are divided by the residual scale.

    With layer scale they are first multiplied by a learned factor per channel.
    """

    arch: Architecture
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens dim"],
        drop_rate: float | Float[Array, ""] = 0.0,
        key: Array | None = None,
    ) -> Float[Array, "batch tokens dim"]:
        """Transforms the tokens; with a key, drop path of the given rate applies to both branches."""
        arch = self.arch
        keys = (None, None) if key is None else jax.random.split(key)
        normed = LayerNorm(arch.norm_eps, self.dtype, name="norm1")(x)
        branch = self._scale(Attention(arch.num_heads, arch.qkv_bias, self.dtype, name="attn")(normed), "layer_scale1")
        x = x + drop_path(branch, drop_rate, keys[0]) / arch.residual_scale
        normed = LayerNorm(arch.norm_eps, self.dtype, name="norm2")(x)
        branch = Mlp(int(arch.dim * arch.mlp_ratio), arch.dim, self.dtype, name="mlp")(normed)
        branch = self._scale(branch, "layer_scale2")
        return x + drop_path(branch, drop_rate, keys[1]) / arch.residual_scale

    def _scale(self, branch: Float[Array, "batch tokens dim"], name: str) -> Float[Array, "batch tokens dim"]:
        if not self.arch.layer_scale:
            return branch
        factor = self.param(name, nn.initializers.constant(LAYER_SCALE_INIT), (self.arch.dim,))
        return (branch * factor[None, None]).astype(self.dtype)
