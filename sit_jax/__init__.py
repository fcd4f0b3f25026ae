"""Self-slimmed vision transformers in JAX.

The names below are imported when they are first used: `import sit_jax` alone loads nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sit_jax import losses as losses
    from sit_jax.api import create_model, slim, train
    from sit_jax.config.files import get_config
    from sit_jax.io.load import load
    from sit_jax.io.model import Model
    from sit_jax.models.architecture import Architecture
    from sit_jax.models.reducers.base import Cues, Reduced, Reducer, register_reducer
    from sit_jax.models.reducers.slim import TokenSlimming
    from sit_jax.models.reverse import ReverseTokenSlimming
    from sit_jax.models.variants import list_models
    from sit_jax.models.vit import ViT

__version__ = "0.1.0"

_HOMES = {
    "Architecture": "sit_jax.models.architecture",
    "Cues": "sit_jax.models.reducers.base",
    "Model": "sit_jax.io.model",
    "Reduced": "sit_jax.models.reducers.base",
    "Reducer": "sit_jax.models.reducers.base",
    "ReverseTokenSlimming": "sit_jax.models.reverse",
    "TokenSlimming": "sit_jax.models.reducers.slim",
    "ViT": "sit_jax.models.vit",
    "create_model": "sit_jax.api",
    "get_config": "sit_jax.config.files",
    "list_models": "sit_jax.models.variants",
    "load": "sit_jax.io.load",
    "register_reducer": "sit_jax.models.reducers.base",
    "slim": "sit_jax.api",
    "train": "sit_jax.api",
}

__all__ = [
    "Architecture",
    "Cues",
    "Model",
    "Reduced",
    "Reducer",
    "ReverseTokenSlimming",
    "TokenSlimming",
    "ViT",
    "create_model",
    "get_config",
    "list_models",
    "load",
    "losses",
    "register_reducer",
    "slim",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "losses":
        return importlib.import_module("sit_jax.losses")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
