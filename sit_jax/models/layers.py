"""The parts of a vision transformer: stems, attention, MLP, block, drop path, normalisation.

Everything takes a `dtype` for the products and keeps softmax, statistics and parameters in float32.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sit_jax.models.architecture import Architecture
from sit_jax.models.convolution import Halving
from sit_jax.models.products import DENSE_INIT, Dense

TOKEN_INIT = nn.initializers.normal(0.02)
CONV_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

# As CaiT and DeiT-III have it for models of up to 24 blocks.
LAYER_SCALE_INIT = 1e-4


def dense(features: int, dtype: jnp.dtype, name: str, use_bias: bool = True, head: bool = False) -> Dense:
    """A linear layer; `head` starts a classification head near zero."""
    init = TOKEN_INIT if head else DENSE_INIT
    return Dense(features, use_bias=use_bias, dtype=dtype, kernel_init=init, name=name)


def layer_norm(epsilon: float, dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    """LayerNorm with float32 statistics; the two-pass variance, since the fast one loses digits on large means."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


@jax.custom_vjp
def exact_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU by the error function (Flax's default is the tanh approximation), computed in float32.

    As in PyTorch, `x / 2 * (1 + erf(x / sqrt 2))`: JAX's own takes `erfc`, which on CPU works out two branches, and its
    derivative runs over the array four times and keeps three more of them. Here the backward pass is one pass over `x`.
    """
    value = x.astype(jnp.float32)
    return (value * _normal_share(value)).astype(x.dtype)


def _gelu_forward(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    return exact_gelu(x), x


def _gelu_backward(x: Float[Array, "..."], gradient: Float[Array, "..."]) -> tuple[Float[Array, "..."]]:
    value = x.astype(jnp.float32)
    slope = _normal_share(value) + value * jnp.exp(-0.5 * value * value) / math.sqrt(2 * math.pi)
    return ((gradient.astype(jnp.float32) * slope).astype(x.dtype),)


def _normal_share(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The share of the normal distribution that lies below x."""
    return 0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))


exact_gelu.defvjp(_gelu_forward, _gelu_backward)


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


class Mlp(nn.Module):
    """Two linear layers with exact GELU between.

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
        layers = [Dense(n, dtype=self.dtype, columns=self.columns) for n in (self.hidden_dim, self.out_dim)]
        return layers[1].copy(name="fc2")(exact_gelu(layers[0].copy(name="fc1")(x)))


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
        normed = layer_norm(arch.norm_eps, self.dtype, "norm1")(x)
        branch = self._scale(Attention(arch.num_heads, arch.qkv_bias, self.dtype, name="attn")(normed), "layer_scale1")
        x = x + drop_path(branch, drop_rate, keys[0]) / arch.residual_scale
        normed = layer_norm(arch.norm_eps, self.dtype, "norm2")(x)
        branch = Mlp(int(arch.dim * arch.mlp_ratio), arch.dim, self.dtype, name="mlp")(normed)
        branch = self._scale(branch, "layer_scale2")
        return x + drop_path(branch, drop_rate, keys[1]) / arch.residual_scale

    def _scale(self, branch: Float[Array, "batch tokens dim"], name: str) -> Float[Array, "batch tokens dim"]:
        if not self.arch.layer_scale:
            return branch
        factor = self.param(name, nn.initializers.constant(LAYER_SCALE_INIT), (self.arch.dim,))
        return (branch * factor[None, None]).astype(self.dtype)
