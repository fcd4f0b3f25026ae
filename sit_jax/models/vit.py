"""The vision transformer, with or without slimming, and the outputs of all models."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sit_jax.models.architecture import Architecture
from sit_jax.models.layers import TOKEN_INIT, Block, Dense, layer_norm
from sit_jax.models.pool import Pool
from sit_jax.models.reducers import evit, slim, tome, topk  # noqa: F401 (registers them)
from sit_jax.models.reducers.base import find_reducer, reduce_patches, weighs_attention
from sit_jax.models.rotary import grid_coordinates, merge_coordinates
from sit_jax.models.stems import Stem


class Outputs(NamedTuple):
    """Outputs of a forward pass in addition to the logits; `jit` prunes the unused ones.

    Attributes:
        tokens: Each block's patch tokens, (batch, tokens, dim), after the block's reducer.
        assignments: Each reducer's assignment, (batch, tokens, kept), in order; TSM's columns sum to one.
        distillation_logits: Logits of the distillation head, (batch, classes), or None if there is none.
        patch_logits: Logits of the auxiliary head for every patch, (batch, patches, classes), float32; None without
            that head, and in a slimmed model, whose tokens are not patches.
        features: Pooled features that the head reads, (batch, `arch.feature_dim`), float32.
        prefix_tokens: Class token, distillation token and registers after the last norm, (batch, prefix, dim).
        patch_tokens: Patch tokens after the last norm, (batch, tokens, dim).
    """

    tokens: tuple[Array, ...]
    assignments: tuple[Array, ...]
    distillation_logits: Array | None
    patch_logits: Array | None = None
    features: Array | None = None
    prefix_tokens: Array | None = None
    patch_tokens: Array | None = None


class ViT(nn.Module):
    """A vision transformer with any stem and optional token reducers between stages.

    A slimmed model has the parameters of its un-slimmed teacher under the same names, and `slimming_{block}`. Thus the
    parameters of a teacher can initialize its student. Prefix tokens (class token, registers) bypass the reducers.

    Attributes:
        arch: The model's architecture.
        drop_path: Stochastic depth rate of the last block; it grows linearly from 0 in the first block.
        dtype: Type of the matrix products: float32 or bfloat16. Softmax and norms are always
            computed in float32; logits are rounded to `dtype` and returned as float32.
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
        arch, prefix, slimming = self.arch, self.arch.num_prefix_tokens, self.arch.slimming
        labels_patches = arch.aux_head and not arch.is_slimmed and not logits_only
        pools_prefix = logits_only and arch.pool == "token"
        x = self._embed(images, train, token_mix)
        tokens: list[Array] = []
        assignments: list[Array] = []
        mass = jnp.ones((x.shape[0], arch.num_patches))
        coordinates = grid_coordinates(arch.grid) if arch.positions == "rope" else None
        reducer = find_reducer(arch.reducer) if slimming else None
        block_class = nn.remat(Block, static_argnums=(4, 5)) if self.remat and train else Block
        for block, rate in enumerate(np.linspace(0.0, self.drop_path, arch.depth, dtype=np.float32)):
            kept = slimming.get(block, 0)
            weighs = reducer is not None and bool(assignments) and weighs_attention(reducer)
            settings = (self.dtype, self.attention, float(rate), reducer if kept else None, kept, weighs)
            used = prefix if pools_prefix and block == arch.depth - 1 else None
            x, cues, reduced = block_class(arch, *settings, name=f"blocks_{block}")(x, mass, coordinates, train, used)
            if reducer is not None and cues is not None:
                x, reduced = reduce_patches(reducer(dtype=self.dtype, name=f"slimming_{block}"), x, cues, kept)
            if reduced is not None:
                mass = reduced.mass
                assignments.append(reduced.assignment)
                coordinates = None if coordinates is None else merge_coordinates(reduced.assignment, coordinates)
            tokens.append(x[:, prefix:])
        norm = layer_norm(arch.norm_eps, self.dtype, "norm")
        # Two calls, so that `jit` prunes the patch tokens where only the class token is used.
        prefix_tokens, patch_tokens = (y if arch.norm_after_pool else norm(y) for y in (x[:, :prefix], x[:, prefix:]))
        features = Pool(arch, self.dtype, name="pool")(prefix_tokens, patch_tokens, mass)
        if arch.norm_after_pool:
            features = norm(features)
        if arch.projection:
            features = Dense(arch.projection, use_bias=False, dtype=self.dtype, name="projection")(features)
        logits, distillation_logits = self._head("head", features), None
        if arch.distillation_token:
            distillation_logits = self._head("distillation_head", prefix_tokens[:, 1])
            logits = logits if train else (logits + distillation_logits) / 2
        patch_logits = self._head("aux_head", patch_tokens) if labels_patches else None
        if arch.aux_head and arch.is_slimmed and self.is_initializing():
            # A slimmed model keeps the head of its teacher for checkpoint compatibility.
            self._head("aux_head", patch_tokens[:, 0])
        return logits, Outputs(
            tuple(tokens),
            tuple(assignments),
            distillation_logits,
            patch_logits,
            features.astype(jnp.float32),
            prefix_tokens,
            patch_tokens,
        )

    def _embed(
        self,
        images: Float[Array, "batch height width channels"],
        train: bool,
        token_mix: Bool[Array, "batch patches"] | None,
    ) -> Float[Array, "batch tokens dim"]:
        """Returns the prefix tokens and the patch tokens, with positions added."""
        arch, batch = self.arch, images.shape[0]
        expected = (*arch.image_shape, arch.in_channels)
        if images.shape[1:] != expected:
            raise ValueError(f"images are {images.shape[1:]}, the model takes {expected}")
        stem = Stem(arch, self.dtype, self.batch_norm, name="stem")
        patches = stem(images.astype(self.dtype), train).reshape(batch, arch.num_patches, arch.dim)
        if token_mix is not None:
            patches = jnp.where(token_mix[:, :, None], patches[::-1], patches)
        prefix = [self._token("class_token")] if arch.class_token else []
        if arch.positions == "learned":
            positions = self._token("positions", arch.class_token + arch.num_patches)
            prefix = [token + positions[:, :1] for token in prefix]
            patches = patches + positions[:, arch.class_token :]
        if arch.distillation_token:
            prefix.append(self._token("distillation_token") + self._token("distillation_position"))
        if arch.registers:
            prefix.append(self._token("registers", arch.registers))
        repeated = [jnp.broadcast_to(token, (batch, *token.shape[1:])).astype(self.dtype) for token in prefix]
        x = jnp.concatenate([*repeated, patches.astype(self.dtype)], axis=1)
        return layer_norm(arch.norm_eps, self.dtype, "pre_norm")(x) if arch.pre_norm else x

    def _token(self, name: str, count: int = 1) -> Float[Array | np.ndarray, "1 count dim"]:
        token: Array | np.ndarray = self.param(name, TOKEN_INIT, (1, count, self.arch.dim))
        return token

    def _head(self, name: str, normed: Float[Array, "*lead dim"]) -> Float[Array, "*lead classes"]:
        if self.arch.num_classes == 0:
            return jnp.zeros((*normed.shape[:-1], 0))
        head = Dense(self.arch.num_classes, dtype=self.dtype, kernel_init=TOKEN_INIT, name=name)
        return head(normed).astype(jnp.float32)
