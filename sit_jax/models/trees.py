"""Types of the trees of arrays that Flax makes, nested dicts, and names of their leaves."""

from collections.abc import Hashable
from typing import Any

import jax

# Parameters of a module: name of a submodule -> its parameters, down to arrays or their shapes.
Params = dict[str, Any]
# Variables of a module: `{"params": Params, "batch_stats": ...}`; `batch_stats` only with BatchNorm.
Variables = dict[str, Any]


def path_names(path: tuple[Hashable, ...]) -> tuple[str, ...]:
    """Returns the names along a path of `jax.tree_util`, such as `('blocks_0', 'attn', 'qkv', 'kernel')`."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
