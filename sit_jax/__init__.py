"""Self-slimmed vision transformers in JAX.

The names below are imported when they are first used: `import sit_jax` alone loads nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sit_jax.api import Model, create_model, load, slim
    from sit_jax.models.variants import list_models

__version__ = "0.1.0"

__all__ = ["Model", "create_model", "list_models", "load", "slim"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sit_jax import api
    from sit_jax.models import variants

    return variants.list_models if name == "list_models" else getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
