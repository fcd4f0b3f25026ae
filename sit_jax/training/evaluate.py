"""Evaluation on exactly the whole split, on any mesh."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from sit_jax.data.classes import match_classes
from sit_jax.data.config import DataConfig, InputSpec
from sit_jax.data.pipeline import HostBatch, Hosts, check_classes, eval_batches
from sit_jax.data.preprocess import normalize
from sit_jax.data.registry import log_notes, open_source
from sit_jax.data.sources import Source
from sit_jax.errors import UserError, require
from sit_jax.io.model import Model
from sit_jax.models import build_model
from sit_jax.models.trees import Variables
from sit_jax.parallel import distributed, sharding
from sit_jax.training.metrics import EvalMetrics, eval_metrics, feature_metrics

EvalStep = Callable[[Variables, dict[str, jax.Array], EvalMetrics], EvalMetrics]

# Images in a batch for models without a configuration.
_BATCH_SIZE = 64


def make_eval_step(model: nn.Module, data: DataConfig) -> EvalStep:
    """Returns the jitted step `(variables, batch, metrics so far) -> metrics`; `batch` is one of `eval_batches`."""

    def eval_step(variables: Variables, batch: dict[str, jax.Array], metrics: EvalMetrics) -> EvalMetrics:
        logits, _ = model.apply(variables, normalize(batch["image"], data))
        return metrics.merge(eval_metrics(logits, batch["label"], batch["mask"]))

    return jax.jit(eval_step)


def evaluate(
    step: EvalStep, variables: Variables, batches: Iterable[HostBatch], mesh: Mesh, what: str = "evaluation"
) -> dict[str, float]:
    """Returns loss, top-1 and top-5 (fractions of 1) and the number of examples of a model over all batches.

    With fewer than five classes, there is no top-5. `what` names it in the errors of `EvalMetrics.result`.
    """
    metrics = jax.device_put(EvalMetrics.empty(), sharding.replicated(mesh))
    for batch in batches:
        metrics = step(variables, sharding.put_batch(mesh, batch), metrics)
    return metrics.result(what)


class Features(NamedTuple):
    """Pooled features of the images of a split, (images, width) float32, and the images' labels (images, ...).

    Images that cannot be read, and padding, are not `valid`, (images,).
    """

    values: np.ndarray
    labels: np.ndarray
    valid: np.ndarray


class FeatureExtractor:
    """Extracts the features of a module over batches; all processes take part and return those of all images."""

    def __init__(self, model: nn.Module, data: DataConfig, mesh: Mesh) -> None:
        """Prepares the jitted step; raises a ConfigError when it is called if the model returns no features."""

        def step(variables: Variables, batch: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
            _, outputs = model.bind(variables)(normalize(batch["image"], data))
            require(outputs.features is not None, "model", "returns no features")
            return outputs.features, batch["label"], batch["mask"] > 0

        self._mesh, self._step = mesh, jax.jit(step, out_shardings=sharding.replicated(mesh))

    def __call__(self, variables: Variables, batches: Iterable[HostBatch]) -> Features:
        """Returns the features of all batches of `eval_batches`, which are at least one."""
        parts = [jax.device_get(self._step(variables, sharding.put_batch(self._mesh, batch))) for batch in batches]
        return Features(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def compare_features(student: Features, teacher: Features, what: str) -> dict[str, float]:
    """Returns `feature_metrics` of the images that both models have read."""
    both = student.valid & teacher.valid
    return feature_metrics(student.values[both], teacher.values[both], what)


def model_features(model: Model, data: DataConfig, split: str, labels: bool = False) -> Features:
    """Returns a model's features of the images of a split; with `labels`, images without one are not valid.

    Raises a UserError if the data cannot be read, or the model is an exported file, or not a vision transformer.
    """
    extract = FeatureExtractor(build_model(model.vit, dtype=model.dtype), data, mesh := sharding.make_mesh())
    spec = dataclasses.replace(eval_inputs(model, data, mesh), labels=labels)
    return extract(sharding.place(mesh, model.variables), eval_batches(spec, _open_split(model, data, split)))


def feature_comparison(teacher: Model | None, data: DataConfig, source: str) -> Callable[[Model], dict[str, float]]:
    """Returns the function that compares a model's features of the evaluation split with its teacher's.

    It returns `feature_metrics`, and raises a UserError as `model_features` does. The teacher's features are computed
    once, for any number of models. Raises a UserError, which names the `source` of the models, without a teacher.
    """
    if teacher is None:
        raise UserError(f"{source}: has no labels to evaluate with, and no teacher; sit evaluate --probe needs none")

    @functools.cache
    def theirs() -> Features:
        return model_features(teacher, data, data.eval_split)

    def compare(model: Model) -> dict[str, float]:
        return compare_features(model_features(model, data, data.eval_split), theirs(), model.source)

    return compare


def eval_inputs(model: Model, data: DataConfig, mesh: Mesh) -> InputSpec:
    """Returns the parameters of a model's evaluation: the batch size is that of its training, if there was one."""
    arch, batch_size = model.arch, _BATCH_SIZE if model.config is None else model.config.eval_batch_size
    return InputSpec(
        data=data,
        image_size=arch.image_shape,
        channels=arch.in_channels,
        num_classes=arch.num_classes,
        eval_batch_size=sharding.eval_batch_size(mesh, batch_size),
    )


