"""A model that can be looked into: opened from a run or a model folder, with the images as it sees them."""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from sit_jax.data.config import DataConfig
from sit_jax.data.decode import decode
from sit_jax.data.preprocess import normalize
from sit_jax.data.sources import Example
from sit_jax.data.transforms import RESAMPLING, EvalTransform, centre_box, resize_part, to_pillow
from sit_jax.errors import UserError
from sit_jax.io.predictor import class_names, open_folder
from sit_jax.models import build_model
from sit_jax.models.architecture import Architecture
from sit_jax.visual.token_maps import TokenMaps, token_maps

# A patch is drawn with at least so many pixels, and an image with at least so many on a side.
_PIXELS_PER_PATCH, _SHOWN_SIDE = 16, 384


class ModelInput(NamedTuple):
    """One image in two sizes.

    Attributes:
        pixels: What the model gets, uint8 (size, size, channels).
        shown: The same part of the image, as large as a person wants it, uint8 (side, side, channels); `side` is a
            multiple of the grid's.
    """

    pixels: UInt8[ndarray, "size size channels"]
    shown: UInt8[ndarray, "side side channels"]


@dataclasses.dataclass(frozen=True)
class InspectedModel:
    """A vision transformer with its weights, its preprocessing and its classes.

    Attributes:
        arch: Its shape.
        variables: Its variables, on the device.
        data: How images are read.
        metadata: What else is known; see `Weights.metadata`.
        dtype: Type of the products.
    """

    arch: Architecture
    variables: dict[str, Any]
    data: DataConfig
    metadata: dict[str, Any]
    dtype: str = "float32"

    @property
    def class_names(self) -> list[str]:
        """The classes' names; their numbers where no names are known."""
        return class_names(self.metadata, self.arch)

    def maps(self, pixels: UInt8[ndarray, "batch height width channels"]) -> TokenMaps:
        """Token maps of images as `see` gives them; compiled once for each batch size."""
        images = normalize(jax.numpy.asarray(pixels), self.data)
        return token_maps(build_model(self.arch, dtype=self.dtype), self.variables, images)

    def preprocess(self, example: Example) -> ModelInput:
        """Decodes an image, and cuts out (or stretches) what the model sees of it.

        Raises:
            ImageDecodeError: It cannot be read.
        """
        arch, data = self.arch, self.data
        side = arch.grid_size * max(_PIXELS_PER_PATCH, -(-_SHOWN_SIDE // arch.grid_size))
        pixels = EvalTransform(data, arch.image_size, arch.in_channels)(example)["image"]
        whole = to_pillow(decode(example.image, arch.in_channels, example.name, data.max_pixels))
        box = (0.0, 0.0, float(whole.width), float(whole.height))
        if data.resize == "crop":
            # The model's own crop to the pixel: its rounding at another size would be another part of the image.
            box = centre_box(whole.width, whole.height, arch.image_size, data.crop_fraction)
        shown = np.asarray(resize_part(whole, box, side, RESAMPLING[data.interpolation]))
        return ModelInput(np.ascontiguousarray(pixels), shown[:, :, None] if shown.ndim == 2 else shown)


def open_inspected_model(source: pathlib.Path, ema: bool = False, step: int | None = None) -> InspectedModel:
    """Opens a run or a model folder.

    Args:
        source: The folder.
        ema: A run's moving average instead of its weights.
        step: Which of a run's checkpoints; the newest where None.

    Raises:
        UserError: It is neither, or damaged, an ONNX or StableHLO file, or its model is no vision transformer.
    """
    if source.is_file():
        raise UserError(f"{source}: gives logits only; give the run's or model's folder that it was exported from")
    arch, variables, data, metadata, dtype = open_folder(source, ema, step)
    if not isinstance(arch, Architecture):
        raise UserError(f"{source}: its model is a {arch.family}, which has no tokens; only vision transformers do")
    return InspectedModel(arch, jax.device_put(variables), data, metadata, dtype)
