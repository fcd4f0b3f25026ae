"""Pools: from the tokens of the last block to one feature vector per image."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sit_jax.models.architecture import Architecture
from sit_jax.models.layers import TOKEN_INIT, Dense, Mlp, layer_norm


class Pool(nn.Module):
    """Pools the tokens to one feature vector per image, as `arch.pool` says."""

    arch: Architecture
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        prefix: Float[Array, "batch prefix dim"],
        patches: Float[Array, "batch patches dim"],
        mass: Float[Array, "batch _"],
    ) -> Float[Array, "batch features"]:
        """Pools prefix and patch tokens; a patch token counts as the `mass` patches that are merged into it."""
        arch = self.arch
        if arch.pool == "token":
            return prefix[:, 0]
        if arch.pool == "map":
            tokens = jnp.concatenate([prefix, patches], axis=1)
            masses = jnp.pad(mass, ((0, 0), (prefix.shape[1], 0)), constant_values=1)
            return AttentionPool(arch, self.dtype, name="map")(tokens, masses)
        weights = (mass / mass.sum(axis=1, keepdims=True)).astype(patches.dtype)
        mean = jnp.einsum("bk,bkc->bc", weights, patches)
        return mean if arch.pool == "avg" else jnp.concatenate([prefix[:, 0], mean], axis=-1)


class AttentionPool(nn.Module):
    """Attention of one learned query to all tokens, then an MLP with residual branch (SigLIP)."""

    arch: Architecture
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens dim"], mass: Float[Array, "batch tokens"]
    ) -> Float[Array, "batch dim"]:
        """Pools the tokens; the logarithm of a token's mass is added to its score."""
        arch, (batch, tokens, dim) = self.arch, x.shape
        heads, size = arch.num_heads, arch.dim // arch.num_heads
        latent = self.param("latent", TOKEN_INIT, (1, 1, dim))
        query = Dense(dim, dtype=self.dtype, name="q")(latent.astype(self.dtype)).reshape(heads, size)
        key, value = jnp.moveaxis(
            Dense(2 * dim, dtype=self.dtype, name="kv")(x).reshape(batch, tokens, 2, heads, size), 2, 0
        )
        scores = jnp.einsum("hd,bkhd->bhk", query, key, preferred_element_type=jnp.float32) * size**-0.5
        weights = nn.softmax(scores + jnp.log(mass)[:, None], axis=-1).astype(self.dtype)
        mixed = jnp.einsum("bhk,bkhd->bhd", weights, value).reshape(batch, dim)
        pooled = Dense(dim, dtype=self.dtype, name="proj")(mixed)
        normed = layer_norm(arch.norm_eps, self.dtype, "norm")(pooled)
        return pooled + Mlp(arch.mlp_hidden[1], dim, self.dtype, arch.activation, name="mlp")(normed)