def _open_split(model: Model, data: DataConfig, split: str) -> Source:
    # With the splits of the training: whether `val` is held out of `train` does not depend on the evaluated split.
    return open_source(dataclasses.replace(data, eval_split=model.data.eval_split), split)


def labelled_source(model: Model, data: DataConfig, match_names: bool = True, quiet: bool = True) -> Source:
    """Opens the evaluation split, with the labels in the order of a model's classes; see `evaluate_model`.

    Prints the notes of the data unless `quiet`. Raises a UserError if the data does not exist, has no labels, or has
    other classes than the model.
    """
    source = _open_split(model, data, data.eval_split)
    if not quiet:
        log_notes([source])
    names = model.metadata.get("class_names") if match_names else None
    matched = match_classes(source, names, model.source)
    check_classes(eval_inputs(model, data, sharding.make_mesh()), matched)
    return matched


def evaluate_model(model: Model, data: DataConfig | None = None, match_names: bool = True) -> dict[str, float]:
    """Evaluates a model on the whole evaluation split: loss, top-1, top-5 (as `evaluate`), number of examples.

    All processes and devices take part, except for an exported file: each process evaluates the whole split then.
    `data` is that of the training if None. `match_names` matches classes by name if both sides have names; otherwise
    they are matched by index. Raises a UserError if the data does not exist or has other classes than the model.
    """
    quiet = data is None or not distributed.is_process_0()  # Training has logged the notes of its own data.
    data, mesh = data or model.data, sharding.make_mesh()
    spec = eval_inputs(model, data, mesh)
    source = labelled_source(model, data, match_names, quiet)
    if model.exported is None:
        variables = sharding.place(mesh, model.variables)
        batches = eval_batches(spec, source)
        result = evaluate(make_eval_step(model.module, data), variables, batches, mesh, model.source)
    else:
        metrics = EvalMetrics.empty()
        merge = jax.jit(lambda metrics, *batch: metrics.merge(eval_metrics(*batch)))
        for batch in eval_batches(spec, source, Hosts()):
            metrics = merge(metrics, model.logits(batch["image"]), batch["label"], batch["mask"])
        result = metrics.result(model.source)
    missing = len(source) - round(result["examples"])
    if missing and distributed.is_process_0():
        unread = f"{missing} of {len(source)} images are not counted: they are unreadable or have no label"
        print(unread, file=sys.stderr)
    return result
