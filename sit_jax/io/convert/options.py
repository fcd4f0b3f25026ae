"""Options for reading weights of other frameworks."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sit_jax.models.architecture import Architecture


class Options(NamedTuple):
    """How to read and change weights.

    Attributes:
        fields: Architecture fields that the tensors do not determine, and `name`; see `resolve_config.OPTIONS`.
        image_size: New resolution, or None.
        num_classes: New number of classes, or None.
        ema: Read the moving average instead of the weights if there are both.
        rtsm: Whether to read reverse modules if there are any.
        licence: Licence of the weights, such as `MIT`; that of the source if None.
        like: A model that determines the hyperparameters that tensors do not; `fields` take precedence.
    """

    fields: Mapping[str, Any] = {}
    image_size: int | None = None
    num_classes: int | None = None
    ema: bool = False
    rtsm: bool = True
    licence: str | None = None
    like: Architecture | None = None
