"""Evaluation on exactly the whole split, on any mesh."""

from collections.abc import Callable, Iterable

import flax.linen as nn
import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from sit_jax.data.classes import match_classes
from sit_jax.data.config import DataConfig, InputSpec
from sit_jax.data.pipeline import HostBatch, Hosts, check_classes, eval_batches
from sit_jax.data.preprocess import normalize
from sit_jax.data.registry import open_source
from sit_jax.io.predictor import Predictor
from sit_jax.models.trees import Variables
from sit_jax.parallel import sharding
from sit_jax.training.metrics import EvalMetrics, eval_metrics, warn_of_missing

EvalStep = Callable[[Variables, PyTree[jax.Array], EvalMetrics], EvalMetrics]


def make_eval_step(model: nn.Module, data: DataConfig) -> EvalStep:
    """Returns the jitted step `(variables, batch, metrics so far) -> metrics`; `batch` is one of `eval_batches`."""

    def eval_step(variables: Variables, batch: PyTree[jax.Array], metrics: EvalMetrics) -> EvalMetrics:
        logits, _ = model.apply(variables, normalize(batch["image"], data))
        return metrics.merge(eval_metrics(logits, batch["label"], batch["mask"]))

    return jax.jit(eval_step)


def evaluate(
    step: EvalStep, variables: Variables, batches: Iterable[HostBatch], mesh: Mesh, what: str = "evaluation"
) -> dict[str, float]:
    """Returns loss, top-1 and top-5 (fractions of 1) and the number of examples of a model over all batches.

    Args:
        step: See `make_eval_step`.
        variables: Variables of the model.
        batches: See `eval_batches`.
        mesh: The mesh of the computation.
        what: Name of what is evaluated, for the messages of `EvalMetrics.result`.
    """
    metrics = jax.device_put(EvalMetrics.empty(), sharding.replicated(mesh))
    for batch in batches:
        metrics = step(variables, sharding.put_batch(mesh, batch), metrics)
    return metrics.result(what)


def evaluate_predictor(
    predictor: Predictor, data: DataConfig, batch_size: int = 64, match_names: bool = True
) -> dict[str, float]:
    """Evaluates a predictor on the whole evaluation split: loss, top-1, top-5 (fractions of 1), number of examples.

    Classes are matched by name if `match_names` is set and both sides have names, otherwise by index.

    Raises:
        UserError: The data cannot be read, or has different classes from the model.
    """
    arch = predictor.arch
    spec = InputSpec(
        data=data,
        image_size=arch.image_size,
        channels=arch.in_channels,
        num_classes=arch.num_classes,
        eval_batch_size=batch_size,
    )
    names = predictor.metadata.get("class_names") if match_names else None
    source = match_classes(open_source(data, data.eval_split), names, "the model")
    check_classes(spec, source)
    metrics = EvalMetrics.empty()
    merge = jax.jit(lambda metrics, *batch: metrics.merge(eval_metrics(*batch)))
    # With several processes, each evaluates the whole split: no mesh combines their results.
    for batch in eval_batches(spec, source, Hosts()):
        metrics = merge(metrics, predictor.logits(batch["image"]), batch["label"], batch["mask"])
    result = metrics.result("evaluation")
    warn_of_missing(result, len(source))
    return result
