"""The input of a model, and the same part of the image in display size."""

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from sit_jax.data.config import DataConfig
from sit_jax.data.decode import decode_image
from sit_jax.data.sources import Example
from sit_jax.data.transforms import RESAMPLING, EvalTransform, centre_box, resize_part
from sit_jax.models.architecture import Architecture

# Minimum size of a drawn patch, and minimum side of a drawn image, in pixels.
_PIXELS_PER_PATCH, _SHOWN_SIDE = 16, 384


class ModelInput(NamedTuple):
    """The model's input, and the same part of the image in display size, a multiple of the grid of patches."""

    pixels: UInt8[ndarray, "height width channels"]
    shown: UInt8[ndarray, "rows columns channels"]


def preprocess(arch: Architecture, data: DataConfig, example: Example) -> ModelInput:
    """Decodes an image, and crops or stretches it to the model's input, as `data` says.

    Raises an ImageDecodeError if the image cannot be read, or has too many pixels.
    """
    rows, columns = arch.grid
    patch = max(_PIXELS_PER_PATCH, -(-_SHOWN_SIDE // min(arch.grid)))
    pixels = EvalTransform(data, arch.image_shape, arch.in_channels)(example)["image"]
    whole = decode_image(example.image, arch.in_channels, example.name, data.max_pixels)
    box = (0.0, 0.0, float(whole.width), float(whole.height))
    if data.resize == "crop":
        # The exact box of the model's crop: its rounding at another size would select another part of the image.
        box = centre_box(whole.width, whole.height, arch.image_shape, data.crop_fraction)
    shown = np.asarray(resize_part(whole, box, (rows * patch, columns * patch), RESAMPLING[data.interpolation]))
    return ModelInput(np.ascontiguousarray(pixels), shown[:, :, None] if shown.ndim == 2 else shown)
