"""EViT: Liang et al., *Not All Patches are What You Need*, ICLR 2022, sections 3.2 and 3.3."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from sit_jax.models.reducers.base import Cues, Place, Reduced, is_among_largest, merge_groups, register_reducer


@register_reducer("evit")
class AttentiveFusion(nn.Module):
    """EViT: keeps the tokens to which the class token attends most, and fuses the others into one token.

    Of the K kept tokens, K - 1 are those with the largest attention, in the order of their indices. The last one is the
    sum of all others, each times its attention, as in the paper: these weights do not sum to one. If all tokens are
    kept, none is fused. The attention is the mean over the heads; without a class token, also over all queries. There
    are no parameters; the attention has a gradient through the fused token.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"class_attention"})
    place: ClassVar[Place] = "inside_block"
    dtype: DTypeLike = jnp.float32

    def __call__(self, cues: Cues, kept: int) -> Reduced:
        """Returns the kept tokens; the mass sums to that of the input."""
        assert cues.class_attention is not None
        tokens = cues.tokens.shape[1]
        is_kept = is_among_largest(cues.class_attention, kept if kept == tokens else kept - 1)
        groups = jnp.where(is_kept, is_kept.cumsum(axis=1) - 1, kept - 1)
        return merge_groups(cues, groups, kept, jnp.where(is_kept, 1.0, cues.class_attention))
