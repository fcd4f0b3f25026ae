"""Token slimming (TSM) and its training-only reverse (RTSM): sections 3.1 and 3.2 of the paper."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sit_jax.models.architecture import Architecture
from sit_jax.models.gelu import exact_gelu
from sit_jax.models.layers import LayerNorm, dense
from sit_jax.models.products import Mlp

Error = Callable[[Array, Array], Array]

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
        hidden = LayerNorm(SLIMMING_NORM_EPS, self.dtype, name="norm")(x)
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
        batch, kept, channels = x.shape
        normed = LayerNorm(SLIMMING_NORM_EPS, self.dtype, name="norm1")(x)
        # Tokens first, then all channels of all examples as columns: whole rows move, and no matrix is transposed.
        columns = jnp.swapaxes(normed, 0, 1).reshape(kept, batch * channels)
        across = Mlp(4 * self.num_tokens, self.num_tokens, self.dtype, columns=True, name="token_mlp")(columns)
        recovered = jnp.swapaxes(across.reshape(self.num_tokens, batch, channels), 0, 1)
        normed = LayerNorm(SLIMMING_NORM_EPS, self.dtype, name="norm2")(recovered)
        return recovered + Mlp(4 * channels, channels, self.dtype, name="channel_mlp")(normed)


class ReverseSlimming(nn.Module):
    """One RTSM per block from the first slimmed block on; blocks before it already hold the full grid.

    A module of its own with its own parameters: what is deployed has no trace of it.

    Attributes:
        arch: The student's shape.
        dtype: Type of the products.
        scan: Compile the modules of blocks with equally many tokens once and loop over them in `errors`.
    """

    arch: Architecture
    dtype: Any = jnp.float32
    scan: bool = False

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
        """How far each block's recovered tokens are from the teacher's, one block worked off after the other.

        Args:
            tokens: Each block's patch tokens, (batch, tokens, dim).
            targets: The teacher's, (batch, patches, dim); they get no gradient.
            error: (recovered, target) -> a scalar. The same function for the same thing, since it is compared.
        """
        first, depth = self.arch.first_reversed_block, self.arch.depth
        module = ReverseTokenSlimming(self.arch.num_patches, self.dtype, parent=None)
        found = [error(mine, theirs) for mine, theirs in zip(tokens[:first], targets, strict=False)]
        for _, group in itertools.groupby(range(first, depth), lambda block: tokens[block].shape[1]):
            each: list[Any] = [(self.get_variable("params", f"blocks_{i}"), tokens[i], targets[i]) for i in group]
            if not self.scan or len(each) == 1:
                found += [_recovery_error(module, error, *arguments) for arguments in each]
                continue
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
            found += list(jax.lax.map(lambda arguments: _recovery_error(module, error, *arguments), stacked))
        return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recovery_error(module: ReverseTokenSlimming, error: Error, params: Any, x: Array, target: Array) -> Array:
    """The error of one block's recovered tokens.

    Its gradients are worked out along with it: a scalar's are known up to a factor. So the recovered tokens, and all
    that led to them, are gone before the next block's turn, and nothing is computed twice.
    """
    recovered: Any = module.apply({"params": params}, x)
    return error(recovered, target)


def _error_forward(
    module: ReverseTokenSlimming, error: Error, params: Any, x: Array, target: Array
) -> tuple[Array, tuple[Any, Array]]:
    value, slopes = jax.value_and_grad(_recovery_error.fun, argnums=(2, 3))(module, error, params, x, target)
    return value, slopes


def _error_backward(module: Any, error: Error, slopes: tuple[Any, Array], factor: Array) -> tuple[Any, Array, None]:
    params, x = jax.tree.map(lambda slope: (slope * factor).astype(slope.dtype), slopes)
    return params, x, None


_recovery_error.defvjp(_error_forward, _error_backward)
