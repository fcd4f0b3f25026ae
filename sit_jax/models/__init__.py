"""Models: Flax Linen modules and their architectures."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from sit_jax.models.architecture import Architecture
from sit_jax.models.reducers.base import find_reducer, weighs_attention
from sit_jax.models.regnet import RegNetArchitecture, RegNetY
from sit_jax.models.reverse import ReverseSlimming
from sit_jax.models.trees import Variables
from sit_jax.models.vit import Outputs, ViT
from sit_jax.ops.attention import choose

__all__ = ["HEADS", "Outputs", "abstract_variables", "build_model", "build_rtsm", "choose_attention", "reducer_params"]

# Parameters whose width is the number of classes.
HEADS = frozenset({"head", "distillation_head", "aux_head"})


def build_model(
    arch: Architecture | RegNetArchitecture,
    drop_path: float = 0.0,
    dtype: str = "float32",
    remat: bool = False,
    attention: str = "auto",
) -> nn.Module:
    """Returns the module of an architecture, with `init(key, images)` and `apply(variables, images, train)`.

    Args:
        arch: The architecture.
        drop_path: Stochastic depth rate of the last block (transformers only).
        dtype: Type of the matrix products, `float32` or `bfloat16`.
        remat: Whether to recompute blocks in the backward pass (transformers only).
        attention: Name of the softmax attention (transformers only); see `sit_jax.ops.attention`.

    Raises:
        ConfigError: There is no such reducer, or the device does not support the attention.
    """
    if isinstance(arch, RegNetArchitecture):
        return RegNetY(arch, dtype=jnp.dtype(dtype))
    attention = choose_attention(attention, arch, dtype)
    return ViT(arch, drop_path=drop_path, dtype=jnp.dtype(dtype), remat=remat, attention=attention)


def choose_attention(name: str, arch: Architecture, dtype: str) -> str:
    """Returns the name of the softmax attention that a model uses; see `sit_jax.ops.attention.choose`."""
    weighs = arch.is_slimmed and weighs_attention(find_reducer(arch.reducer))
    return choose(name, dtype, arch.num_heads, arch.dim // arch.num_heads, weighs)


def abstract_variables(arch: Architecture | RegNetArchitecture) -> Variables:
    """Returns the shapes and types of a model's variables: `params`, and `batch_stats` if it has BatchNorm."""
    images = jax.ShapeDtypeStruct((1, *arch.image_shape, arch.in_channels), jnp.float32)
    # The key is made in the trace, which needs no device: a process that only counts must not occupy one.
    return jax.eval_shape(lambda images: build_model(arch).init(jax.random.key(0), images), images)


def reducer_params(arch: Architecture) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Returns path -> shape and type of every parameter of a model's reducers."""
    return {
        path: x
        for path, x in flatten_dict(abstract_variables(arch)["params"]).items()
        if path[0].startswith("slimming_") or path[1:2] == ("reducer",)
    }


def build_rtsm(arch: Architecture, dtype: str = "float32") -> ReverseSlimming:
    """Returns the training-only reverse modules of a slimmed architecture; for `dtype` see `build_model`."""
    return ReverseSlimming(arch, dtype=jnp.dtype(dtype))
