"""The parts of a vision transformer: stems, attention, MLP, block, drop path, normalization.

Everything takes a `dtype` for the products and keeps softmax, statistics and parameters in float32.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sit_jax.models.architecture import Architecture
from sit_jax.ops.attention import ATTENTION
from sit_jax.ops.linear import dot_general, keep_kernels

TOKEN_INIT = nn.initializers.normal(0.02)
CONV_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# Glorot's rule, as ViT and big_vision have it: it fits narrow models too, for which the original's 0.02 is too small.
DENSE_INIT = nn.initializers.xavier_uniform()

# As CaiT and DeiT-III have it for models of up to 24 blocks.
LAYER_SCALE_INIT = 1e-4


class Dense(nn.Dense):
    """Flax's linear layer, with float32 sums, bias and weight gradients whatever the `dtype` of the product."""

    dtype: Any = jnp.float32
    kernel_init: Any = DENSE_INIT
    dot_general: Any = dot_general
    promote_dtype: Any = keep_kernels

    @nn.compact
    def __call__(self, inputs: Float[Array, "*lead inputs"]) -> Float[Array, "*lead outputs"]:
        """The product in `dtype`."""
        return super().__call__(inputs).astype(self.dtype)


def layer_norm(epsilon: float, dtype: Any, name: str) -> nn.LayerNorm:
    """LayerNorm in float32; the fast variance would lose digits on large means."""
    return nn.LayerNorm(epsilon, dtype=dtype, use_fast_variance=False, name=name)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exact GELU, as in PyTorch; Flax's default is the tanh approximation."""
    value = x.astype(jnp.float32)
    return (value * (0.5 + 0.5 * jax.lax.erf(value * 0.5**0.5))).astype(x.dtype)


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

    Attributes:
        arch: The model's shape.
        dtype: Type of the products.
        batch_norm: False where BatchNorm is folded into the convolutions, which then have a bias.
    """

    arch: Architecture
    dtype: Any = jnp.float32
    batch_norm: bool = True

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch rows columns dim"]:
        layers, side = self.arch.conv_stem_layers, self.arch.stem_projection
        x = images
        for index, (features, kernel, stride) in enumerate(layers, start=1):
            # Explicit padding: 'SAME' at stride 2 pads one side only, PyTorch's padding pads both.
            x = nn.Conv(
                features,
                (kernel, kernel),
                stride,
                padding=kernel // 2,
                use_bias=not self.batch_norm,
                dtype=self.dtype,
                kernel_init=CONV_INIT,
                name=f"conv{index}",
            )(x)
            if self.batch_norm:
                x = BatchNorm(dtype=self.dtype, name=f"bn{index}")(x, train)
            if side:
                x = nn.relu(x)
            elif index < len(layers):
                x = gelu(x)
        return _project_patches(self.arch, self.dtype, x) if side else x


class Attention(nn.Module):
    """Multi-head self-attention with softmax in float32.

    Attributes:
        num_heads: Heads; divides the width.
        qkv_bias: Whether queries, keys and values have a bias.
        dtype: Type of the products.
        implementation: Name of the softmax attention; see `sit_jax.ops.attention`.
    """

    num_heads: int
    qkv_bias: bool
    dtype: Any = jnp.float32
    implementation: str = "xla"

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens dim"], queries: int | None = None
    ) -> Float[Array, "batch queries dim"]:
        """Attends to all tokens from the first `queries` of them, or from all."""
        batch, tokens, dim = x.shape
        head_dim = dim // self.num_heads
        qkv = Dense(3 * dim, self.qkv_bias, self.dtype, name="qkv")(x)
        query, key, value = qkv.reshape(batch, tokens, 3, self.num_heads, head_dim).transpose(2, 0, 3, 1, 4)
        mixed = ATTENTION[self.implementation](query[:, :, :queries], key, value)
        mixed = mixed.transpose(0, 2, 1, 3).reshape(batch, -1, dim)
        return Dense(dim, dtype=self.dtype, name="proj")(mixed)


class Mlp(nn.Module):
    """Two linear layers with exact GELU between.

    Attributes:
        hidden_dim: Features between the layers.
        out_dim: Features of the result.
        dtype: Type of the products.
    """

    hidden_dim: int
    out_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*lead inputs"]) -> Float[Array, "*lead outputs"]:
        hidden = gelu(Dense(self.hidden_dim, dtype=self.dtype, name="fc1")(x))
        return Dense(self.out_dim, dtype=self.dtype, name="fc2")(hidden)


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

    Attributes:
        arch: The model's shape.
        dtype: Type of the products.
        attention: Name of the softmax attention; see `sit_jax.ops.attention`.
    """

    arch: Architecture
    dtype: Any = jnp.float32
    attention: str = "xla"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens dim"],
        drop_rate: float | Float[Array, ""] = 0.0,
        key: Array | None = None,
        used: int | None = None,
    ) -> Float[Array, "batch used dim"]:
        """Transforms the tokens.

        Args:
            x: Tokens.
            drop_rate: Rate of drop path on both branches, where there is a key.
            key: Random key; None drops nothing.
            used: Only the first so many tokens are computed; all where None.
        """
        arch = self.arch
        keys = (None, None) if key is None else jax.random.split(key)
        normed = layer_norm(arch.norm_eps, self.dtype, "norm1")(x)
        attention = Attention(arch.num_heads, arch.qkv_bias, self.dtype, self.attention, name="attn")
        branch = self._scale(attention(normed, used), "layer_scale1")
        x = x[:, :used] + drop_path(branch, drop_rate, keys[0]) / arch.residual_scale
        normed = layer_norm(arch.norm_eps, self.dtype, "norm2")(x)
        branch = Mlp(int(arch.dim * arch.mlp_ratio), arch.dim, self.dtype, name="mlp")(normed)
        branch = self._scale(branch, "layer_scale2")
        return x + drop_path(branch, drop_rate, keys[1]) / arch.residual_scale

    def _scale(self, branch: Float[Array, "batch tokens dim"], name: str) -> Float[Array, "batch tokens dim"]:
        if not self.arch.layer_scale:
            return branch
        factor = self.param(name, nn.initializers.constant(LAYER_SCALE_INIT), (self.arch.dim,))
        return (branch * factor[None, None]).astype(self.dtype)
