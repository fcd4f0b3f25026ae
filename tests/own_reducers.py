"""Reducers of a researcher's own, for tests."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from sit_jax.models.reducers.base import Cues, Place, Reduced, merge


class First(nn.Module):
    """Keeps the first tokens."""

    needs: ClassVar[frozenset[str]] = frozenset()
    place: ClassVar[Place] = "behind_block"
    dtype: Any = jnp.float32

    def __call__(self, cues: Cues, kept: int) -> Reduced:
        return merge(cues, jnp.eye(cues.tokens.shape[1], kept)[None].repeat(cues.tokens.shape[0], axis=0))


class FirstInside(First):
    """The same, before the block's MLP."""

    place: ClassVar[Place] = "inside_block"


class Misplaced(First):
    """At a place that there is not."""

    place = "behind"  # type: ignore[assignment]


class MostAttended(nn.Module):
    """Keeps what the class token attends to most, and looks at keys and mass."""

    needs: ClassVar[frozenset[str]] = frozenset({"class_attention", "keys"})
    place: ClassVar[Place] = "behind_block"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, cues: Cues, kept: int) -> Reduced:
        assert cues.class_attention is not None
        assert cues.keys is not None
        self.sow("intermediates", "cues", cues)
        _, index = jax.lax.top_k(cues.class_attention, kept)
        return merge(cues, jax.nn.one_hot(index, cues.tokens.shape[1], axis=1))


class Weighted(nn.Module):
    """Keeps the tokens of the largest learned score, inside the block, each times its score."""

    needs: ClassVar[frozenset[str]] = frozenset()
    place: ClassVar[Place] = "inside_block"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, cues: Cues, kept: int) -> Reduced:
        scores = nn.sigmoid(nn.Dense(1, name="score")(cues.tokens))[..., 0]
        values, index = jax.lax.top_k(scores, kept)
        return merge(cues, jax.nn.one_hot(index, cues.tokens.shape[1], axis=1) * values[:, None])
