"""RandAugment in timm's syntax; names, ranges and sign rules are those of timm's `auto_augment.py`.

Magnitudes are in [0, 10]. An operation is a function of (image, argument); the argument depends on the magnitude.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from sit_jax.errors import ConfigError

MAX_LEVEL = 10.0
# Fraction of the side length along which a translation moves.
MAX_TRANSLATION = 0.45
# If `mstd` exceeds this, the magnitude is uniform between 0 and `m`.
_UNIFORM_STD = 100.0
_SOLARIZE_ADD_BELOW = 128

Fill = tuple[int, ...]
Argument = float


@dataclasses.dataclass(frozen=True)
class RandAugmentSpec:
    """A parsed policy string such as `rand-m9-mstd0.5-inc1`.

    Attributes:
        magnitude: `m`, from 0 to 10.
        num_layers: `n`, operations per image.
        magnitude_std: `mstd`, standard deviation of each operation's magnitude; infinite for uniform in [0, magnitude].
        magnitude_max: `mmax`, upper bound of the sampled magnitude.
        increasing: `inc`, whether the strength increases with the magnitude for all operations.
        probability: `p`, probability of applying each selected operation.
        weighted: `w`, whether operations are sampled with timm's weights (without replacement) or uniformly (with
            replacement).
    """

    magnitude: float = MAX_LEVEL
    num_layers: int = 2
    magnitude_std: float = 0.0
    magnitude_max: float = MAX_LEVEL
    increasing: bool = False
    probability: float = 0.5
    weighted: bool = False

    @property
    def operations(self) -> tuple[str, ...]:
        """Names of the operations to sample from."""
        if self.weighted:
            return tuple(_WEIGHTS)
        return tuple(name + "Increasing" if self.increasing and name in _SIGNED else name for name in _NAMES)


def parse_rand_augment(text: str) -> RandAugmentSpec:
    """Parses timm's string: `rand`, then any of `m9`, `n2`, `mstd0.5`, `mmax10`, `inc1`, `p0.5`, `w0`, joined by `-`.

    Raises:
        ConfigError: The string has an unknown part, or a value is out of range.
    """
    head, *parts = text.split("-")
    if head != "rand":
        raise ConfigError("rand_augment", f"{text!r} must begin with rand, as rand-m9-mstd0.5-inc1 does")
    values: dict[str, Any] = {}
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?|inf)", part)
        key, value = (match[1], float(match[2])) if match else ("", 0.0)
        whole = value == int(value) if math.isfinite(value) else False
        match key:
            case "m" if value <= MAX_LEVEL:
                values["magnitude"] = value
            case "n" if whole and value >= 1:
                values["num_layers"] = int(value)
            case "mstd":
                values["magnitude_std"] = math.inf if value > _UNIFORM_STD else value
            case "mmax" if math.isfinite(value):
                values["magnitude_max"] = value
            case "inc" if value in (0, 1):
                values["increasing"] = bool(value)
            case "p" if value <= 1:
                values["probability"] = value
            case "w" if value == 0:
                values["weighted"] = True
            case _:
                known = "m (0 to 10), n, mstd, mmax, inc (0, 1), p, w0"
                raise ConfigError("rand_augment", f"{part!r} in {text!r} is none of {known}")
    spec = RandAugmentSpec(**values)
    available = sum(weight > 0 for weight in _WEIGHTS.values())
    if spec.weighted and spec.num_layers > available:
        problem = f"'n{spec.num_layers}' in {text!r} is more than the {available} operations with a weight"
        raise ConfigError("rand_augment", problem)
    return spec


def rand_augment(
    image: Image.Image, rng: np.random.Generator, spec: RandAugmentSpec, resample: Image.Resampling, fill: Fill
) -> Image.Image:
    """Applies `spec.num_layers` random operations.

    Args:
        image: Grey or RGB image.
        rng: Source of the random choices.
        spec: The parsed policy.
        resample: Filter of the geometric operations.
        fill: Colour of pixels outside the image, one value per channel.
    """
    names = spec.operations
    weights = np.array(list(_WEIGHTS.values())) if spec.weighted else None
    chosen = rng.choice(len(names), spec.num_layers, replace=weights is None, p=weights)
    for index in chosen:
        if rng.random() >= spec.probability:
            continue
        name = names[index]
        image = apply_operation(image, name, draw_argument(name, draw_magnitude(spec, rng), rng), resample, fill)
    return image


def draw_magnitude(spec: RandAugmentSpec, rng: np.random.Generator) -> float:
    """Returns the magnitude of one operation, in [0, `spec.magnitude_max`]."""
    magnitude = spec.magnitude
    if math.isinf(spec.magnitude_std):
        magnitude = rng.uniform(0.0, magnitude)
    elif spec.magnitude_std > 0:
        magnitude = rng.normal(magnitude, spec.magnitude_std)
    return float(min(max(magnitude, 0.0), spec.magnitude_max))


def draw_argument(name: str, magnitude: float, rng: np.random.Generator) -> Argument:
    """Returns the argument of an operation at a magnitude: degrees, factor, fraction of a side, bits, or threshold."""
    share = magnitude / MAX_LEVEL
    sign = -1.0 if rng.random() < 0.5 else 1.0
    match name:
        case "Rotate":
            return sign * share * 30.0
        case "ShearX" | "ShearY":
            return sign * share * 0.3
        case "TranslateXRel" | "TranslateYRel":
            return sign * share * MAX_TRANSLATION
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            return share * 1.8 + 0.1
        case "ColorIncreasing" | "ContrastIncreasing" | "BrightnessIncreasing" | "SharpnessIncreasing":
            return max(0.1, 1.0 + sign * share * 0.9)
        case "Posterize":
            return int(share * 4)
        case "PosterizeIncreasing":
            return 4 - int(share * 4)
        case "Solarize":
            return min(256, int(share * 256))
        case "SolarizeIncreasing":
            return 256 - min(256, int(share * 256))
        case "SolarizeAdd":
            return min(128, int(share * 110))
    return 0.0


def apply_operation(
    image: Image.Image, name: str, argument: Argument, resample: Image.Resampling, fill: Fill
) -> Image.Image:
    """Applies one operation; see `rand_augment` for `resample` and `fill`."""
    base = name.removesuffix("Increasing")
    if base in _ENHANCERS:
        return _ENHANCERS[base](image).enhance(argument)
    if base in _LEVELS:
        return _LEVELS[base](image, int(argument))
    if base in _PLAIN:
        return _PLAIN[base](image)
    colour = fill if len(fill) > 1 else fill[0]
    if base == "Rotate":
        return image.rotate(argument, resample=resample, fillcolor=colour)
    matrix = {
        "ShearX": (1.0, argument, 0.0, 0.0, 1.0, 0.0),
        "ShearY": (1.0, 0.0, 0.0, argument, 1.0, 0.0),
        "TranslateXRel": (1.0, 0.0, argument * image.width, 0.0, 1.0, 0.0),
        "TranslateYRel": (1.0, 0.0, 0.0, 0.0, 1.0, argument * image.height),
    }[base]
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=colour)


def _posterize(image: Image.Image, bits: int) -> Image.Image:
    if bits >= 8:
        return image
    # Before version 13, Pillow accepted 0 bits, the value at magnitude 10, and returned a black image.
    return ImageOps.posterize(image, bits) if bits else image.point([0] * 256 * len(image.getbands()))


def _solarize_add(image: Image.Image, amount: int) -> Image.Image:
    table = [min(255, level + amount) if level < _SOLARIZE_ADD_BELOW else level for level in range(256)]
    return image.point(table * len(image.getbands()))


_NAMES = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)
# With `inc1`, these are replaced with variants whose strength increases with the magnitude.
_SIGNED = frozenset({"Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness"})
_WEIGHTS: Mapping[str, float] = {
    "Rotate": 0.3,
    "ShearX": 0.2,
    "ShearY": 0.2,
    "TranslateXRel": 0.1,
    "TranslateYRel": 0.1,
    "ColorIncreasing": 0.025,
    "SharpnessIncreasing": 0.025,
    "AutoContrast": 0.025,
    "SolarizeIncreasing": 0.005,
    "SolarizeAdd": 0.005,
    "ContrastIncreasing": 0.005,
    "BrightnessIncreasing": 0.005,
    "Equalize": 0.005,
    "PosterizeIncreasing": 0.0,
    "Invert": 0.0,
}
_ENHANCERS: Mapping[str, Callable[[Image.Image], Any]] = {
    "Color": ImageEnhance.Color,
    "Contrast": ImageEnhance.Contrast,
    "Brightness": ImageEnhance.Brightness,
    "Sharpness": ImageEnhance.Sharpness,
}
_LEVELS: Mapping[str, Callable[[Image.Image, int], Image.Image]] = {
    "Posterize": _posterize,
    "Solarize": ImageOps.solarize,
    "SolarizeAdd": _solarize_add,
}
_PLAIN: Mapping[str, Callable[[Image.Image], Image.Image]] = {
    "AutoContrast": ImageOps.autocontrast,
    "Equalize": ImageOps.equalize,
    "Invert": ImageOps.invert,
}
