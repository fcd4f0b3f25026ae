"""Top-K: keeps the tokens with the largest class attention, the baseline of Liang et al. (EViT, ICLR 2022)."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from sit_jax.models.reducers.base import Cues, Place, Reduced, is_among_largest, merge_groups, register_reducer


@register_reducer("topk")
class TopK(nn.Module):
    """Top-K: keeps the tokens to which the class token attends most, in the order of their indices; drops the others.

    The attention is the mean over the heads; without a class token, also over all queries. There are no parameters, and
    the choice has no gradient; the kept tokens have.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"class_attention"})
    place: ClassVar[Place] = "inside_block"
    dtype: DTypeLike = jnp.float32

    def __call__(self, cues: Cues, kept: int) -> Reduced:
        """Returns the kept tokens, with the mass that they have; the assignment is one-hot."""
        assert cues.class_attention is not None
        is_kept = is_among_largest(cues.class_attention, kept)
        return merge_groups(cues, jnp.where(is_kept, is_kept.cumsum(axis=1) - 1, -1), kept)
