"""The vision transformer, and what every model here returns."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sit_jax.models.architecture import Architecture
from sit_jax.models.layers import TOKEN_INIT, Block, ConvStem, PatchStem, dense, layer_norm


class Outputs(NamedTuple):
    """What a forward pass leaves besides its logits; `jit` prunes what is unused.

    Attributes:
        tokens: Each block's patch tokens, (batch, tokens, dim), after the slimming module behind the block.
        assignments: Each slimming module's assignment, (batch, tokens, kept), columns summing to one; in order.
        distillation_logits: Logits of the distillation head, (batch, classes), or None where there is none.
    """

    tokens: tuple[Array, ...]
    assignments: tuple[Array, ...]
    distillation_logits: Array | None


class ViT(nn.Module):
    """A vision transformer with class token, learned positions and any of the stems.

    Subclasses change the patch tokens between blocks by overriding `between_blocks`.

    Attributes:
        arch: The model's shape.
        drop_path: Stochastic depth of the last block; it grows linearly from 0 at the first.
        dtype: Type of the products: float32 or bfloat16. Softmax, norms and logits stay float32.
        remat: Recompute each block's activations in the backward pass instead of keeping them.
    """

    arch: Architecture
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> tuple[Float[Array, "batch classes"], Outputs]:
        """Runs the model.

        Args:
            images: Normalised images, NHWC, of the architecture's size and channels.
            train: Batch statistics and drop path (rng `drop_path`) where True.

        Returns:
            Logits (batch, classes) in float32 and `Outputs`. With a distillation token the logits are the class head's
            in training and the mean of both heads in evaluation.
        """
        arch = self.arch
        patches, prefix = self._embed(images, train)
        rates = np.linspace(0.0, self.drop_path, arch.depth)
        block_type = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        tokens: list[Array] = []
        assignments: list[Array] = []
        stream = jnp.concatenate([prefix, patches], axis=1)
        for index in range(arch.depth):
            stream = block_type(arch, float(rates[index]), self.dtype, name=f"blocks_{index}")(stream, train)
            stream, assignment = self.between_blocks(index, stream)
            tokens.append(stream[:, arch.num_prefix_tokens :])
            if assignment is not None:
                assignments.append(assignment)
        normed = layer_norm(arch.norm_eps, self.dtype, "norm")(stream[:, : arch.num_prefix_tokens])
        logits, distillation_logits = self._heads(normed, train)
        return logits, Outputs(tuple(tokens), tuple(assignments), distillation_logits)

    def between_blocks(
        self, block: int, stream: Float[Array, "batch tokens dim"]
    ) -> tuple[Float[Array, "batch kept dim"], Float[Array, "batch patches slim"] | None]:
        """What happens to the tokens after a block: nothing here."""
        return stream, None

    def _embed(
        self, images: Float[Array, "batch height width channels"], train: bool
    ) -> tuple[Float[Array, "batch patches dim"], Float[Array, "batch prefix dim"]]:
        """The patch tokens and the prefix tokens, positions added."""
        arch = self.arch
        expected = (arch.image_size, arch.image_size, arch.in_channels)
        if images.shape[1:] != expected:
            raise ValueError(f"images are {images.shape[1:]}, the model takes {expected}")
        stem = (PatchStem if arch.stem == "patch" else ConvStem)(arch, self.dtype, name="stem")
        patches = stem(images.astype(self.dtype), train).reshape(images.shape[0], arch.num_patches, arch.dim)
        class_token = self.param("class_token", TOKEN_INIT, (1, 1, arch.dim))
        positions = self.param("positions", TOKEN_INIT, (1, 1 + arch.num_patches, arch.dim))
        prefix = class_token + positions[:, :1]
        if arch.distillation_token:
            token = self.param("distillation_token", TOKEN_INIT, (1, 1, arch.dim))
            position = self.param("distillation_position", TOKEN_INIT, (1, 1, arch.dim))
            prefix = jnp.concatenate([prefix, token + position], axis=1)
        prefix = jnp.broadcast_to(prefix, (images.shape[0], *prefix.shape[1:])).astype(self.dtype)
        return patches + positions[:, 1:].astype(self.dtype), prefix

    def _heads(
        self, normed: Float[Array, "batch prefix dim"], train: bool
    ) -> tuple[Float[Array, "batch classes"], Float[Array, "batch classes"] | None]:
        arch = self.arch
        logits = dense(arch.num_classes, self.dtype, "head")(normed[:, 0]).astype(jnp.float32)
        if arch.aux_head and self.is_initializing():
            # Carried for the checkpoints' sake and never used: token-labelled teachers have it.
            dense(arch.num_classes, self.dtype, "aux_head")(normed[:, 0])
        if not arch.distillation_token:
            return logits, None
        head = dense(arch.num_classes, self.dtype, "distillation_head")
        distillation_logits = head(normed[:, 1]).astype(jnp.float32)
        return (logits if train else (logits + distillation_logits) / 2), distillation_logits
