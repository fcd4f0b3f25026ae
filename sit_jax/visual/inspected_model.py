"""A model for visualization, opened from a run or a model folder, with its preprocessing."""

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

# Minimum size of a drawn patch, and minimum side of a drawn image, in pixels.
_PIXELS_PER_PATCH, _SHOWN_SIDE = 16, 384


class ModelInput(NamedTuple):
    """An image in two sizes.

    Attributes:
        pixels: The model's input, uint8 (size, size, channels).
        shown: The same part of the image in display size, uint8 (side, side, channels); `side` is a multiple of the
            grid size.
    """

    pixels: UInt8[ndarray, "size size channels"]
    shown: UInt8[ndarray, "side side channels"]


@dataclasses.dataclass(frozen=True)
class InspectedModel:
    """A vision transformer with its weights, its preprocessing and its classes.

    Attributes:
        arch: Its architecture.
        variables: Its variables, on the device.
        data: How images are read.
        metadata: Other metadata; see `Weights.metadata`.
        dtype: Type of the matrix products.
    """

    arch: Architecture
    variables: dict[str, Any]
    data: DataConfig
    metadata: dict[str, Any]
    dtype: str = "float32"

    @property
    def class_names(self) -> list[str]:
        """The class names; the class indices as text if no names are known."""
        return class_names(self.metadata, self.arch)

    def maps(self, pixels: UInt8[ndarray, "batch height width channels"]) -> TokenMaps:
        """Returns the token maps of images from `preprocess`; compiled once per batch size."""
        images = normalize(jax.numpy.asarray(pixels), self.data)
        return token_maps(build_model(self.arch, dtype=self.dtype), self.variables, images)

    def preprocess(self, example: Example) -> ModelInput:
        """Decodes an image, and crops or stretches it to the model's input.

        Raises:
            ImageDecodeError: The image cannot be read.
        """
        arch, data = self.arch, self.data
        side = arch.grid_size * max(_PIXELS_PER_PATCH, -(-_SHOWN_SIDE // arch.grid_size))
        pixels = EvalTransform(data, arch.image_size, arch.in_channels)(example)["image"]
        whole = to_pillow(decode(example.image, arch.in_channels, example.name, data.max_pixels))
        box = (0.0, 0.0, float(whole.width), float(whole.height))
        if data.resize == "crop":
            # The exact box of the model's crop: its rounding at another size would select another part of the image.
            box = centre_box(whole.width, whole.height, arch.image_size, data.crop_fraction)
        shown = np.asarray(resize_part(whole, box, side, RESAMPLING[data.interpolation]))
        return ModelInput(np.ascontiguousarray(pixels), shown[:, :, None] if shown.ndim == 2 else shown)


def open_inspected_model(source: pathlib.Path, ema: bool = False, step: int | None = None) -> InspectedModel:
    """Opens a run or a model folder.

    Args:
        source: The folder.
        ema: Use a run's moving average instead of its weights.
        step: Step of the run's checkpoint; the newest if None.

    Raises:
        UserError: The path is neither, or is damaged, or is an ONNX or StableHLO file, or its model is not a vision
            transformer.
    """
    if source.is_file():
        raise UserError(f"{source}: gives logits only; give the run's or model's folder that it was exported from")
    arch, variables, data, metadata, dtype = open_folder(source, ema, step)
    if not isinstance(arch, Architecture):
        raise UserError(f"{source}: its model is a {arch.family}, which has no tokens; only vision transformers do")
    return InspectedModel(arch, jax.device_put(variables), data, metadata, dtype)
