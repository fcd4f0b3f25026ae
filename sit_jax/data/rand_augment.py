"""RandAugment in timm's syntax; names, ranges and sign rules are those of timm's `auto_augment.py`.

Magnitudes are in [0, 10]. An operation is a function of (image, argument); the argument depends on the magnitude.
"""

import functools
import math
import re
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from sit_jax.errors import ConfigError

MAX_LEVEL = 10.0
# Fraction of the side length along which a translation moves.
MAX_TRANSLATION = 0.45
# If `mstd` exceeds this, the magnitude is uniform between 0 and `m`.
_UNIFORM_STD = 100.0
_SOLARIZE_ADD_BELOW = 128

_NAMES = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)  # fmt: skip
# With `inc1`, these are replaced with variants whose strength increases with the magnitude.
_SIGNED = frozenset({"Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness"})
# Operations of `w0` -> probability.
_WEIGHTS = {
    "Rotate": 0.3, "ShearX": 0.2, "ShearY": 0.2, "TranslateXRel": 0.1, "TranslateYRel": 0.1, "ColorIncreasing": 0.025,
    "SharpnessIncreasing": 0.025, "AutoContrast": 0.025, "SolarizeIncreasing": 0.005, "SolarizeAdd": 0.005,
    "ContrastIncreasing": 0.005, "BrightnessIncreasing": 0.005, "Equalize": 0.005, "PosterizeIncreasing": 0.0,
    "Invert": 0.0,
}  # fmt: skip

Fill = tuple[int, ...]


@dataclass(frozen=True)
class RandAugmentSpec:
    """A parsed policy string such as `rand-m9-mstd0.5-inc1`."""

    magnitude: float = MAX_LEVEL  # m
    num_layers: int = 2  # n: operations per image
    magnitude_std: float = 0.0  # mstd: of each operation's magnitude; infinite for uniform in [0, magnitude]
    magnitude_max: float = MAX_LEVEL  # mmax: upper bound of the sampled magnitude
    increasing: bool = False  # inc: the strength of all operations increases with the magnitude
    probability: float = 0.5  # p: of applying each selected operation
    weighted: bool = False  # w: sample with timm's weights, without replacement

    @property
    def operations(self) -> tuple[str, ...]:
        """Names of the operations to sample from."""
        if self.weighted:
            return tuple(_WEIGHTS)
        return tuple(name + "Increasing" if self.increasing and name in _SIGNED else name for name in _NAMES)


@functools.cache
def parse_rand_augment(text: str) -> RandAugmentSpec:
    """Parses timm's string: `rand`, then some of `m9`, `n2`, `mstd0.5`, `mmax10`, `inc1`, `p0.5`, `w0`, with `-`."""
    head, *parts = text.split("-")
    if head != "rand":
        raise ConfigError("rand_augment", f"{text!r} must begin with rand, as rand-m9-mstd0.5-inc1 does")
    spec = RandAugmentSpec()
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?|inf)", part)
        key, value = (match[1], float(match[2])) if match else ("", 0.0)
        match key:
            case "m" if value <= MAX_LEVEL:
                spec = replace(spec, magnitude=value)
            case "n" if value.is_integer() and value >= 1:
                spec = replace(spec, num_layers=int(value))
            case "mstd":
                spec = replace(spec, magnitude_std=math.inf if value > _UNIFORM_STD else value)
            case "mmax" if math.isfinite(value):
                spec = replace(spec, magnitude_max=value)
            case "inc" if value in (0, 1):
                spec = replace(spec, increasing=bool(value))
            case "p" if value <= 1:
                spec = replace(spec, probability=value)
            case "w" if value == 0:
                spec = replace(spec, weighted=True)
            case _:
                known = "m (0 to 10), n, mstd, mmax, inc (0, 1), p, w0"
                raise ConfigError("rand_augment", f"{part!r} in {text!r} is none of {known}")
    available = sum(weight > 0 for weight in _WEIGHTS.values())
    if spec.weighted and spec.num_layers > available:
        problem = f"'n{spec.num_layers}' in {text!r} must be at most n{available}, the operations with a weight"
        raise ConfigError("rand_augment", problem)
    return spec


