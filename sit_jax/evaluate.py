"""Evaluation over exactly the whole split, on any mesh."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import Mesh

from sit_jax import sharding
from sit_jax.data.config import DataConfig
from sit_jax.data.pipeline import HostBatch
from sit_jax.data.preprocess import normalize
from sit_jax.metrics import EvalMetrics, eval_metrics

EvalStep = Callable[[dict[str, Any], Any, EvalMetrics], EvalMetrics]


def make_eval_step(model: Any, data: DataConfig) -> EvalStep:
    """The jitted step `(variables, batch, metrics so far) -> metrics`; `batch` is one of `eval_batches`."""

    def eval_step(variables: dict[str, Any], batch: Any, metrics: EvalMetrics) -> EvalMetrics:
        logits, _ = model.apply(variables, normalize(batch["image"], data))
        return metrics.merge(eval_metrics(logits, batch["label"], batch["mask"]))

    return jax.jit(eval_step)


def evaluate(
    step: EvalStep, variables: dict[str, Any], batches: Iterable[HostBatch], mesh: Mesh, what: str = "evaluation"
) -> dict[str, float]:
    """Loss, top-1, top-5 (fractions of 1) and the number of examples of a model over all batches.

    Args:
        step: See `make_eval_step`.
        variables: The model's.
        batches: See `eval_batches`.
        mesh: Where they are computed.
        what: What is evaluated, for messages.

    Raises:
        RunError: No example counts.
        NotFiniteError: The loss is not finite.
    """
    metrics = jax.device_put(EvalMetrics.empty(), sharding.replicated(mesh))
    for batch in batches:
        metrics = step(variables, sharding.put_batch(mesh, batch), metrics)
    return metrics.result(what)
