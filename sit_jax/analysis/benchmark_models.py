"""Models that `sit benchmark` times: named models, runs, model folders and exported files."""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sit_jax.analysis.benchmark import Timed
from sit_jax.analysis.flops import count_cost
from sit_jax.errors import UserError
from sit_jax.io.convert.load_params import expected_shapes
from sit_jax.io.export import onnx_file, stablehlo
from sit_jax.io.inference import InferenceModel, inference_model
from sit_jax.io.model_folder import read_description
from sit_jax.io.predictor import is_run, open_folder
from sit_jax.models.architecture import Architecture
from sit_jax.models.regnet import RegNetArchitecture
from sit_jax.models.variants import VARIANTS
from sit_jax.training.metrics import evaluations, read_metrics

_BUFFERS = 4


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A model compiled for a batch size.

    Attributes:
        timed: The computation to time.
        compile_s: Compile time in seconds; None if nothing is compiled here.
        memory_bytes: Largest memory use of the compiled program, including weights; None if not known.
    """

    timed: Timed
    compile_s: float | None
    memory_bytes: int | None


@dataclasses.dataclass(frozen=True)
class BenchmarkModel:
    """A model to benchmark.

    Attributes:
        name: The given name.
        arch: Its architecture.
        top1: Its accuracy, fraction of 1, if its run recorded one.
        ready: Batch size and type of the matrix products -> the compiled model. Exported files keep their own type.
    """

    name: str
    arch: Architecture | RegNetArchitecture
    top1: float | None
    ready: Callable[[int, str], Compiled]

    @property
    def gmac(self) -> float | None:
        """Billions of multiply-accumulates (GMAC) per image; None for convolutional models, which are not counted."""
        return count_cost(self.arch).gmac if isinstance(self.arch, Architecture) else None


def open_benchmark_model(name: str) -> BenchmarkModel:
    """Opens a named model (with random weights), a run, a model folder, an ONNX file or a StableHLO artifact.

    Raises:
        UserError: The name is none of these, the files are damaged, or a required package is missing.
    """
    if name in VARIANTS:
        shape = VARIANTS[name]
        return BenchmarkModel(name, shape, None, _from_variables(shape, _random_variables(shape)))
    source = pathlib.Path(name)
    if not source.exists():
        raise UserError(f"{name}: is no named model, see `sit models`, and there is no such file or folder")
    if source.is_file():
        return _exported(name, source)
    arch, variables, *_ = open_folder(source)
    return BenchmarkModel(name, arch, _accuracy(source) if is_run(source) else None, _from_variables(arch, variables))


def _from_variables(
    arch: Architecture | RegNetArchitecture, variables: dict[str, Any]
) -> Callable[[int, str], Compiled]:
    @functools.cache
    def prepared(dtype: str) -> tuple[InferenceModel, Any]:
        model = inference_model(arch, variables, dtype)
        return model, jax.device_put(model.weights)

    def ready(batch: int, dtype: str) -> Compiled:
        model, weights = prepared(dtype)
        return _compiled(model.jitted(batch), weights, _images(arch, batch))

    return ready


def _compiled(forward: Any, prepared: Any, images: list[np.ndarray]) -> Compiled:
    buffers = [jax.device_put(image) for image in images]
    begun = time.perf_counter()
    compiled = forward.lower(prepared, buffers[0]).compile()
    seconds = time.perf_counter() - begun
    needs = compiled.memory_analysis()
    memory = None
    if needs is not None:
        memory = needs.argument_size_in_bytes + needs.output_size_in_bytes + needs.temp_size_in_bytes
    return Compiled(Timed(lambda image: compiled(prepared, image), buffers), seconds, memory)


def _exported(name: str, source: pathlib.Path) -> BenchmarkModel:
    channels_last = source.suffix == stablehlo.SUFFIX
    run: Any
    if channels_last:
        run, description = stablehlo.load(source)
    elif source.suffix == onnx_file.SUFFIX:
        run, description = onnx_file.load(source)
    else:
        known = f"a {onnx_file.SUFFIX} or a {stablehlo.SUFFIX} file"
        raise UserError(f"{name}: is no model that can be timed; give a named model, a folder, {known}")
    arch, metadata = read_description(description, source)

    def ready(batch: int, _: str) -> Compiled:
        images = _images(arch, batch)
        if metadata.get("input") == "pixels":
            images = [np.clip(128 + 64 * image, 0, 255).astype(np.uint8) for image in images]
        elif not channels_last:
            images = [np.ascontiguousarray(image.transpose(0, 3, 1, 2)) for image in images]
        if channels_last:
            return _compiled(jax.jit(lambda _, image: run(image)), (), images)
        return Compiled(Timed(run, images), None, None)

    return BenchmarkModel(name, arch, None, ready)


def _images(arch: Architecture | RegNetArchitecture, batch: int) -> list[np.ndarray]:
    shape = (batch, arch.image_size, arch.image_size, arch.in_channels)
    return [np.random.default_rng(seed).standard_normal(shape, np.float32) for seed in range(_BUFFERS)]


def _random_variables(arch: Architecture) -> dict[str, Any]:
    """Returns weights of a scale that keeps all activations finite; their values do not affect the speed."""
    rng = np.random.default_rng(0)

    def leaf(path: tuple[Any, ...], x: Any) -> np.ndarray:
        if path[-1].key in ("scale", "var"):
            return np.ones(x.shape, np.float32)
        return 0.02 * rng.standard_normal(x.shape, np.float32)

    tree = jax.tree_util.tree_map_with_path(leaf, expected_shapes(arch, reverse=False))
    return {"params": tree["params"], "batch_stats": tree["batch_stats"]}


def _accuracy(folder: pathlib.Path) -> float | None:
    scores = [line["top1"] for line in evaluations(read_metrics(folder)) if "top1" in line]
    return float(scores[-1]) if scores else None
