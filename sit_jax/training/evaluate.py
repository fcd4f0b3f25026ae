"""Evaluation on exactly the whole split, on any mesh."""

import dataclasses
import sys
from collections.abc import Callable, Iterable

import flax.linen as nn
import jax
from jax.sharding import Mesh

from sit_jax.data.classes import match_classes
from sit_jax.data.config import DataConfig, InputSpec
from sit_jax.data.pipeline import HostBatch, Hosts, check_classes, eval_batches
from sit_jax.data.preprocess import normalize
from sit_jax.data.registry import log_notes, open_source
from sit_jax.io.model import Model
from sit_jax.models.trees import Variables
from sit_jax.parallel import distributed, sharding
from sit_jax.training.metrics import EvalMetrics, eval_metrics

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


def evaluate_model(model: Model, data: DataConfig | None = None, match_names: bool = True) -> dict[str, float]:
    """Evaluates a model on the whole evaluation split: loss, top-1, top-5 (as `evaluate`), number of examples.

    All processes and devices take part, except for an exported file: each process evaluates the whole split then.
    `data` is that of the training if None. `match_names` matches classes by name if both sides have names; otherwise
    they are matched by index. Raises a UserError if the data does not exist or has other classes than the model.
    """
    quiet = data is None or not distributed.is_process_0()  # Training has logged the notes of its own data.
    data, arch, mesh = data or model.data, model.arch, sharding.make_mesh()
    batch_size = _BATCH_SIZE if model.config is None else model.config.eval_batch_size
    spec = InputSpec(
        data=data,
        image_size=arch.image_shape,
        channels=arch.in_channels,
        num_classes=arch.num_classes,
        eval_batch_size=sharding.eval_batch_size(mesh, batch_size),
    )
    names = model.metadata.get("class_names") if match_names else None
    # With the splits of the training: whether `val` is held out of `train` does not depend on the evaluated split.
    opened = open_source(dataclasses.replace(data, eval_split=model.data.eval_split), data.eval_split)
    if not quiet:
        log_notes([opened])
    source = match_classes(opened, names, model.source)
    check_classes(spec, source)
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
