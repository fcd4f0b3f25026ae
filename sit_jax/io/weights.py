"""A model's weights together with what one must know to use them: what every reader returns and every writer takes."""

from typing import Any, NamedTuple

from sit_jax.models.architecture import Architecture


class Weights(NamedTuple):
    """A model, its weights and what is known about it.

    Attributes:
        arch: The model's shape.
        params: The model's parameters, NumPy float32, named and laid out as Linen has them.
        batch_stats: BatchNorm's running statistics; empty where the model has none.
        reverse: The reverse modules' parameters; empty where there are none.
        metadata: JSON values: `class_names`, `preprocessing` (`mean`, `std`, `interpolation`, `crop_fraction`,
            `resize`), `provenance`, `licence`; any may be missing.
    """

    arch: Architecture
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    reverse: dict[str, Any]
    metadata: dict[str, Any]
