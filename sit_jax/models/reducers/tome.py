"""Token merging (ToMe): Bolya et al., *Token Merging: Your ViT But Faster*, ICLR 2023, section 3."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sit_jax.models.reducers.base import Cues, Place, Reduced, is_among_largest, merge_groups, register_reducer

# Keeps the cosine of a key without length finite.
_SHORTEST = 1e-12


@register_reducer("tome")
class TokenMerging(nn.Module):
    """ToMe: merges the pairs of tokens with the most similar keys, by bipartite soft matching.

    The tokens are split alternately into sets A (the first, third, ...) and B. Each token of A is paired with the token
    of B whose key, the mean over the heads, is most similar by cosine. The most similar pairs are merged, as a mean
    weighted by mass; one token of B may take several of A. Kept tokens stay in the order of their indices, a merged
    token at the place of B. A reduction to less than half is done in rounds: each halves the tokens, up to the last.

    There are no parameters, and the choice of pairs has no gradient; the merged tokens have.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    place: ClassVar[Place] = "inside_block"
    weighs_attention: ClassVar[bool] = True
    dtype: DTypeLike = jnp.float32

    def __call__(self, cues: Cues, kept: int) -> Reduced:
        """Returns the kept tokens; each column of the assignment sums to one, and the mass to that of the input."""
        assert cues.keys is not None
        return merge_groups(cues, match(cues.keys.astype(jnp.float32), cues.mass, kept), kept)


def match(
    keys: Float[Array, "batch tokens size"], mass: Float[Array, "batch tokens"], kept: int
) -> Int[Array, "batch tokens"]:
    """Returns the index of the kept token that each token is merged into."""
    tokens = keys.shape[1]
    count = max(kept, tokens // 2)
    groups = _match_once(keys, count)
    if count == kept:
        return groups
    merged = merge_groups(Cues(keys, None, None, mass), groups, count)
    return jnp.take_along_axis(match(merged.tokens, merged.mass, kept), groups, axis=1)


def _match_once(keys: Float[Array, "batch tokens size"], kept: int) -> Int[Array, "batch tokens"]:
    """Returns the groups of one round, which keeps at least half of the tokens."""
    batch, tokens, _ = keys.shape
    index = jnp.broadcast_to(jnp.arange(tokens), (batch, tokens))
    if kept == tokens:
        return index
    unit = keys / jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), _SHORTEST)
    similarity = jnp.einsum("bic,bjc->bij", unit[:, ::2], unit[:, 1::2])
    is_merged = is_among_largest(similarity.max(axis=2), tokens - kept)
    first, second = index[:, ::2], index[:, 1::2]
    target = jnp.where(is_merged, 2 * similarity.argmax(axis=2) + 1, first)
    is_kept = _interleave(~is_merged, jnp.ones_like(second, dtype=bool))
    # Merged tokens of A have their rank replaced by that of their partner.
    rank = is_kept.cumsum(axis=1) - 1
    return jnp.take_along_axis(rank, _interleave(target, second), axis=1)


def _interleave(first: Array, second: Array) -> Array:
    """Returns a row whose elements are alternately those of two rows; the first may have one more."""
    count = first.shape[1] + second.shape[1]
    second = jnp.pad(second, ((0, 0), (0, first.shape[1] - second.shape[1])))
    return jnp.stack([first, second], axis=2).reshape(first.shape[0], -1)[:, :count]
