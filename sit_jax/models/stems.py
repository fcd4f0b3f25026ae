"""Stems, which map an image to patch tokens, and their BatchNorm."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sit_jax.models.architecture import Architecture
from sit_jax.models.layers import gelu
from sit_jax.models.trees import Params

CONV_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class BatchNorm(nn.Module):
    """BatchNorm as in PyTorch: the running variance is unbiased, whereas that of `flax.linen.BatchNorm` is biased.

    Under `jit`, a batch that is sharded over a mesh has the statistics of the global batch.

    Attributes:
        momentum: Fraction of the old running value that is kept (PyTorch's 0.1 is 0.9 here).
    """

    dtype: DTypeLike = jnp.float32
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


class Stem(nn.Module):
    """The stem: the layers before the first block.

    `conv4` has four 3x3 convolutions of stride 2, `conv6` has two more of stride 1 (the paper's models). Each is
    followed by BatchNorm and, except for the last, by GELU. `conv7` has one 7x7 convolution of stride 2 and two 3x3
    ones, each followed by BatchNorm and ReLU, and a projection of 8x8 patches (`4_2` in LV-ViT's token-labelling
    repository). `patch` is only the projection: one strided convolution (ViT's patch embedding).

    Attributes:
        batch_norm: False if BatchNorm is folded into the convolutions, which then have a bias.
    """

    arch: Architecture
    dtype: DTypeLike = jnp.float32
    batch_norm: bool = True

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch rows columns dim"]:
        conv = functools.partial(nn.Conv, dtype=self.dtype, kernel_init=CONV_INIT)
        layers, side = self.arch.conv_stem_layers, self.arch.stem_projection
        x = images
        for index, (features, kernel, stride) in enumerate(layers, start=1):
            # Explicit padding: 'SAME' at stride 2 pads one side only, PyTorch's padding pads both.
            size, padding = (kernel, kernel), kernel // 2
            x = conv(features, size, stride, padding, use_bias=not self.batch_norm, name=f"conv{index}")(x)
            if self.batch_norm:
                x = BatchNorm(dtype=self.dtype, name=f"bn{index}")(x, train)
            if side or index < len(layers):
                x = nn.relu(x) if side else gelu(x)
        if not side:
            return x
        bias = self.arch.patch_bias
        return conv(self.arch.dim, (side, side), side, "VALID", use_bias=bias, name="proj")(x)


def fold_batch_norm(params: Params, batch_stats: Params) -> Params:
    """Returns the parameters of an equivalent ViT without BatchNorm, for evaluation.

    The parameters are returned unchanged if `batch_stats` is empty.
    """
    if not batch_stats:
        return params
    stem = dict(params["stem"])
    for name, running in batch_stats["stem"].items():
        norm, conv = stem.pop(name), name.replace("bn", "conv")
        factor = norm["scale"] / jnp.sqrt(running["var"] + BatchNorm.epsilon)
        bias = norm["bias"] - running["mean"] * factor
        stem[conv] = {"kernel": stem[conv]["kernel"] * factor[None, None, None], "bias": bias}
    return {**params, "stem": stem}
