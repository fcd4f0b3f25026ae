"""A model's weights with their metadata: the return type of all readers and the input type of all writers."""

from typing import Any, NamedTuple

from sit_jax.models.architecture import Architecture


class Weights(NamedTuple):
    """A model with its weights and metadata.

    Attributes:
        arch: The model's architecture.
        params: Parameters, NumPy float32, with Linen's names and layouts.
        batch_stats: BatchNorm's running statistics; empty if the model has none.
        reverse: Parameters of the reverse modules; empty if there are none.
        metadata: JSON values: `class_names`, `preprocessing` (`mean`, `std`, `interpolation`, `crop_fraction`,
            `resize`), `provenance`, `licence`; each is optional.
    """

    arch: Architecture
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    reverse: dict[str, Any]
    metadata: dict[str, Any]
