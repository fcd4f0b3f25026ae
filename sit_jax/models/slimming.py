"""Token slimming (TSM) and its training-only reverse (RTSM): sections 3.1 and 3.2 of the paper."""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sit_jax.models.architecture import Architecture
from sit_jax.models.layers import Mlp, dense, exact_gelu, layer_norm

# The original leaves PyTorch's default epsilon in the slimming and reverse modules, whatever the blocks use.
SLIMMING_NORM_EPS = 1e-5


class TokenSlimming(nn.Module):
    """TSM: merges N patch tokens softly into fewer ones.

    `A = softmax over the N tokens of scale * W2 GELU(W1 LN(X))` and `X' = A^T X` on the un-normalised stream, so every
    kept token is a convex combination of the tokens before it.

    Attributes:
        kept_tokens: Number K of tokens that come out.
        dtype: Type of the products; the softmax is float32.
    """

    kept_tokens: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens dim"]
    ) -> tuple[Float[Array, "batch kept dim"], Float[Array, "batch tokens kept"]]:
        """Returns the kept tokens and the assignment matrix, whose columns each sum to one."""
        hidden = layer_norm(SLIMMING_NORM_EPS, self.dtype, "norm")(x)
        hidden = exact_gelu(dense(x.shape[-1] // 2, self.dtype, "fc1")(hidden))
        scores = dense(self.kept_tokens, self.dtype, "fc2")(hidden).astype(jnp.float32)
        scale = self.param("scale", nn.initializers.ones, ())
        assignment = jax.nn.softmax(scores * scale, axis=1)
        kept = jnp.einsum("bnk,bnc->bkc", assignment.astype(self.dtype), x.astype(self.dtype))
        return kept, assignment


class ReverseTokenSlimming(nn.Module):
    """RTSM: recovers the full grid of N tokens from K kept ones, with an MLP over tokens, then one over channels.

    Attributes:
        num_tokens: Number N of tokens that come out.
        dtype: Type of the products.
    """

    num_tokens: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch kept dim"]) -> Float[Array, "batch tokens dim"]:
        channels = x.shape[-1]
        across = jnp.swapaxes(layer_norm(SLIMMING_NORM_EPS, self.dtype, "norm1")(x), 1, 2)
        recovered = Mlp(4 * self.num_tokens, self.num_tokens, self.dtype, name="token_mlp")(across)
        recovered = jnp.swapaxes(recovered, 1, 2)
        normed = layer_norm(SLIMMING_NORM_EPS, self.dtype, "norm2")(recovered)
        return recovered + Mlp(4 * channels, channels, self.dtype, name="channel_mlp")(normed)


class ReverseSlimming(nn.Module):
    """One RTSM per block from the first slimmed block on; blocks before it already hold the full grid.

    A module of its own with its own parameters: what is deployed has no trace of it.

    Attributes:
        arch: The student's shape.
        dtype: Type of the products.
        scan: Compile the modules of blocks with equally many tokens once and loop over them.
        remat: Recompute each module's activations in the backward pass instead of keeping them.
    """

    arch: Architecture
    dtype: Any = jnp.float32
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(
        self, tokens: tuple[Float[Array, "batch _ dim"], ...]
    ) -> tuple[Float[Array, "batch patches dim"], ...]:
        """Recovers each block's patch tokens (after its TSM) to `num_patches`."""
        first = self.arch.first_reversed_block
        recovered = list(tokens[:first])
        for _, group in itertools.groupby(range(first, self.arch.depth), lambda block: tokens[block].shape[1]):
            recovered += self._recover(list(group), tokens)
        return tuple(recovered)

    def _recover(self, blocks: list[int], tokens: tuple[Array, ...]) -> list[Array]:
        """Recovers the tokens of blocks that all have equally many."""
        patches = self.arch.num_patches
        if not self.scan or len(blocks) == 1 or self.is_initializing():
            kind = nn.remat(ReverseTokenSlimming) if self.remat else ReverseTokenSlimming
            return [kind(patches, self.dtype, name=f"blocks_{block}")(tokens[block]) for block in blocks]
        module = ReverseTokenSlimming(patches, self.dtype, parent=None)

        def body(carry: None, inputs: Any) -> tuple[None, Array]:
            params, x = inputs
            result: Any = module.apply({"params": params}, x)
            return None, result

        params: list[Any] = [self.get_variable("params", f"blocks_{block}") for block in blocks]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
        inputs = (stacked, jnp.stack([tokens[block] for block in blocks]))
        return list(jax.lax.scan(jax.checkpoint(body) if self.remat else body, None, inputs)[1])
