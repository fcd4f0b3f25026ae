"""Token slimming (TSM), the paper's reducer: section 3.1."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from sit_jax.models.layers import Dense, gelu, layer_norm
from sit_jax.models.reducers.base import Cues, Place, Reduced, merge, register_reducer

# The original leaves PyTorch's default epsilon in TSM and RTSM, whatever the blocks use.
SLIMMING_NORM_EPS = 1e-5


@register_reducer("slim")
class TokenSlimming(nn.Module):
    """TSM: merges N patch tokens softly into fewer ones.

    `A = softmax over the N tokens of scale * W2 GELU(W1 LN(X))` and `X' = A^T X` on the un-normalised tokens, so every
    kept token is a convex combination of the tokens before it.

    Attributes:
        dtype: Type of the products; the softmax is float32.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    place: ClassVar[Place] = "behind_block"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, cues: Cues, kept: int) -> Reduced:
        """The kept tokens; the columns of the assignment each sum to one."""
        hidden = layer_norm(SLIMMING_NORM_EPS, self.dtype, "norm")(cues.tokens)
        hidden = gelu(Dense(hidden.shape[-1] // 2, dtype=self.dtype, name="fc1")(hidden))
        scores = Dense(kept, dtype=self.dtype, name="fc2")(hidden).astype(jnp.float32)
        scale = self.param("scale", nn.initializers.ones, ())
        return merge(cues, jax.nn.softmax(scores * scale, axis=1))
