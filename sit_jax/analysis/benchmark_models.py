"""Models that `sit benchmark` times: named models, runs, model folders and exported files."""

import dataclasses
import functools
import pathlib
import time
from typing import Any

import jax
import numpy as np
from jax.stages import Wrapped as JitWrapped
from jaxtyping import PyTree

from sit_jax.analysis.benchmark import Timed
from sit_jax.analysis.compilation import without_cache
from sit_jax.analysis.flops import count_cost
from sit_jax.errors import UserError
from sit_jax.io.convert.load_params import expected_shapes
from sit_jax.io.inference import InferenceModel, inference_model
from sit_jax.io.load import load
from sit_jax.io.model import Model
from sit_jax.io.runs import find_checkpoint
from sit_jax.models.architecture import Architecture
from sit_jax.models.trees import Params, Variables
from sit_jax.models.variants import VARIANTS
from sit_jax.training.elastic import metric_key, schedule_text
from sit_jax.training.metrics import evaluations, read_metrics

_BUFFERS = 4


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A model compiled for a batch size.

    `compile_s` is None if nothing is compiled here, `memory_bytes`, which include the weights, None if not known.
    """

    timed: Timed
    compile_s: float | None
    memory_bytes: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class BenchmarkModel:
    """A model to benchmark, by the name that the user gave."""

    name: str
    model: Model

    @property
    def gmac(self) -> float | None:
        """Billions of multiply-accumulates (GMAC) per image; None for convolutional models, which are not counted."""
        arch = self.model.arch
        return count_cost(arch).gmac if isinstance(arch, Architecture) else None

    @functools.cached_property
    def top1(self) -> float | None:
        """Its accuracy, fraction of 1, if its run recorded one."""
        if self.model.config is None:
            return None
        folder, _ = find_checkpoint(pathlib.Path(self.model.source))
        trained, arch, key = self.model.config.model.architecture, self.model.arch, "top1"
        if isinstance(arch, Architecture) and isinstance(trained, Architecture):
            key = metric_key(key, trained.token_counts, arch.token_counts)
        scores = [line[key] for line in evaluations(read_metrics(folder)) if key in line]
        return float(scores[-1]) if scores else None

    def schedules(self) -> "list[BenchmarkModel]":
        """Returns the model at each of the token schedules that it was trained for; the model itself if at one only."""
        arch = self.model.arch
        choices = arch.kept_tokens_choices if isinstance(arch, Architecture) and self.model.exported is None else ()
        return [BenchmarkModel(f"{self.name} {schedule_text(kept)}", self.model.cut(kept)) for kept in choices] or [
            self
        ]

    def compile(self, batch: int, dtype: str) -> Compiled:
        """Compiles the model for a batch size and type of the matrix products; exported files keep their own type."""
        arch, exported = self.model.arch, self.model.exported
        shape = (batch, *arch.image_shape, arch.in_channels)
        images = [np.random.default_rng(seed).standard_normal(shape, np.float32) for seed in range(_BUFFERS)]
        if exported is None:
            inference, weights = self._inference(dtype)
            return _compile(inference.jitted(batch), weights, images)
        if exported.input == "pixels":
            images = [np.clip(128 + 64 * image, 0, 255).astype(np.uint8) for image in images]
        elif not exported.channels_last:
            images = [np.ascontiguousarray(image.transpose(0, 3, 1, 2)) for image in images]
        if exported.channels_last:
            return _compile(jax.jit(lambda _, image: exported.run(image)), (), images)
        return Compiled(Timed(exported.run, images), None, None)

    @functools.cache  # noqa: B019 - models live as long as the benchmark
    def _inference(self, dtype: str) -> tuple[InferenceModel, Params]:
        inference = inference_model(self.model.arch, self.model.variables, dtype)
        return inference, jax.device_put(inference.weights)


def open_benchmark_model(name: str) -> BenchmarkModel:
    """Opens a named model (with random weights), or whatever `load` opens; raises a UserError for other names."""
    if name in VARIANTS:
        return random_benchmark_model(name, VARIANTS[name])
    if not pathlib.Path(name).exists():
        raise UserError(f"{name}: is not a named model (see `sit models`), and there is no such file or folder")
    return BenchmarkModel(name, load(name))


def random_benchmark_model(name: str, arch: Architecture) -> BenchmarkModel:
    """Returns a model of an architecture with random weights, which are as fast as trained ones."""
    return BenchmarkModel(name, Model(arch, _random_variables(arch), source=name))


def _compile(forward: JitWrapped, weights: PyTree, images: list[np.ndarray]) -> Compiled:
    buffers = [jax.device_put(image) for image in images]
    begun = time.perf_counter()
    with without_cache():
        compiled = forward.lower(weights, buffers[0]).compile()
    seconds = time.perf_counter() - begun
    needs = compiled.memory_analysis()
    memory = None
    if needs is not None:
        memory = needs.argument_size_in_bytes + needs.output_size_in_bytes + needs.temp_size_in_bytes
    return Compiled(Timed(lambda image: compiled(weights, image), buffers), seconds, memory)


def _random_variables(arch: Architecture) -> Variables:
    """Returns weights of a scale that keeps all activations finite; their values do not affect the speed."""
    rng = np.random.default_rng(0)

    def leaf(path: tuple[Any, ...], x: Any) -> np.ndarray:
        if path[-1].key in ("scale", "var"):
            return np.ones(x.shape, np.float32)
        return 0.02 * rng.standard_normal(x.shape, np.float32)

    tree = jax.tree_util.tree_map_with_path(leaf, expected_shapes(arch, rtsm=False))
    return {"params": tree["params"], "batch_stats": tree["batch_stats"]}
