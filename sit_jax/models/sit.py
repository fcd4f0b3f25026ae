"""The self-slimmed vision transformer: a ViT with token slimming modules between its stages."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from sit_jax.models.slimming import TokenSlimming
from sit_jax.models.vit import ViT


class SiT(ViT):
    """A ViT whose patch tokens are merged into fewer ones behind every stage but the last.

    Parameters are those of the un-slimmed `ViT` under the same names, plus `slimming_{block}`; so a teacher's
    parameters fit into its student unchanged. Class and distillation tokens pass the slimming modules by.
    """

    def after_stage(
        self, block: int, stream: Float[Array, "batch tokens dim"]
    ) -> tuple[Float[Array, "batch kept dim"], Float[Array, "batch patches slim"] | None]:
        """Slims the patch tokens behind the last block of a stage."""
        kept = self.arch.slimming.get(block)
        if kept is None:
            return stream, None
        prefix = self.arch.num_prefix_tokens
        module = TokenSlimming(kept, self.dtype, name=f"slimming_{block}")
        slimmed, assignment = module(stream[:, prefix:])
        return jnp.concatenate([stream[:, :prefix], slimmed], axis=1), assignment
