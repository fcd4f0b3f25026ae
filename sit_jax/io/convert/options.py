"""What is chosen when weights of other programs are read."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sit_jax.models.architecture import Architecture


class Options(NamedTuple):
    """What is read, and what is changed on the way.

    Attributes:
        fields: Fields of the architecture that the tensors do not tell, and `name`; see `settle.OPTIONS`.
        image_size: Another resolution, or None.
        num_classes: Another number of classes, or None.
        ema: The moving average instead of the weights, where there are both.
        reverse: Whether reverse modules are read where there are any.
        licence: What the weights may be used for, such as `MIT`; what the source says where None.
        like: A model that is taken for the one in the file, in what its tensors leave open; fields come before it.
    """

    fields: Mapping[str, Any] = {}
    image_size: int | None = None
    num_classes: int | None = None
    ema: bool = False
    reverse: bool = True
    licence: str | None = None
    like: Architecture | None = None
