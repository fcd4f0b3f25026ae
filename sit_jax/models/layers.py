"""Layers of a transformer block: linear layer, normalization, attention, MLP.

`dtype` is the type of the matrix products; softmax, statistics and parameters are always float32.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sit_jax.models.architecture import Activation, Architecture
from sit_jax.models.reducers.base import Cues, Reduced, ReducerFactory, reduce_patches
from sit_jax.models.rotary import Rotation, rotary_positions, rotate
from sit_jax.ops.attention import ATTENTION
from sit_jax.ops.linear import dot_general, keep_kernels

TOKEN_INIT = nn.initializers.normal(0.02)
# Glorot initialization, as in ViT and big_vision; it also suits narrow models, for which the original's 0.02 is too
# small.
DENSE_INIT = nn.initializers.xavier_uniform()

# As in CaiT and DeiT-III for models of up to 24 blocks.
LAYER_SCALE_INIT = 1e-4


class Dense(nn.Dense):
    """Flax's linear layer, with float32 sums, bias and weight gradients for every `dtype` of the product."""

    dtype: DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = DENSE_INIT
    dot_general: Callable[..., Array] = dot_general
    promote_dtype: Callable[..., list[Array | None]] = keep_kernels

    @nn.compact
    def __call__(self, inputs: Float[Array, "*lead inputs"]) -> Float[Array, "*lead outputs"]:
        """Computes the product in `dtype`."""
        return super().__call__(inputs).astype(self.dtype)


