"""From encoded bytes to the arrays a model takes; every random choice comes from the generator passed in."""

import io
import math

import numpy as np
from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def decode(encoded: bytes, channels: int) -> Image.Image:
    """Decodes a picture to grey (1 channel) or RGB (3)."""
    return Image.open(io.BytesIO(encoded)).convert("L" if channels == 1 else "RGB")


def resize(image: Image.Image, size: int) -> Image.Image:
    """Resizes to a square, bicubic. Pillow's resize antialiases when it shrinks, as torchvision's does."""
    return image.resize((size, size), Image.Resampling.BICUBIC)


def random_affine(
    image: Image.Image, rng: np.random.Generator, max_rotation: float, max_shift: float, max_zoom: float
) -> Image.Image:
    """Turns, moves and scales a picture about its centre; what comes in from outside is black.

    Args:
        image: The picture.
        rng: Source of the random choices.
        max_rotation: Degrees in either direction.
        max_shift: Share of the side in either direction, for each axis on its own.
        max_zoom: Share by which it grows or shrinks.
    """
    angle, zoom = np.radians(rng.uniform(-max_rotation, max_rotation)), 1.0 + rng.uniform(-max_zoom, max_zoom)
    shift_x, shift_y = rng.uniform(-max_shift, max_shift, 2) * image.size
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    centre_x, centre_y = (image.width - 1) / 2, (image.height - 1) / 2
    # Pillow asks for the inverse: the source position of every output pixel.
    offset_x = centre_x - cos * (centre_x + shift_x) - sin * (centre_y + shift_y)
    offset_y = centre_y + sin * (centre_x + shift_x) - cos * (centre_y + shift_y)
    matrix = (cos, sin, offset_x, -sin, cos, offset_y)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def normalize(image: Image.Image) -> np.ndarray:
    """Float32 (height, width, channels), standardised by ImageNet's statistics (their mean over channels for grey)."""
    values = np.asarray(image, np.float32) / 255.0
    mean, std = np.asarray(IMAGENET_MEAN, np.float32), np.asarray(IMAGENET_STD, np.float32)
    if values.ndim == 2:
        return ((values - mean.mean()) / std.mean())[:, :, None]
    return (values - mean) / std
