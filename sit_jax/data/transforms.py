"""Transforms from encoded images to uint8 arrays; all random choices use the generator that is passed in.

This module must not import the models: loader processes import it first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageEnhance

from sit_jax.data.config import AugmentConfig, DataConfig
from sit_jax.data.decode import decode_image
from sit_jax.data.rand_augment import parse_rand_augment, rand_augment
from sit_jax.data.sources import Example, ExampleArrays

# The loader workers provide the parallelism; OpenCV's threads would compete for the same cores.
cv2.setNumThreads(0)

RESAMPLING = {name: Image.Resampling[name.upper()] for name in ("bilinear", "bicubic", "lanczos")}
_OPENCV = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC, "lanczos": cv2.INTER_LANCZOS4}
_CROP_ATTEMPTS = 10
# Crops that keep less than this fraction of the resized image are resized separately.
_MOST_RESIZED = 64
# Above this ratio of source to result pixels, Pillow averages blocks first: its filter weighs every single pixel.
_REDUCING_GAP = 1000.0

# Left, top, width, height in pixels.
Box = tuple[int, int, int, int]
# Height and width in pixels.
Size = tuple[int, int]


@dataclass(frozen=True)
class TrainTransform:
    """Decodes and augments a training image; the result has `size` (height, width) and 1 or 3 channels."""

    data: DataConfig
    augment: AugmentConfig
    size: Size
    channels: int

    def __call__(self, example: Example, rng: np.random.Generator) -> ExampleArrays:
        """Returns uint8 `image` (height, width, channels), int32 `label`, float32 `crop` and bool `flipped`.

        `crop` is (left, top, right, bottom) as fractions of the image.
        """
        whole = decode_image(example.image, self.channels, example.name, self.data.max_pixels)
        augment = self.augment
        width, height = whole.size
        box = random_crop_box(width, height, rng, augment) if self.data.resize == "crop" else (0, 0, width, height)
        flipped = bool(augment.flip > 0 and rng.random() < augment.flip)
        image = resize_box(whole, box, self.size, self.data)
        if augment.max_rotation or augment.max_shift or augment.max_zoom:
            image = random_affine(image, rng, augment)
        if flipped:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if augment.rand_augment:
            spec = parse_rand_augment(augment.rand_augment)
            # Pillow's geometric transforms do not support Lanczos.
            resample = RESAMPLING[self.data.interpolation.replace("lanczos", "bicubic")]
            image = rand_augment(image, rng, spec, resample, fill_colour(self.data.mean, self.channels))
        if augment.color_jitter:
            image = color_jitter(image, rng, augment.color_jitter)
        left, top, box_width, box_height = box
        crop = (left / width, top / height, (left + box_width) / width, (top + box_height) / height)
        arrays = {"crop": np.array(crop, np.float32), "flipped": np.array(flipped)}
        return {**_image_and_label(image, example), **arrays}


@dataclass(frozen=True)
class EvalTransform:
    """Decodes an evaluation image, and center-crops or stretches it to `size` (height, width) and 1 or 3 channels."""

    data: DataConfig
    size: Size
    channels: int

    def __call__(self, example: Example) -> ExampleArrays:
        """Returns uint8 `image` (height, width, channels) and int32 `label`."""
        image = decode_image(example.image, self.channels, example.name, self.data.max_pixels)
        resample = RESAMPLING[self.data.interpolation]
        if self.data.resize == "crop":
            image = center_crop(image, self.size, self.data.crop_fraction, resample)
        else:
            image = image.resize(self.size[::-1], resample, reducing_gap=_REDUCING_GAP)
        return _image_and_label(image, example)


def random_crop_box(width: int, height: int, rng: np.random.Generator, augment: AugmentConfig) -> Box:
    """Returns the box of Inception's random resized crop, by torchvision's rules.

    The fraction of the area and the logarithm of the aspect ratio (width over height) are uniform.
    """
    scale, ratio = augment.crop_scale, augment.crop_ratio
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * rng.uniform(scale[0], scale[1])
        aspect = math.exp(rng.uniform(low, high))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            left, top = rng.integers(0, width - box_width + 1), rng.integers(0, height - box_height + 1)
            return int(left), int(top), box_width, box_height
    # No sampled box fits: use the largest centred box with an allowed ratio.
    box_width, box_height = width, height
    if width / height < ratio[0]:
        box_height = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        box_width = max(1, round(height * ratio[1]))
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height


def resize_box(image: Image.Image, box: Box, size: Size, data: DataConfig) -> Image.Image:
    """Crops a box and resizes it to `size` with antialiasing; see `DataConfig.resampler`."""
    left, top, width, height = box
    edges = (left, top, left + width, top + height)
    if data.resampler == "pillow":
        return image.resize(size[::-1], RESAMPLING[data.interpolation], edges, reducing_gap=_REDUCING_GAP)
    return Image.fromarray(_resize_fast(np.asarray(image.crop(edges)), size, _OPENCV[data.interpolation]))


def _resize_fast(pixels: np.ndarray, size: Size, method: int) -> np.ndarray:
    """Resizes with OpenCV after a low-pass filter, which OpenCV's resize lacks.

    On photographs, the result is within two levels (root mean square) of Pillow's, in a sixth of the time.
    """
    height, width = pixels.shape[:2]
    while height >= 2 * size[0] and width >= 2 * size[1]:
        height, width = height // 2, width // 2
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    # The filter removes what a scale of s would alias; below 2, a 3-tap kernel represents that Gaussian.
    sigmas = [
        0.5 * math.sqrt(max(0.0, (length / side) ** 2 - 1))
        for length, side in zip((width, height), size[::-1], strict=True)
    ]
    taps = [3 if sigma > 0 else 1 for sigma in sigmas]
    if max(taps) > 1:
        pixels = cv2.GaussianBlur(pixels, taps, sigmaX=max(sigmas[0], 1e-6), sigmaY=max(sigmas[1], 1e-6))
    return cv2.resize(pixels, size[::-1], interpolation=method)


def center_crop(image: Image.Image, size: Size, fraction: float, resample: Image.Resampling) -> Image.Image:
    """Resizes the image to cover `int(size / fraction)`, and crops its centre, as torchvision does for squares.

    For very long images only the crop is resized, to the same pixels within one level: resizing all of 1 x 60,000
    pixels to 224 pixels would take 12 GB.
    """
    scaled, left, top = _scaled_centre(*image.size, size, fraction)
    if scaled[0] * scaled[1] > _MOST_RESIZED * size[0] * size[1]:
        return resize_part(image, centre_box(*image.size, size, fraction), size, resample)
    return image.resize(scaled, resample).crop((left, top, left + size[1], top + size[0]))


def resize_part(
    image: Image.Image, box: tuple[float, float, float, float], size: Size, resample: Image.Resampling
) -> Image.Image:
    """Resizes a part of an image to `size`; pixels around it contribute within the support of the filter.

    `box` is left, top, right, bottom of the part in pixels, with fractions.
    """
    # Pillow stores boxes in float32, which is whole pixels far from the corner, so the part and its surroundings are
    # cropped first. No filter reaches further than Lanczos, three pixels of the image or of the result.
    reach = [3 * max(1.0, (box[axis + 2] - box[axis]) / size[1 - axis]) + 1 for axis in (0, 1)]
    left, top = (max(0, math.floor(box[axis] - reach[axis])) for axis in (0, 1))
    right, bottom = (min(image.size[axis], math.ceil(box[axis + 2] + reach[axis])) for axis in (0, 1))
    inner = (box[0] - left, box[1] - top, min(box[2], right) - left, min(box[3], bottom) - top)
    part = image.crop((left, top, right, bottom))
    return part.resize(size[::-1], resample, inner, reducing_gap=_REDUCING_GAP)


def centre_box(width: int, height: int, size: Size, fraction: float) -> tuple[float, float, float, float]:
    """Returns the box that `center_crop` keeps: left, top, right, bottom in the image's own pixels, with fractions."""
    scaled, left, top = _scaled_centre(width, height, size, fraction)
    across, down = width / scaled[0], height / scaled[1]
    return left * across, top * down, (left + size[1]) * across, (top + size[0]) * down