def layer_norm(epsilon: float, dtype: DTypeLike, name: str | None) -> nn.LayerNorm:
    """Returns a LayerNorm in float32, without the fast variance, which is inaccurate for large means."""
    return nn.LayerNorm(epsilon, dtype=dtype, use_fast_variance=False, name=name)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes exact GELU, as in PyTorch; Flax's default is the tanh approximation."""
    value = x.astype(jnp.float32)
    return (value * (0.5 + 0.5 * jax.lax.erf(value * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": nn.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


class Attention(nn.Module):
    """Multi-head self-attention with softmax in float32.

    Attributes:
        implementation: Name of the softmax attention; see `sit_jax.ops.attention`.
        needs: Values that a reducer needs in addition to the result; see `sit_jax.models.reducers.base`.
    """

    arch: Architecture
    dtype: DTypeLike = jnp.float32
    implementation: str = "xla"
    needs: frozenset[str] = frozenset()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens dim"],
        queries: int | None = None,
        rotation: Rotation | None = None,
        mass: Float[Array, "batch tokens"] | None = None,
    ) -> tuple[Float[Array, "batch queries dim"], Float[Array, "batch tokens size"] | None, Array | None]:
        """Attends from the first `queries` tokens, or from all, to all tokens.

        `rotation` is that of `rotary_positions`, or None. The logarithm of `mass`, if given, is added to the scores.

        Returns:
            The result; the keys (mean over heads) and the class token's attention (batch, tokens; mean over heads),
            each None if it is not in `needs`. Without a class token, the attention is the mean over all tokens.
        """
        arch, (batch, tokens, dim) = self.arch, x.shape
        head_dim = dim // arch.num_heads
        qkv = Dense(3 * dim, arch.qkv_bias and arch.key_bias, self.dtype, name="qkv")(x)
        if arch.qkv_bias and not arch.key_bias:
            biases = [self.param(name, nn.initializers.zeros, (dim,)) for name in ("query_bias", "value_bias")]
            bias = jnp.concatenate([biases[0], jnp.zeros(dim), biases[1]])
            qkv = qkv + bias[None, None].astype(self.dtype)
        query, key, value = qkv.reshape(batch, tokens, 3, arch.num_heads, head_dim).transpose(2, 0, 3, 1, 4)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        log_mass = None if mass is None else jnp.log(mass)
        mixed = ATTENTION[self.implementation](query[:, :, :queries], key, value, log_mass)
        mixed = mixed.transpose(0, 2, 1, 3).reshape(batch, -1, dim)
        keys = key.mean(axis=1) if "keys" in self.needs else None
        attended = None
        if "class_attention" in self.needs:
            asking = query[:, :, :1] if arch.class_token else query
            scores = jnp.einsum("bhqd,bhkd->bhqk", asking, key, preferred_element_type=jnp.float32)
            scores = scores * head_dim**-0.5
            if log_mass is not None:
                scores = scores + log_mass[:, None, None]
            attended = jax.nn.softmax(scores, axis=-1).mean(axis=(1, 2))
        return Dense(dim, dtype=self.dtype, name="proj")(mixed), keys, attended


class Mlp(nn.Module):
    """Two linear layers with an activation between them.

    With `gated` (SwiGLU), the first half of the hidden units, after SiLU, is multiplied by the second half.
    """

    hidden_dim: int
    out_dim: int
    dtype: DTypeLike = jnp.float32
    activation: Activation = "gelu"
    gated: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*lead inputs"]) -> Float[Array, "*lead outputs"]:
        hidden = Dense(self.hidden_dim, dtype=self.dtype, name="fc1")(x)
        if self.gated:
            gate, hidden = jnp.split(hidden, 2, axis=-1)
            hidden = nn.silu(gate) * hidden
        else:
            hidden = ACTIVATIONS[self.activation](hidden)
        return Dense(self.out_dim, dtype=self.dtype, name="fc2")(hidden)


class Block(nn.Module):
    """A pre-norm transformer block whose residual branches are divided by the residual scale.

    With layer scale, the branches are first multiplied by a learned scale per channel.

    Attributes:
        attention: Name of the softmax attention; see `sit_jax.ops.attention`.
        drop_path: Stochastic depth: the probability of dropping an example's residual branch in training.
        reducer: Class of the token reducer after the block or inside it, or None.
        kept: Number of patch tokens that the reducer keeps.
        weigh_attention: Whether attention scores are weighted with the mass of the tokens.
    """

    arch: Architecture
    dtype: DTypeLike = jnp.float32
    attention: str = "xla"
    drop_path: float = 0.0
    reducer: ReducerFactory | None = None
    kept: int = 0
    weigh_attention: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens dim"],
        mass: Float[Array, "batch patches"],
        coordinates: Float[Array, "_ patches 2"] | None = None,
        train: bool = False,
        used: int | None = None,
    ) -> tuple[Float[Array, "batch used dim"], Cues | None, Reduced | None]:
        """Transforms the tokens. Training needs the rng `drop_path`.

        Args:
            x: Prefix tokens, then patch tokens.
            mass: Number of patches merged into each patch token so far.
            coordinates: Row and column of each patch token, for rotary positions.
            train: Whether drop path is enabled.
            used: Number of first tokens to compute; all if None.

        Returns:
            The tokens; the cues for a reducer after the block; the result of a reducer inside the block. None if there
            is none.
        """
        arch, prefix, reducer = self.arch, self.arch.num_prefix_tokens, self.reducer
        needs = reducer.needs if reducer else frozenset()
        rotation = None
        if coordinates is not None:
            rotation = rotary_positions(coordinates, prefix, arch.dim // arch.num_heads, arch.rope_theta)
        attention = Attention(arch, self.dtype, self.attention, needs, name="attn")
        masses = jnp.pad(mass, ((0, 0), (prefix, 0)), constant_values=1) if self.weigh_attention else None
        branch, keys, attended = attention(layer_norm(arch.norm_eps, self.dtype, "norm1")(x), used, rotation, masses)
        x = x[:, :used] + self._residual(branch, "layer_scale1", train)
        reduced = None
        keys, attended = (None if cue is None else cue[:, prefix:] for cue in (keys, attended))
        if reducer is not None and reducer.place == "inside_block":
            cues = Cues(x[:, prefix:], keys, attended, mass)
            x, reduced = reduce_patches(reducer(dtype=self.dtype, name="reducer"), x, cues, self.kept)
        mlp = Mlp(arch.mlp_hidden[0], arch.dim, self.dtype, arch.activation, arch.mlp == "swiglu", name="mlp")
        branch = mlp(layer_norm(arch.norm_eps, self.dtype, "norm2")(x))
        x = x + self._residual(branch, "layer_scale2", train)
        after = reducer is not None and reduced is None
        return x, Cues(x[:, prefix:], keys, attended, mass) if after else None, reduced

    def _residual(
        self, branch: Float[Array, "batch tokens dim"], scale: str, train: bool
    ) -> Float[Array, "batch tokens dim"]:
        if self.arch.layer_scale:
            factor = self.param(scale, nn.initializers.constant(LAYER_SCALE_INIT), (self.arch.dim,))
            branch = (branch * factor[None, None]).astype(self.dtype)
        drop = nn.Dropout(self.drop_path, broadcast_dims=(1, 2), rng_collection="drop_path")
        return drop(branch, deterministic=not train) / self.arch.residual_scale
