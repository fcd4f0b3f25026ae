"""The vision transformer, with or without slimming, and the outputs of all models."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sit_jax.models.architecture import Architecture
from sit_jax.models.layers import TOKEN_INIT, Block, Dense, layer_norm
from sit_jax.models.reducers import slim as _slim  # noqa: F401 (registers it)
from sit_jax.models.reducers.base import find_reducer, reduce_patches
from sit_jax.models.stems import Stem


class Outputs(NamedTuple):
    """Outputs of a forward pass in addition to the logits; `jit` prunes the unused ones.

    Attributes:
        tokens: Each block's patch tokens, (batch, tokens, dim), after the block's reducer.
        assignments: Each reducer's assignment, (batch, tokens, kept), in order; TSM's columns sum to one.
        distillation_logits: Logits of the distillation head, (batch, classes), or None if there is none.
        patch_logits: Logits of the auxiliary head for every patch, (batch, patches, classes), float32; None without
            that head, and in a slimmed model, whose tokens are not patches.
    """

    tokens: tuple[Array, ...]
    assignments: tuple[Array, ...]
    distillation_logits: Array | None
    patch_logits: Array | None = None


class ViT(nn.Module):
    """A vision transformer with class token, learned positions, any stem, and optional token reducers between stages.

    A slimmed model has the parameters of its un-slimmed teacher under the same names, and `slimming_{block}`. Thus the
    parameters of a teacher can initialize its student. Class and distillation tokens bypass the reducers.

    Attributes:
        arch: The model's architecture.
        drop_path: Stochastic depth rate of the last block; it grows linearly from 0 in the first block.
        dtype: Type of the matrix products: float32 or bfloat16. Softmax, norms and logits are always float32.
        remat: Whether to recompute each block's activations in the backward pass.
        attention: Name of the softmax attention; see `sit_jax.ops.attention`.
        batch_norm: False if BatchNorm is folded into the stem's convolutions; see `fold_batch_norm`.
    """

    arch: Architecture
    drop_path: float = 0.0
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    attention: str = "xla"
    batch_norm: bool = True

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        train: bool = False,
        token_mix: Bool[Array, "batch patches"] | None = None,
        logits_only: bool = False,
    ) -> tuple[Float[Array, "batch classes"], Outputs]:
        """Applies the model.

        Args:
            images: Normalized images, NHWC, of the architecture's size and channels.
            train: Whether to use batch statistics and drop path (rng `drop_path`).
            token_mix: True for patches to replace, after the stem, with those of the image at the mirrored position of
                the batch (LV-ViT's MixToken).
            logits_only: Whether the last block computes only the prefix tokens: the last of `Outputs.tokens` is then
                empty, and there are no patch logits.

        Returns:
            Logits (batch, classes) in float32, and `Outputs`. With a distillation token, the logits are those of the
            class head in training, and the mean of both heads in evaluation.
        """
        arch, prefix_tokens, slimming = self.arch, self.arch.num_prefix_tokens, self.arch.slimming
        labels_patches = arch.aux_head and not arch.is_slimmed and not logits_only
        x = self._embed(images, train, token_mix)
        tokens: list[Array] = []
        assignments: list[Array] = []
        mass = jnp.ones((x.shape[0], arch.num_patches))
        reducer = find_reducer(arch.reducer) if slimming else None
        block_class = nn.remat(Block, static_argnums=(3, 4)) if self.remat and train else Block
        for block, rate in enumerate(np.linspace(0.0, self.drop_path, arch.depth, dtype=np.float32)):
            kept = slimming.get(block, 0)
            settings = (self.dtype, self.attention, float(rate), reducer if kept else None, kept)
            used = prefix_tokens if logits_only and block == arch.depth - 1 else None
            x, cues, reduced = block_class(arch, *settings, name=f"blocks_{block}")(x, mass, train, used)
            if reducer is not None and cues is not None:
                x, reduced = reduce_patches(reducer(dtype=self.dtype, name=f"slimming_{block}"), x, cues, kept)
            if reduced is not None:
                mass = reduced.mass
                assignments.append(reduced.assignment)
            tokens.append(x[:, prefix_tokens:])
        read = x if labels_patches else x[:, :prefix_tokens]
        normed = layer_norm(arch.norm_eps, self.dtype, "norm")(read)
        logits, distillation_logits = self._head("head", normed[:, 0]), None
        if arch.distillation_token:
            distillation_logits = self._head("distillation_head", normed[:, 1])
            logits = logits if train else (logits + distillation_logits) / 2
        patch_logits = self._head("aux_head", normed[:, prefix_tokens:]) if labels_patches else None
        if arch.aux_head and arch.is_slimmed and self.is_initializing():
            # A slimmed model keeps the head of its teacher for checkpoint compatibility.
            self._head("aux_head", normed[:, 0])
        return logits, Outputs(tuple(tokens), tuple(assignments), distillation_logits, patch_logits)

    def _embed(
        self,
        images: Float[Array, "batch height width channels"],
        train: bool,
        token_mix: Bool[Array, "batch patches"] | None,
    ) -> Float[Array, "batch tokens dim"]:
        """Returns the prefix tokens and the patch tokens, with positions added."""
        arch, batch = self.arch, images.shape[0]
        expected = (arch.image_size, arch.image_size, arch.in_channels)
        if images.shape[1:] != expected:
            raise ValueError(f"images are {images.shape[1:]}, the model takes {expected}")
        stem = Stem(arch, self.dtype, self.batch_norm, name="stem")
        patches = stem(images.astype(self.dtype), train).reshape(batch, arch.num_patches, arch.dim)
        if token_mix is not None:
            patches = jnp.where(token_mix[:, :, None], patches[::-1], patches)
        class_token = self.param("class_token", TOKEN_INIT, (1, 1, arch.dim))
        positions = self.param("positions", TOKEN_INIT, (1, 1 + arch.num_patches, arch.dim))
        prefix = class_token + positions[:, :1]
        if arch.distillation_token:
            token = self.param("distillation_token", TOKEN_INIT, (1, 1, arch.dim))
            position = self.param("distillation_position", TOKEN_INIT, (1, 1, arch.dim))
            prefix = jnp.concatenate([prefix, token + position], axis=1)
        prefix = jnp.broadcast_to(prefix, (batch, *prefix.shape[1:])).astype(self.dtype)
        return jnp.concatenate([prefix, (patches + positions[:, 1:]).astype(self.dtype)], axis=1)

    def _head(self, name: str, normed: Float[Array, "*lead dim"]) -> Float[Array, "*lead classes"]:
        head = Dense(self.arch.num_classes, dtype=self.dtype, kernel_init=TOKEN_INIT, name=name)
        return head(normed).astype(jnp.float32)
