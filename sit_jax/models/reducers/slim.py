"""Token slimming (TSM), the paper's reducer: section 3.1."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sit_jax.models.layers import Dense, gelu, layer_norm
from sit_jax.models.reducers.base import Cues, Place, Reduced, merge, register_reducer
from sit_jax.models.trees import Params

# The original uses PyTorch's default epsilon in TSM and RTSM, independent of the blocks' epsilon.
SLIMMING_NORM_EPS = 1e-5


@register_reducer("slim")
class TokenSlimming(nn.Module):
    """TSM: softly merges N patch tokens into fewer tokens.

    `A = softmax over the N tokens of scale * W2 GELU(W1 LN(X))` and `X' = A^T X` on the un-normalized tokens, so each
    kept token is a convex combination of the input tokens. The softmax is float32.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    place: ClassVar[Place] = "behind_block"
    dtype: DTypeLike = jnp.float32

    @staticmethod
    def first_tokens(params: Params, kept: int) -> Params:
        """Returns the parameters of a module with only the first kept tokens, which are the same as before.

        Each kept token has a column of its own in the assignment, and the softmax is over the input tokens.
        """
        return {**params, "fc2": {name: values[..., :kept] for name, values in params["fc2"].items()}}

    @nn.compact
    def __call__(self, cues: Cues, kept: int) -> Reduced:
        """Returns the kept tokens; each column of the assignment sums to one."""
        hidden = layer_norm(SLIMMING_NORM_EPS, self.dtype, "norm")(cues.tokens)
        hidden = gelu(Dense(hidden.shape[-1] // 2, dtype=self.dtype, name="fc1")(hidden))
        scores = Dense(kept, dtype=self.dtype, name="fc2")(hidden).astype(jnp.float32)
        scale = self.param("scale", nn.initializers.ones, ())
        return merge(cues, jax.nn.softmax(scores * scale, axis=1))
