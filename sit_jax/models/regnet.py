"""RegNetY, the convolutional teacher of the distillation token (Radosavovic et al. 2020; DeiT uses RegNetY-16GF)."""

import dataclasses
import functools
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sit_jax.errors import require
from sit_jax.models.layers import Dense
from sit_jax.models.stems import CONV_INIT, BatchNorm
from sit_jax.models.vit import Outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegNetArchitecture:
    """Architecture of a RegNetY.

    Attributes:
        family: Distinguishes this architecture from a vision transformer.
        image_size: Height and width of the input in pixels.
        in_channels: Channels of the input image.
        num_classes: Width of the classification head; 0 means that the data determines it.
        stem_width: Channels of the stride-2 stem.
        widths: Channels of each stage; each halves the resolution.
        depths: Blocks of each stage.
        group_width: Channels per group of the 3x3 convolutions; divides every width.
        squeeze_ratio: Width of the squeeze-and-excitation bottleneck, relative to the block's input width.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    family: Literal["regnet"] = "regnet"
    image_size: int = 224
    in_channels: int = 3
    num_classes: int = 1000
    stem_width: int = 32
    widths: tuple[int, ...] = (224, 448, 1232, 3024)
    depths: tuple[int, ...] = (2, 4, 11, 1)
    group_width: int = 112
    squeeze_ratio: float = 0.25

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        object.__setattr__(self, "depths", tuple(self.depths))
        same = len(self.widths) == len(self.depths) > 0
        require(same, "depths", f"{self.depths} and widths {self.widths} must name the same stages")
        divides = all(width % self.group_width == 0 for width in self.widths)
        require(divides, "widths", f"{self.widths} do not divide by group_width {self.group_width}")
        stride = 2 ** (len(self.widths) + 1)
        problem = f"{self.image_size} does not divide by the stages' stride {stride}"
        require(self.image_size % stride == 0, "image_size", problem)

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""
        return self.image_size, self.image_size


class _ConvNorm(nn.Module):
    features: int
    kernel: int
    stride: int = 1
    groups: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"], train: bool) -> Float[Array, "batch h w dim"]:
        size, padding = (self.kernel, self.kernel), self.kernel // 2
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=CONV_INIT, name="conv")
        x = conv(self.features, size, self.stride, padding, feature_group_count=self.groups)(x)
        return BatchNorm(dtype=self.dtype, name="bn")(x, train)


class _Block(nn.Module):
    features: int
    stride: int
    groups: int
    squeeze: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"], train: bool) -> Float[Array, "batch h w dim"]:
        shortcut = x
        if x.shape[-1] != self.features or self.stride != 1:
            shortcut = _ConvNorm(self.features, 1, self.stride, dtype=self.dtype, name="downsample")(x, train)
        x = jax.nn.relu(_ConvNorm(self.features, 1, dtype=self.dtype, name="conv1")(x, train))
        x = jax.nn.relu(_ConvNorm(self.features, 3, self.stride, self.groups, dtype=self.dtype, name="conv2")(x, train))
        gate = x.mean(axis=(1, 2), keepdims=True)
        gate = jax.nn.relu(nn.Conv(self.squeeze, (1, 1), dtype=self.dtype, name="squeeze")(gate))
        x = x * jax.nn.sigmoid(nn.Conv(self.features, (1, 1), dtype=self.dtype, name="excite")(gate))
        x = _ConvNorm(self.features, 1, dtype=self.dtype, name="conv3")(x, train)
        return jax.nn.relu(x + shortcut)


class RegNetY(nn.Module):
    """RegNetY: a stride-2 stem, then stages of bottleneck blocks with grouped convolutions and squeeze-excitation."""

    arch: RegNetArchitecture
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> tuple[Float[Array, "batch classes"], Outputs]:
        """Returns logits (batch, classes) in float32, and `Outputs` with only `patch_logits`.

        `patch_logits` is the output of the head at every position of the last feature map.
        """
        arch = self.arch
        x = images.astype(self.dtype)
        x = jax.nn.relu(_ConvNorm(arch.stem_width, 3, 2, dtype=self.dtype, name="stem")(x, train))
        for stage, (width, depth) in enumerate(zip(arch.widths, arch.depths, strict=True)):
            for index in range(depth):
                squeeze = round(x.shape[-1] * arch.squeeze_ratio)
                stride = 2 if index == 0 else 1
                groups = width // arch.group_width
                block = _Block(width, stride, groups, squeeze, self.dtype, name=f"stage{stage}_block{index}")
                x = block(x, train)
        head = Dense(arch.num_classes, dtype=self.dtype, name="head")
        logits = head(x.mean(axis=(1, 2))).astype(jnp.float32)
        patch_logits = head(x.reshape(x.shape[0], -1, x.shape[-1])).astype(jnp.float32)
        return logits, Outputs((), (), None, patch_logits)
