"""BatchNorm's counters of batches: not weights, but parts of PyTorch's state dicts, kept for the way back."""

from collections.abc import Mapping

import numpy as np

from sit_jax.config import JsonObject
from sit_jax.io.convert.tensors import Tensors

KEY = "num_batches_tracked"


def read_counters(tensors: Tensors) -> JsonObject:
    """Returns the entry of a model's metadata: the counters by the names of the BatchNorms; empty if there are none."""
    suffix = f".{KEY}"
    found = {
        name.removesuffix(suffix): int(tensor.read())
        for name, tensor in tensors.items()
        if name.endswith(suffix) and tensor.shape == () and not tensor.is_float
    }
    return {KEY: found} if found else {}


def with_counters(state_dict: Mapping[str, np.ndarray], metadata: JsonObject) -> dict[str, np.ndarray]:
    """Returns a state dict in the original's layout with the counters in a model's metadata added, int64."""
    counters = {name: x for name, x in metadata.get(KEY, {}).items() if f"{name}.running_mean" in state_dict}
    return {**state_dict, **{f"{name}.{KEY}": np.array(x, np.int64) for name, x in counters.items()}}
