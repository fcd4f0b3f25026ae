"""Metadata of models as plain values: class names, image preprocessing, provenance and licence."""

import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sit_jax import __version__
from sit_jax.config import Config, DataConfig, JsonObject
from sit_jax.data.registry import open_source
from sit_jax.errors import UserError
from sit_jax.io.runs import read_class_names

# Preprocessing of ImageNet models; the default for missing entries of a description.
IMAGENET: JsonObject = {
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "interpolation": "bicubic",
    "crop_fraction": 0.875,
    "resize": "crop",
}

# Keys of the data section that determine the images for evaluation.
_EVALUATED = ("eval_split", "val_fraction", "on_decode_error", "max_pixels")

# The preprocessing of models written by earlier versions.
_FORMER = {"held_out": "val_fraction", "on_broken": "on_decode_error"}

_DATA: TypeAdapter[DataConfig] = TypeAdapter(DataConfig)


# Smallest valid standard deviation; in float32, a smaller one may be zero.
_SMALLEST_STD = 1e-9


def check_metadata(metadata: JsonObject, num_classes: int, where: object) -> None:
    """Raises a UserError, whose message begins with `where`, if an entry that is used is not valid."""
    names = metadata.get("class_names")
    if names is not None:
        whole = isinstance(names, list) and len(names) == num_classes
        if not whole or not all(isinstance(name, str) for name in names):
            raise UserError(f"{where}: class_names must be a list of {num_classes} names")
    counters = metadata.get("num_batches_tracked", {})
    if not isinstance(counters, dict) or not all(type(x) is int and 0 <= x < 2**63 for x in counters.values()):
        raise UserError(f"{where}: num_batches_tracked must be an object of whole numbers")
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
    whole = isinstance(values, list | tuple) and len(values) > 0
    return whole and all(type(x) in (int, float) and abs(x) < 1e6 and x > above for x in values)


def complete_metadata(metadata: JsonObject, channels: int) -> JsonObject:
    """Returns a model's `metadata` with all entries of `preprocessing` set; missing ones are ImageNet's."""
    filled = {**IMAGENET, **(metadata.get("preprocessing") or {})}
    filled |= {name: _per_channel(filled[name], channels) for name in ("mean", "std")}
    return {**metadata, "preprocessing": filled}


def assumptions(metadata: JsonObject) -> str:
    """Returns the entries of `IMAGENET` used as defaults: `name value, ...`; empty if the `metadata` is complete."""
    given = metadata.get("preprocessing") or {}
    return ", ".join(f"{name} {value}" for name, value in IMAGENET.items() if name not in given)


def evaluated_on(metadata: JsonObject) -> JsonObject:
    """Returns the fields of the data section that name a model's evaluation split; empty if it does not store them."""
    provenance = metadata.get("provenance")
    if not isinstance(provenance, dict) or "data" not in provenance:
        return {}
    stored = {_FORMER.get(name, name): value for name, value in provenance.items()}
    return {"name": stored["data"], **{name: stored[name] for name in _EVALUATED if name in stored}}


def data_config(metadata: JsonObject, where: object) -> DataConfig:
    """Returns the data section with the image preprocessing of a model's `metadata`.

    Raises a UserError, whose message begins with `where`, if it has invalid values.
    """
    values = {**IMAGENET, **(metadata.get("preprocessing") or {})}
    for name in ("mean", "std"):
        numbers = values[name]
        if isinstance(numbers, Sequence) and len(numbers) == 1:
            values[name] = list(numbers) * 3  # Grey images: DataConfig averages the values again.
    values |= evaluated_on(metadata)
    try:
        return _DATA.validate_python(values)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"{where}: preprocessing.{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None


def run_metadata(config: Config, folder: pathlib.Path, step: int, ema: bool) -> JsonObject:
    """Returns the metadata of a run's model: class names, preprocessing, provenance; see `sit_jax.io.model.Model`."""
    data, names = config.data, run_class_names(config, folder)
    metadata: JsonObject = {
        **({} if names is None else {"class_names": names}),
        "preprocessing": {name: getattr(data, name) for name in IMAGENET},
        "provenance": {
            "run": folder.resolve().name,
            "step": step,
            "ema": ema,
            "data": data.name,
            **{name: getattr(data, name) for name in _EVALUATED},
            "sit_jax": __version__,
        },
    }
    return complete_metadata(metadata, config.model.architecture.in_channels)


def run_class_names(config: Config, folder: pathlib.Path) -> list[str] | None:
    """Returns the class names of a run, by index; None if it uses no labels.

    The result is also None, with a line that states the reason, if they are unknown.
    """
    if not config.loss.uses_labels:
        return None
    names = read_class_names(folder)
    if names is not None:
        return names
    try:
        # Runs of older versions do not store them, but their data may still exist.
        return [str(name) for name in open_source(config.data, config.data.eval_split).class_names]
    except UserError as error:
        print(f"class names of {folder} are unknown: {error}", file=sys.stderr)
        return None


def _per_channel(values: Sequence[float], channels: int) -> list[float]:
    numbers = [float(value) for value in values]
    return numbers if len(numbers) == channels else [sum(numbers) / len(numbers)] * channels
