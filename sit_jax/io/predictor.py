"""Predictors: models that map images to logits, from a run, a model folder, an ONNX file or a StableHLO artifact."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from sit_jax.config import DataConfig
from sit_jax.data.preprocess import normalize
from sit_jax.errors import NotFiniteError, UserError
from sit_jax.io.checkpoint import latest_step
from sit_jax.io.export import onnx_file, stablehlo
from sit_jax.io.inference import inference_model
from sit_jax.io.model_folder import is_folder, load_folder, read_description
from sit_jax.io.preprocessing import about_run, data_config, settled
from sit_jax.io.run_weights import run_weights
from sit_jax.io.runs import trained_variables
from sit_jax.io.weights import Weights
from sit_jax.models.architecture import Architecture
from sit_jax.models.regnet import RegNetArchitecture

Logits = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A model ready for prediction.

    Attributes:
        logits: uint8 images (batch, height, width, channels) of the model's size -> float32 (batch, classes).
        arch: The model's architecture.
        data: How images are read.
        metadata: Other metadata, such as `class_names`; see `Weights.metadata`.
    """

    logits: Logits
    arch: Architecture | RegNetArchitecture
    data: DataConfig
    metadata: dict[str, Any]

    @property
    def class_names(self) -> list[str]:
        """The class names; the class indices as text if no names are known."""
        return class_names(self.metadata, self.arch)


def open_weights(
    source: pathlib.Path, ema: bool = False, step: int | None = None, with_reverse: bool = False
) -> Weights:
    """Returns the weights of a run or a model folder, with all entries of their preprocessing set.

    Raises:
        UserError: The path is neither, or is damaged; or `ema` or `step` is given for a model folder.
    """
    _check_source(source)
    if source.is_file():
        raise UserError(f"{source}: is a file; give a run's folder or a model folder")
    if is_folder(source):
        _refuse_run_options(source, ema, step)
        weights = load_folder(source)
    else:
        weights = run_weights(source, ema, step, with_reverse)
    return weights._replace(metadata=settled(weights.metadata, weights.arch.in_channels))


def open_predictor(source: pathlib.Path, ema: bool = False, step: int | None = None) -> Predictor:
    """Opens a run, a model folder, an ONNX file or a StableHLO artifact.

    Args:
        source: The folder or file.
        ema: Use a run's moving average instead of its weights.
        step: Step of the run's checkpoint; the newest if None.

    Raises:
        UserError: The path is none of these, or is damaged, or a required package is missing.
    """
    _check_source(source)
    if source.is_dir():
        arch, variables, data, metadata, dtype = open_folder(source, ema, step)
        return Predictor(_finite(source, _jitted(arch, variables, dtype, data)), arch, data, metadata)
    _refuse_run_options(source, ema, step)
    if source.suffix == onnx_file.SUFFIX:
        return _described(source, *onnx_file.load(source), channels_last=False)
    if source.suffix == stablehlo.SUFFIX:
        return _described(source, *stablehlo.load(source), channels_last=True)
    raise UserError(
        f"{source}: is no model that can be opened; give a run's folder, a model folder, "
        f"a {onnx_file.SUFFIX} or a {stablehlo.SUFFIX} file"
    )


class Opened(NamedTuple):
    """The contents of a run or a model folder.

    Attributes:
        arch: The model's architecture.
        variables: Its variables, NumPy or JAX arrays.
        data: How images are read.
        metadata: Other metadata; see `Weights.metadata`.
        dtype: Type of the matrix products.
    """

    arch: Architecture | RegNetArchitecture
    variables: dict[str, Any]
    data: DataConfig
    metadata: dict[str, Any]
    dtype: str


def open_folder(source: pathlib.Path, ema: bool = False, step: int | None = None) -> Opened:
    """Reads a run or a model folder; takes the arguments of `open_predictor`.

    Raises:
        UserError: The path is neither, or is damaged; or `ema` or `step` is given for a model folder.
    """
    if is_run(source):
        config, variables = trained_variables(source, ema, step)
        metadata = about_run(config, source, latest_step(source) if step is None else step, ema)
        return Opened(config.model.architecture, variables, config.data, metadata, config.model.dtype)
    arch, params, stats, _, metadata = open_weights(source, ema, step)
    variables = {"params": params, "batch_stats": stats} if stats else {"params": params}
    return Opened(arch, variables, data_config(metadata, source), metadata, "float32")


def class_names(metadata: dict[str, Any], arch: Architecture | RegNetArchitecture) -> list[str]:
    """Returns the class names; the class indices as text if no names are known."""
    return metadata.get("class_names") or [str(index) for index in range(arch.num_classes)]


def is_run(source: pathlib.Path) -> bool:
    """Returns whether a path is a folder other than a model folder, such as a run directory."""
    return source.is_dir() and not is_folder(source)


class Described(Protocol):
    """A model with image preprocessing and metadata."""

    @property
    def data(self) -> DataConfig: ...

    @property
    def metadata(self) -> dict[str, Any]: ...


def evaluation_data(predictor: Described, changes: dict[str, Any]) -> DataConfig:
    """Returns the data section for evaluating a model: that of its training, with some fields changed.

    Raises:
        UserError: The model does not store its training data, and the changes name no data set.
    """
    provenance = predictor.metadata.get("provenance")
    known = isinstance(provenance, dict) and "data" in provenance
    if not known and "name" not in changes:
        raise UserError("--name: which data set? The model does not say what it was trained on")
    return dataclasses.replace(predictor.data, **changes)


def _jitted(arch: Architecture | RegNetArchitecture, variables: dict[str, Any], dtype: str, data: DataConfig) -> Logits:
    run = inference_model(arch, variables, dtype).jit(before=lambda pixels: normalize(pixels, data))
    return lambda pixels: np.asarray(run(pixels))


def _described(
    path: pathlib.Path, run: Callable[[Any], Any], description: dict[str, Any], channels_last: bool
) -> Predictor:
    """Returns a predictor for an exported function and its description."""
    arch, metadata = read_description(description, path)
    data = data_config(metadata, path)
    takes = metadata.pop("input", None)
    if takes not in ("pixels", "images"):
        raise UserError(f"{path}: does not say whether it takes pixels or normalised images")

    def logits(pixels: np.ndarray) -> np.ndarray:
        if takes == "pixels":
            return np.asarray(run(pixels))
        images = np.asarray(normalize(jnp.asarray(pixels), data))
        return np.asarray(run(images if channels_last else np.ascontiguousarray(images.transpose(0, 3, 1, 2))))

    return Predictor(_finite(path, logits), arch, data, metadata)


def _finite(source: pathlib.Path, logits: Logits) -> Logits:
    def checked(pixels: np.ndarray) -> np.ndarray:
        values = logits(pixels)
        if not np.isfinite(values).all():
            raise NotFiniteError(f"{source}: the model's outputs are not finite, so they say nothing about the images")
        return values

    return checked


def _check_source(source: pathlib.Path) -> None:
    if not source.exists():
        raise UserError(f"{source}: there is no such file or folder")


def _refuse_run_options(source: pathlib.Path, ema: bool, step: int | None) -> None:
    if ema or step is not None:
        raise UserError(f"{source}: is no run; --ema and --step choose among a run's checkpoints")
