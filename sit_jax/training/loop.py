"""The training loop: runs training from the initial weights to the last checkpoint; contains all its side effects."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import pathlib
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
from clu import parameter_overview
from jax.sharding import Mesh

from sit_jax import __version__
from sit_jax.config import Config, DataConfig, JsonObject
from sit_jax.config.config_dict import from_config_dict, to_dict
from sit_jax.config.resume import changes
from sit_jax.data.pipeline import Stream, TrainData, check_classes, check_has_classes, eval_batches
from sit_jax.data.registry import open_source, open_sources
from sit_jax.data.sources import Source
from sit_jax.errors import ConfigError, NotFiniteError, PreemptedError
from sit_jax.io import runs
from sit_jax.io.load import load_run
from sit_jax.io.lock import locked
from sit_jax.models.cut import cut_params
from sit_jax.models.trees import Variables
from sit_jax.parallel import distributed, sharding
from sit_jax.training.checkpoint import Checkpoints, SaveSchedule
from sit_jax.training.elastic import choices, drawn_schedules, metric_key, schedule_name
from sit_jax.training.evaluate import FeatureExtractor, Features, compare_features, evaluate, make_eval_step
from sit_jax.training.init import check_origins, given_teacher, initial_state
from sit_jax.training.metrics import MetricWriter
from sit_jax.training.progress import Progress
from sit_jax.training.state import TrainState, has_finite_weights
from sit_jax.training.step import (
    Loss,
    Metrics,
    Teachers,
    TrainSpec,
    freeze_teachers,
    make_train_spec,
    make_train_step,
)

Evaluator = Callable[[TrainState], dict[str, float]]
# Step, `train` or `eval`, and the metrics: averages over the steps since the last call, or those of an evaluation.
Callback = Callable[[int, str, dict[str, float]], None]


class Extensions(NamedTuple):
    """Parts of a run that its configuration does not specify.

    Attributes:
        model: The module to train, which replaces that of the configuration; see `make_train_spec`.
        losses: Custom loss terms by name; see `make_train_spec`.
        source: Mapping from split to source, which replaces the data set of the configuration.
        callbacks: Functions that are called in every process.
        finish: Called in every process after the training, while the run directory is still locked.
    """

    model: nn.Module | None = None
    losses: Mapping[str, Loss] | None = None
    source: Mapping[str, Source] | None = None
    callbacks: Sequence[Callback] = ()
    finish: Callable[[], None] | None = None

    def open(self, data: DataConfig, split: str) -> Source:
        """Returns the source of a split."""
        if self.source is None:
            return open_source(data, split)
        if split not in self.source:
            raise ConfigError("source", f"has no split {split!r}; there are {', '.join(self.source)}")
        return self.source[split]


_NONE = Extensions()


def run(
    config: Config,
    folder: pathlib.Path,
    resume: bool = False,
    label: str = "train",
    extensions: Extensions = _NONE,
) -> dict[str, float]:
    """Trains a model, after its teachers if they are not given; writes the result to the run directory.

    A teacher that is trained here is a separate run in `folder/teacher` (or `folder/cnn_teacher`).

    Args:
        config: The configuration.
        folder: The run directory.
        resume: Resume the run in the folder if there is one.
        label: Label of the progress bar.
        extensions: Parts that the configuration does not specify.

    Returns:
        The metrics of the last evaluation.

    Raises:
        ConfigError: Values do not match the data or the devices.
        RunError: The folder is in use, a checkpoint is of another model, or the loss is not finite.
    """
    with contextlib.ExitStack() as lock:
        with distributed.PreemptionMonitor():
            metrics = _run(config, folder, resume, label, extensions, lock)
        if extensions.finish is not None:
            extensions.finish()
    return metrics


def _run(
    config: Config, folder: pathlib.Path, resume: bool, label: str, extensions: Extensions, lock: contextlib.ExitStack
) -> dict[str, float]:
    """Trains, after entering the lock of the run directory; see `run`."""
    if extensions.source is None:  # Opened once, for the runs of the teachers too.
        sources = open_sources(config.data, quiet=not distributed.is_process_0())
        extensions = extensions._replace(source=sources)
    config = resolve_num_classes(config, extensions)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_mesh(mesh, config)
    # Errors in the inputs are raised before the run directory is claimed.
    data = TrainData(config.inputs, source=extensions.open(config.data, config.data.train_split))
    eval_source = extensions.open(config.data, config.data.eval_split)
    check_classes(config.inputs, eval_source)
    class_names = data.source.class_names if config.loss.uses_labels else ()
    check_origins(config, folder, class_names)
    spec = make_train_spec(config, data.steps_per_epoch, extensions.model, extensions.losses)
    distributed.run_on_process_0(lambda: lock.enter_context(locked(folder)))
    distributed.run_on_process_0(lambda: runs.create_or_verify(folder, config, resume))
    if config.loss.uses_labels:
        distributed.run_on_process_0(lambda: runs.create_or_verify_class_names(folder, class_names))
    teachers = {
        name: sharding.place(mesh, _teacher_variables(config, name, folder, class_names, extensions))
        for name in config.teachers
    }
    with Checkpoints(folder, config.checkpoint.keep) as checkpoints:
        state = initial_state(spec, checkpoints, mesh, teachers, class_names)
        if checkpoints.latest_step is None and distributed.is_process_0():
            overview = parameter_overview.get_parameter_overview(state.params, include_stats=False, max_lines=40)
            print(f"{label}: parameters\n{overview}", file=sys.stderr)
        teachers = freeze_teachers(spec, teachers)
        evaluator = _make_evaluator(spec, teachers, eval_source, mesh)
        return train_loop(
            spec, state, teachers, data, mesh, checkpoints, evaluator, folder, label, extensions.callbacks
        )


def resolve_num_classes(config: Config, extensions: Extensions = _NONE) -> Config:
    """Returns the configuration with undetermined numbers of classes set to that of the data set.

    Raises:
        UserError: The data cannot be opened.
    """
    if not config.needs_classes:
        return config
    source = extensions.open(config.data, config.data.train_split)
    check_has_classes(config.data, source)
    return config.with_classes(len(source.class_names))


def train_loop(
    spec: TrainSpec,
    state: TrainState,
    teachers: Teachers,
    data: TrainData,
    mesh: Mesh,
    checkpoints: Checkpoints,
    evaluator: Evaluator,
    folder: pathlib.Path,
    label: str,
    callbacks: Sequence[Callback] = (),
) -> dict[str, float]:
    """Trains from the state's step to the last one; evaluates and writes metrics and checkpoints.

    The metrics of a step are read while the next step runs. Each set of token schedules is compiled once.

    Raises:
        NotFiniteError: A loss, a gradient, an evaluation or the weights are not finite; such a state is not saved.
        PreemptedError: The run was preempted; the newest checkpoint is of the last step.
    """
    config, epoch = spec.config, data.steps_per_epoch
    start, total = int(state.step), (config.epochs + config.optim.cooldown_epochs) * epoch
    step_fn = functools.cache(functools.partial(make_train_step, spec, mesh))
    due = SaveSchedule(config.checkpoint, epoch, config.log.every_steps)
    stored = checkpoints.metadata()
    changed = _adopt_changes(config, stored, start, total, epoch, folder, label)
    # Steps since the last line of metrics, with those before a restart: a restart does not change the lines.
    window: list[dict[str, float]] = stored.get("window", [])
    evaluation: dict[str, float] = {}
    with (
        contextlib.closing(data.batches(start)) as batches,
        distributed.PreemptionMonitor() as stop,
        MetricWriter(folder, config.log.tensorboard, start, quiet=not distributed.is_process_0()) as writer,
        Progress(label, total, start, config.batch_size, quiet=not distributed.is_process_0()) as progress,
    ):
        if stop.requested and start < total:
            raise PreemptedError(f"stopped by a signal before step {start + 1} of {total}; continue with --resume")
        pending: tuple[int, Metrics] | None = None

        not_finite = functools.partial(_not_finite, folder, checkpoints)
        report = functools.partial(_report, (writer.write, *callbacks))

        def resolve() -> None:
            """Reads the pending step's metrics; raises an error if they are not finite."""
            nonlocal pending
            if pending is None:
                return
            step, values = pending[0], {name: float(x) for name, x in jax.device_get(pending[1]).items()}
            pending = None
            bad = [name for name, value in values.items() if not math.isfinite(value)]
            if bad:
                # They are computed from the weights of the previous step, which a checkpoint may contain.
                raise not_finite(f"step {step}: {', '.join(bad)} is not finite", before=step - 1)
            window.append(values)
            progress.update(step, values)
            if step % config.log.every_steps == 0 or step == total:
                report(step, "train", {name: _mean(window, name) for name in values})
                window.clear()

        for step in range(start + 1, total + 1):
            batch = sharding.put_batch(mesh, next(batches))
            state, metrics = step_fn(drawn_schedules(config, step - 1))(state, batch, teachers)
            resolve()
            pending = (step, metrics)
            ends, last = step % epoch == 0, step == total
            scores: dict[str, float] = {}
            if last or (ends and step // epoch % config.eval_every_epochs == 0):
                resolve()
                scores = evaluation = _evaluate(evaluator, state, step, not_finite)
                report(step, "eval", evaluation)
                progress.note(f"epoch {step / epoch:g} " + " ".join(f"{k} {v:.4f}" for k, v in evaluation.items()))
            stopped = stop.should_stop() and not last
            if last or stopped or due.now(step) or checkpoints.is_best(scores):
                resolve()
                about = {**_about(config, mesh, step, epoch), "changes": changed, "window": list(window)}
                _save(checkpoints, state, scores, about, not_finite)
                due.saved()
            if stopped:
                raise PreemptedError(f"stopped by a signal: saved after step {step} of {total}; continue with --resume")
    return evaluation or evaluator(state)


def _adopt_changes(
    config: Config, stored: JsonObject, start: int, total: int, epoch: int, folder: pathlib.Path, label: str
) -> list[JsonObject]:
    """Updates the folder of a run that resumes with another configuration, and prints what changes.

    Args:
        config: The configuration.
        stored: Metadata of the checkpoint; empty if there is none.
        start: Step of the checkpoint.
        total: Number of steps of the run.
        epoch: Steps per epoch.
        folder: The run directory.
        label: Label of the line on standard error.

    Returns:
        All changes in the history of the run, for the metadata of the next checkpoint.

    Raises:
        ConfigError: The run has more steps already.
    """
    if start > total:
        raise ConfigError("epochs", f"{folder} is at step {start} already; these epochs end at step {total}")
    before = from_config_dict(stored["config"], quiet=True) if "config" in stored else config
    new = [x for x in changes(before, config) if x.effect != "free"]
    position = stored.get("data", {}).get("epoch", start / epoch)
    lines = [f"{x.key} is {x.now!r}, was {x.before!r}" for x in new]
    if start and not math.isclose(position, start / epoch):
        lines.append(f"an epoch has {epoch} steps, had {start / position:.0f}")
    if lines and distributed.is_process_0():
        when = f"from step {start + 1} on" if start < total else f"no effect, all {total} steps are done"
        print(f"{label}: {when}: {'; '.join(lines)}", file=sys.stderr)
    if start < total:
        distributed.run_on_process_0(lambda: runs.update_config(folder, config))
    return [
        *stored.get("changes", []),
        *({"after_step": start, "key": x.key, "before": x.before, "now": x.now} for x in new),
    ]


def _evaluate(
    evaluator: Evaluator, state: TrainState, step: int, not_finite: Callable[..., NotFiniteError]
) -> dict[str, float]:
    try:
        return evaluator(state)
    except NotFiniteError as error:
        raise not_finite(f"step {step}: {error}", before=step) from None


def _save(
    checkpoints: Checkpoints,
    state: TrainState,
    scores: dict[str, float],
    about: JsonObject,
    not_finite: Callable[..., NotFiniteError],
) -> None:
    if not has_finite_weights(state):
        step = int(state.step)
        raise not_finite(f"step {step}: its weights are not finite", before=step)
    checkpoints.save(state, scores, about)


def _mean(window: Sequence[Mapping[str, float]], name: str) -> float:
    """Returns the mean of a metric; steps before a restart with another configuration may not have it."""
    values = [line[name] for line in window if name in line]
    return sum(values) / len(values)


def _report(callbacks: Sequence[Callback], step: int, kind: str, values: dict[str, float]) -> None:
    for callback in callbacks:
        callback(step, kind, values)


def _not_finite(folder: pathlib.Path, checkpoints: Checkpoints, problem: str, before: int) -> NotFiniteError:
    good = checkpoints.last_before(before)
    there = "There is no good checkpoint" if good is None else f"The last good checkpoint is of step {good}"
    return NotFiniteError(f"{problem}; lower optim.lr or set optim.clip_norm. {there} in {folder}")


def _about(config: Config, mesh: Mesh, step: int, steps_per_epoch: int) -> JsonObject:
    """Returns a checkpoint's metadata. It includes the position in the data, a function of the step."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "config": to_dict(config),
        "data": {"next_example": step * config.batch_size, "epoch": step / steps_per_epoch},
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {"sit_jax": __version__, "python": platform.python_version(), **versions},
    }


def _make_evaluator(spec: TrainSpec, teachers: Teachers, source: Source, mesh: Mesh) -> Evaluator:
    """Returns the evaluation of a state: with labels, or without them by comparison with the teacher's features."""
    config = spec.config
    size = sharding.eval_batch_size(mesh, config.eval_batch_size)
    inputs = dataclasses.replace(config.inputs, eval_batch_size=size)

    def batches() -> Stream:
        return eval_batches(inputs, source)

    teacher = None if config.loss.uses_labels else spec.teacher

    @functools.cache
    def targets() -> Features:
        assert teacher is not None
        return FeatureExtractor(teacher, config.data, mesh)(teachers["teacher"], batches())

    def make_score(model: nn.Module) -> Callable[[Variables, str], dict[str, float]]:
        if teacher is None:
            step = make_eval_step(model, config.data)
            return lambda variables, what: evaluate(step, variables, batches(), mesh, what)
        extract = FeatureExtractor(model, config.data, mesh)
        return lambda variables, what: compare_features(extract(variables, batches()), targets(), what)

    # The whole model has the metrics without a suffix.
    whole, others = make_score(spec.model), {kept: make_score(spec.cut(kept).model) for kept in choices(config)[1:]}

    def score(variables: Variables, what: str) -> dict[str, float]:
        result = whole(variables, what)
        for kept, score_cut in others.items():
            name, params = schedule_name(kept), cut_params(spec.vit, variables["params"], kept)
            scores = score_cut({**variables, "params": params}, f"{what} at {name} tokens")
            keys = {key: metric_key(key, spec.vit.token_counts, kept) for key in scores if key != "examples"}
            result |= {full: scores[key] for key, full in keys.items()}
        return result

    def evaluator(state: TrainState) -> dict[str, float]:
        result = score(state.variables, "evaluation")
        if state.ema is not None:
            averaged = score(state.ema, "evaluation of the average")
            result |= {f"ema_{name}": value for name, value in averaged.items() if name != "examples"}
        return result

    return evaluator


def _teacher_variables(
    config: Config, name: str, folder: pathlib.Path, class_names: Sequence[str], extensions: Extensions
) -> Variables:
    """Returns the variables of the teacher in section `name`; trains it in `folder/name` if no run is given."""
    teacher = config.teachers[name]
    if teacher.run:
        return given_teacher(teacher, name, class_names)
    shared = Extensions(source=extensions.source)
    run(config.teacher_run(teacher), folder / name, resume=True, label=name, extensions=shared)
    return load_run(folder / name).variables