def _scaled_centre(width: int, height: int, size: Size, fraction: float) -> tuple[tuple[int, int], int, int]:
    """Returns the width and height to resize to, and the top left corner of the crop."""
    down, across = (int(side / fraction) for side in size)
    if width * down <= height * across:
        scaled = (across, max(down, int(across * height / width)))
    else:
        scaled = (max(across, int(down * width / height)), down)
    return scaled, round((scaled[0] - size[1]) / 2), round((scaled[1] - size[0]) / 2)


def random_affine(image: Image.Image, rng: np.random.Generator, augment: AugmentConfig) -> Image.Image:
    """Rotates, shifts and scales an image; pixels outside are black."""
    angle = np.radians(rng.uniform(-augment.max_rotation, augment.max_rotation))
    zoom = 1.0 + rng.uniform(-augment.max_zoom, augment.max_zoom)
    shift_x, shift_y = rng.uniform(-augment.max_shift, augment.max_shift, 2) * image.size
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    centre_x, centre_y = (image.width - 1) / 2, (image.height - 1) / 2
    # Pillow takes the inverse map: the source position of each output pixel.
    offset_x = centre_x - cos * (centre_x + shift_x) - sin * (centre_y + shift_y)
    offset_y = centre_y + sin * (centre_x + shift_x) - cos * (centre_y + shift_y)
    matrix = (cos, sin, offset_x, -sin, cos, offset_y)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def color_jitter(image: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    """Changes brightness, contrast and saturation by factors of 1 ± `strength`, in random order."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = rng.uniform(1.0 - strength, 1.0 + strength, len(enhancers))
    for index in rng.permutation(len(enhancers)):
        image = enhancers[index](image).enhance(float(factors[index]))
    return image


def fill_colour(mean: Sequence[float], channels: int) -> tuple[int, ...]:
    """Returns the data set's mean as 8-bit levels, to fill pixels outside the image."""
    levels = tuple(min(255, round(255 * value)) for value in mean)
    return levels if channels == 3 else (round(sum(levels) / len(levels)),)


def _image_and_label(image: Image.Image, example: Example) -> ExampleArrays:
    return {"image": np.asarray(image).reshape(*image.size[::-1], -1), "label": np.array(example.label, np.int32)}
