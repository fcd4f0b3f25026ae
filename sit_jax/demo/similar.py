"""Images that the demo compares an image with, for models without a head."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image

from sit_jax.data.decode import decode_image
from sit_jax.data.folder import find_images
from sit_jax.data.registry import open_source
from sit_jax.data.sources import Example, evenly_spread, read_image
from sit_jax.errors import ImageDecodeError, UserError
from sit_jax.io.model import Model

# Maximum number of images, evenly spread, and the longer side of a small image in pixels.
_MOST_IMAGES, _SIDE = 200, 192


class Gallery(NamedTuple):
    """Images to compare with, and each of them as a small RGB image."""

    examples: list[Example]
    small: list[UInt8[ndarray, "height width 3"]]


def open_gallery(paths: Sequence[str], model: Model, max_pixels: int) -> Gallery:
    """Returns up to 200 images of `paths`, or else of the evaluation split of the run that trained a model.

    Unreadable images are skipped. Raises a UserError if there are none, or it is not known which.
    """
    if not paths and model.config is None:
        raise UserError(
            f"--images: which images does the page compare with? {model.source} has no head, and is not a run"
        )
    names = find_images(paths) if paths else []
    source = None if paths else open_source(model.data, model.data.eval_split)
    count = len(names) if source is None else len(source)
    gallery = Gallery([], [])
    for index in evenly_spread(count, _MOST_IMAGES).tolist():
        try:
            example = read_image(names[index]) if source is None else source[index]
            image = decode_image(example.image, 3, example.name, max_pixels)
        except ImageDecodeError:
            continue
        image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        gallery.examples.append(example)
        gallery.small.append(np.asarray(image))
    if not gallery.examples:
        raise UserError(f"--images: none of {count} images can be read")
    return gallery