def rand_augment(
    image: Image.Image, rng: np.random.Generator, spec: RandAugmentSpec, resample: Image.Resampling, fill: Fill
) -> Image.Image:
    """Applies `spec.num_layers` random operations.

    The geometric ones use the filter `resample`, for which Pillow does not support Lanczos; `fill` is the colour of
    pixels outside the image.
    """
    names = spec.operations
    weights = np.array(list(_WEIGHTS.values())) if spec.weighted else None
    for index in rng.choice(len(names), spec.num_layers, replace=weights is None, p=weights):
        if rng.random() < spec.probability:
            argument = draw_argument(names[index], draw_magnitude(spec, rng), rng)
            image = apply_operation(image, names[index], argument, resample, fill)
    return image


def draw_magnitude(spec: RandAugmentSpec, rng: np.random.Generator) -> float:
    """Returns the magnitude of one operation, in [0, `spec.magnitude_max`]."""
    magnitude = spec.magnitude
    if math.isinf(spec.magnitude_std):
        magnitude = rng.uniform(0.0, magnitude)
    elif spec.magnitude_std > 0:
        magnitude = rng.normal(magnitude, spec.magnitude_std)
    return float(min(max(magnitude, 0.0), spec.magnitude_max))


def draw_argument(name: str, magnitude: float, rng: np.random.Generator) -> float:
    """Returns the argument of an operation at a magnitude: degrees, factor, fraction of a side, bits, or threshold."""
    level = magnitude / MAX_LEVEL
    signed = level if rng.random() >= 0.5 else -level
    arguments = {
        "Rotate": signed * 30.0,
        "ShearX": signed * 0.3,
        "ShearY": signed * 0.3,
        "TranslateXRel": signed * MAX_TRANSLATION,
        "TranslateYRel": signed * MAX_TRANSLATION,
        "Posterize": int(level * 4),
        "PosterizeIncreasing": 4 - int(level * 4),
        "Solarize": min(256, int(level * 256)),
        "SolarizeIncreasing": 256 - min(256, int(level * 256)),
        "SolarizeAdd": min(128, int(level * 110)),
    }
    for enhancer in ("Color", "Contrast", "Brightness", "Sharpness"):
        arguments |= {enhancer: level * 1.8 + 0.1, f"{enhancer}Increasing": max(0.1, 1.0 + signed * 0.9)}
    return arguments.get(name, 0.0)


def apply_operation(
    image: Image.Image, name: str, argument: float, resample: Image.Resampling, fill: Fill
) -> Image.Image:
    """Applies one operation; see `rand_augment` for `resample` and `fill`."""
    match name.removesuffix("Increasing"):
        case "AutoContrast" | "Equalize" | "Invert" as operation:
            return getattr(ImageOps, operation.lower())(image)
        case "Color" | "Contrast" | "Brightness" | "Sharpness" as enhancer:
            return getattr(ImageEnhance, enhancer)(image).enhance(argument)
        case "Posterize" if argument == 0:
            # Before version 13, Pillow accepted 0 bits, the value at magnitude 10, and returned a black image.
            return Image.new(image.mode, image.size)
        case "Posterize":
            return ImageOps.posterize(image, int(argument))
        case "Solarize":
            return ImageOps.solarize(image, int(argument))
        case "SolarizeAdd":
            levels = np.arange(256)
            table = np.where(levels < _SOLARIZE_ADD_BELOW, np.minimum(levels + int(argument), 255), levels)
            return image.point(table.tolist() * len(image.getbands()))
        case "Rotate":
            return image.rotate(argument, resample=resample, fillcolor=fill)
    matrices = {
        "ShearX": (1.0, argument, 0.0, 0.0, 1.0, 0.0),
        "ShearY": (1.0, 0.0, 0.0, argument, 1.0, 0.0),
        "TranslateXRel": (1.0, 0.0, argument * image.width, 0.0, 1.0, 0.0),
        "TranslateYRel": (1.0, 0.0, 0.0, 0.0, 1.0, argument * image.height),
    }
    return image.transform(image.size, Image.Transform.AFFINE, matrices[name], resample, fillcolor=fill)
