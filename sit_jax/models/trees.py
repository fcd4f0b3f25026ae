"""Types of the trees of arrays that Flax makes: nested dicts."""

from typing import Any

# Parameters of a module: name of a submodule -> its parameters, down to arrays or their shapes.
Params = dict[str, Any]
# Variables of a module: `{"params": Params, "batch_stats": ...}`; `batch_stats` only with BatchNorm.
Variables = dict[str, Any]
