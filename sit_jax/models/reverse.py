"""Reverse token slimming (RTSM), used only in training: section 3.2 of the paper."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sit_jax.models.architecture import Architecture
from sit_jax.models.layers import Mlp, layer_norm
from sit_jax.models.reducers.slim import SLIMMING_NORM_EPS
from sit_jax.models.trees import Params
from sit_jax.ops.eager_grad import with_eager_grad

Error = Callable[[Array, Array], Array]


class ReverseTokenSlimming(nn.Module):
    """RTSM: recovers the full grid of `num_tokens` from fewer tokens, with an MLP over tokens and one over channels."""

    num_tokens: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch kept dim"]) -> Float[Array, "batch tokens dim"]:
        channels = x.shape[-1]
        normed = layer_norm(SLIMMING_NORM_EPS, self.dtype, "norm1")(x)
        across = Mlp(4 * self.num_tokens, self.num_tokens, self.dtype, name="token_mlp")(normed.swapaxes(1, 2))
        recovered = across.swapaxes(1, 2)
        normed = layer_norm(SLIMMING_NORM_EPS, self.dtype, "norm2")(recovered)
        return recovered + Mlp(4 * channels, channels, self.dtype, name="channel_mlp")(normed)


class ReverseSlimming(nn.Module):
    """One RTSM per block from the first slimmed block on; the blocks before it have the full grid already.

    This is a separate module with its own parameters, so that deployed models do not include it.
    """

    arch: Architecture
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: tuple[Float[Array, "batch _ dim"], ...]
    ) -> tuple[Float[Array, "batch patches dim"], ...]:
        """Recovers each block's patch tokens (after its TSM) to `num_patches`."""
        first, patches = self.arch.first_reversed_block, self.arch.num_patches
        blocks = range(first, self.arch.depth)
        modules = {block: ReverseTokenSlimming(patches, self.dtype, name=f"blocks_{block}") for block in blocks}
        return (*tokens[:first], *(modules[block](tokens[block]) for block in blocks))

    def errors(self, tokens: Sequence[Array], targets: Sequence[Array], error: Error) -> list[Array]:
        """Returns the error of each block's recovered tokens against the teacher's, computed sequentially.

        Args:
            tokens: Each block's patch tokens, (batch, tokens, dim).
            targets: Patch tokens of each block of the teacher, (batch, patches, dim); they get no gradient.
            error: Maps (recovered, target) to a scalar. Pass the same function object each time, since it is compared.
        """
        first = self.arch.first_reversed_block
        module = ReverseTokenSlimming(self.arch.num_patches, self.dtype, parent=None)

        def recovery_error(params: Params, x: Array, target: Array) -> Array:
            return error(module.bind({"params": params})(x), jax.lax.stop_gradient(target))

        # This frees a block's recovered tokens before the next block's are computed.
        recovery_error = with_eager_grad(recovery_error)
        found = [error(mine, theirs) for mine, theirs in zip(tokens[:first], targets, strict=False)]
        for block in range(first, self.arch.depth):
            params: Params = self.get_variable("params", f"blocks_{block}")
            found.append(recovery_error(params, tokens[block], targets[block]))
        return found
