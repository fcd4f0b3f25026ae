"""How an image becomes a model's input, as plain values that travel with an exported model."""

import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sit_jax import __version__
from sit_jax.config import Config
from sit_jax.data.config import DataConfig
from sit_jax.data.registry import open_source
from sit_jax.errors import UserError
from sit_jax.io.runs import read_class_names

# What models for ImageNet expect, and what is taken where a description is silent.
IMAGENET: dict[str, Any] = {
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "interpolation": "bicubic",
    "crop_fraction": 0.875,
    "resize": "crop",
}

# Keys of the data section that decide which images a model is evaluated on.
_EVALUATED = ("eval_split", "val_fraction", "on_decode_error", "max_pixels")

# As models written by earlier versions have them.
_FORMER = {"held_out": "val_fraction", "on_broken": "on_decode_error"}

_DATA: TypeAdapter[DataConfig] = TypeAdapter(DataConfig)


def preprocessing_of(data: DataConfig, channels: int) -> dict[str, Any]:
    """The evaluation preprocessing of a configuration; mean and deviation per channel, averaged for grey images."""
    return {
        "mean": _per_channel(data.mean, channels),
        "std": _per_channel(data.std, channels),
        "interpolation": data.interpolation,
        "crop_fraction": data.crop_fraction,
        "resize": data.resize,
    }


# Below this a deviation is none, and in float32 it may be zero.
_SMALLEST_STD = 1e-9


def check_about(metadata: dict[str, Any], num_classes: int, where: object) -> None:
    """Raises a UserError where a description of a model holds what no image or class can be described by.

    Args:
        metadata: See `Weights.metadata`.
        num_classes: The model's classes.
        where: The file, for messages.
    """
    names = metadata.get("class_names")
    if names is not None:
        whole = isinstance(names, list) and len(names) == num_classes
        if not whole or not all(isinstance(name, str) for name in names):
            raise UserError(f"{where}: class_names must be a list of {num_classes} names")
    preprocessing = metadata.get("preprocessing")
    if preprocessing is None:
        return
    if not isinstance(preprocessing, dict):
        raise UserError(f"{where}: preprocessing must be an object, is {str(preprocessing)[:50]!r}")
    for name, least in (("mean", -math.inf), ("std", _SMALLEST_STD)):
        if name in preprocessing and not _are_numbers(preprocessing[name], least):
            raise UserError(f"{where}: preprocessing.{name} must be a list of numbers, one per channel")
    choices = ("interpolation", "crop_fraction", "resize")
    data_config({"preprocessing": {name: preprocessing[name] for name in choices if name in preprocessing}}, where)


def _are_numbers(values: Any, above: float) -> bool:
    if not isinstance(values, list | tuple) or not values:
        return False
    kinds = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return kinds and all(abs(value) < 1e6 and value > above for value in values)


def settled(metadata: dict[str, Any], channels: int) -> dict[str, Any]:
    """A model's `metadata` with every entry of `preprocessing` there, ImageNet's where it is silent."""
    given = metadata.get("preprocessing") or {}
    filled = {**IMAGENET, **given}
    for name in ("mean", "std"):
        filled[name] = _per_channel(filled[name], channels)
    return {**metadata, "preprocessing": filled}


def assumptions(metadata: dict[str, Any]) -> str:
    """What is taken of `IMAGENET`, since a model's `metadata` is silent: `name value, ...`; empty where it says all."""
    given = metadata.get("preprocessing") or {}
    return ", ".join(f"{name} {value}" for name, value in IMAGENET.items() if name not in given)


def data_config(metadata: dict[str, Any], where: object) -> DataConfig:
    """The data section that reads images as a model's `metadata` says.

    Raises:
        UserError: The description holds impossible values; `where` names it.
    """
    values = {**IMAGENET, **(metadata.get("preprocessing") or {})}
    for name in ("mean", "std"):
        numbers = values[name]
        if isinstance(numbers, Sequence) and len(numbers) == 1:
            values[name] = list(numbers) * 3  # Grey: DataConfig averages them again.
    provenance = metadata.get("provenance")
    if isinstance(provenance, dict) and "data" in provenance:
        provenance = {_FORMER.get(name, name): value for name, value in provenance.items()}
        known = {name: provenance[name] for name in _EVALUATED if name in provenance}
        values |= {"name": provenance["data"], **known}
    try:
        return _DATA.validate_python(values)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"{where}: preprocessing.{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None


def about_run(config: Config, folder: pathlib.Path, step: int, ema: bool) -> dict[str, Any]:
    """What is known about a run's model: class names, preprocessing, provenance; see `Weights.metadata`."""
    metadata: dict[str, Any] = {
        "preprocessing": preprocessing_of(config.data, config.model.architecture.in_channels),
        "provenance": {
            "run": folder.resolve().name,
            "step": step,
            "ema": ema,
            "data": config.data.name,
            **{name: getattr(config.data, name) for name in _EVALUATED},
            "sit_jax": __version__,
        },
    }
    names = run_class_names(config, folder)
    return metadata if names is None else {"class_names": names, **metadata}


def run_class_names(config: Config, folder: pathlib.Path) -> list[str] | None:
    """The class names of a run, by index; None, with a line that says why, where nothing tells them.

    Args:
        config: The run's configuration.
        folder: The run's folder.

    Raises:
        RunError: The file that holds them is damaged.
    """
    names = read_class_names(folder)
    if names is not None:
        return names
    try:
        # Runs of older versions do not hold them; their data may still be there.
        return [str(name) for name in open_source(config.data, config.data.eval_split).class_names]
    except UserError as error:
        print(f"class names of {folder} are unknown: {error}", file=sys.stderr)
        return None


def _per_channel(values: Sequence[float], channels: int) -> list[float]:
    numbers = [float(value) for value in values]
    return numbers if len(numbers) == channels else [sum(numbers) / len(numbers)] * channels
