"""Options for reading weights of other frameworks."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sit_jax.models.architecture import Architecture


class Options(NamedTuple):
    """How to read and change weights.

    `fields` are architecture fields that the tensors do not determine, and `name` (see `resolve_config.OPTIONS`); they
    take precedence over those of `like`. `image_size`, `num_classes` and `licence` replace the source's unless None.
    `ema` selects the moving average if there are both, `rtsm` also reads reverse modules if there are any.
    """

    fields: Mapping[str, Any] = {}
    image_size: int | None = None
    num_classes: int | None = None
    ema: bool = False
    rtsm: bool = True
    licence: str | None = None
    like: Architecture | None = None
