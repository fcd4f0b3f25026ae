"""The train step: one pure function for plain training, slimming without a teacher, and distillation.

Distillation adds loss terms and a teacher argument; a term with weight 0 is not part of the compiled program.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from sit_jax import losses
from sit_jax.config import Config, ModelConfig
from sit_jax.data.preprocess import prepare_batch, stream_key
from sit_jax.errors import ConfigError, require
from sit_jax.models import Outputs, abstract_variables, build_model, build_rtsm
from sit_jax.models.architecture import Architecture
from sit_jax.models.cut import cut_architecture, cut_params, cut_rtsm
from sit_jax.models.reverse import ReverseSlimming
from sit_jax.models.trees import Params, Variables
from sit_jax.ops.linear import cast_kernels
from sit_jax.ops.xla_options import cpu_options
from sit_jax.parallel import sharding
from sit_jax.training.elastic import Schedule, check_elastic
from sit_jax.training.optim import make_optimizer, schedules
from sit_jax.training.state import TrainState, update_ema

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# Variables of the teachers that the step takes, by the name of their section: `teacher`, `cnn_teacher`.
Teachers = dict[str, Variables]
Step = Callable[[TrainState, Batch, Teachers], tuple[TrainState, Metrics]]

# Names in the metrics of a step, which custom loss terms cannot have.
_TERMS = ("classification", "token", "feature", "logits", "hard", "token_label")
_FEATURE_ERRORS = {"mse": losses.mean_squared_error, "cosine": losses.cosine_error}
_BUILT_IN = {"loss", *_TERMS, "accuracy", "grad_norm", "skipped", "lr/model", "lr/rtsm"}


class LossInputs(NamedTuple):
    """Inputs of a custom loss term: one (micro-)batch, with the outputs of the model and its teacher.

    Attributes:
        images: Normalized and mixed images, (batch, height, width, channels).
        labels: Distributions over the classes, (batch, classes); zeros where there is no label.
        logits: Logits of the student, (batch, classes).
        outputs: Other outputs of the student; see `sit_jax.models.Outputs`.
        teacher_logits: Logits of the teacher; None without a teacher.
        teacher_outputs: Other outputs of the teacher; None without a teacher.
    """

    images: jax.Array
    labels: jax.Array
    logits: jax.Array
    outputs: Outputs
    teacher_logits: jax.Array | None
    teacher_outputs: Outputs | None


Loss = Callable[[LossInputs], jax.Array]


class TrainSpec(NamedTuple):
    """The modules and functions of a run; contains no arrays.

    Attributes:
        rtsm: The reverse modules, or None if no tokens are recovered.
        optimizer: The optimizer over `{'model': ..., 'rtsm': ...}`.
        rates: The learning-rate schedule of each parameter group.
        losses: Custom loss terms by name, weighted by `config.loss.extra`.
    """

    model: nn.Module
    rtsm: ReverseSlimming | None
    teacher: nn.Module | None
    cnn_teacher: nn.Module | None
    optimizer: optax.GradientTransformation
    rates: dict[str, optax.Schedule]
    config: Config
    losses: Mapping[str, Loss] = {}

    @property
    def vit(self) -> Architecture:
        """The architecture of the model, a vision transformer."""
        arch = self.config.model.architecture
        assert isinstance(arch, Architecture)
        return arch

    def cut(self, kept_tokens: Sequence[int]) -> "TrainSpec":
        """Returns the modules of a model that is cut to a token schedule; see `sit_jax.models.cut`."""
        arch, dtype = cut_architecture(self.vit, kept_tokens), self.config.model.dtype
        rtsm = None if self.rtsm is None else build_rtsm(arch, dtype)
        return self._replace(model=self.model.clone(arch=arch), rtsm=rtsm)


def make_train_spec(
    config: Config, steps_per_epoch: int, model: nn.Module | None = None, losses: Mapping[str, Loss] | None = None
) -> TrainSpec:
    """Builds the modules and the optimizer of a run.

    Args:
        config: The configuration of the run.
        steps_per_epoch: For the schedules.
        model: A custom module that replaces that of the configuration; called as `sit_jax.ViT`, returns logits and
            `Outputs`.
        losses: Custom loss terms: name -> function of `LossInputs` that returns a scalar.

    Raises:
        ConfigError: `loss.extra` names a term that does not exist, or that has the name of a built-in metric.
    """
    losses = losses or {}
    for name in config.loss.extra:
        key, built_in = f"loss.extra.{name}", ", ".join(sorted(_BUILT_IN))
        require(name not in _BUILT_IN, key, f"must not be one of the built-in {built_in}")
        known = f"there are {', '.join(losses)}" if losses else "give it to sit_jax.train(losses=...)"
        require(name in losses, key, f"there is no such loss term; {known}")

    problem = "must be above 0 here: only commands that open the data set replace 0"
    require(not config.needs_classes, "model.num_classes", problem)

    check_elastic(config, model)

    def build(section: ModelConfig) -> nn.Module:
        return build_model(section.architecture, section.drop_path, section.dtype, section.remat, section.attention)

    return TrainSpec(
        model=model or build(config.model),
        rtsm=build_rtsm(config.recovered, config.model.dtype) if config.recovered else None,
        teacher=build(config.used_teacher.model) if config.used_teacher else None,
        cnn_teacher=build(config.cnn_teacher.model) if config.loss.hard > 0 and config.cnn_teacher else None,
        optimizer=make_optimizer(
            config.scaled_optim, config.epochs, steps_per_epoch, train_aux_head=_trains_aux_head(config)
        ),
        rates=schedules(config.scaled_optim, config.epochs, steps_per_epoch),
        config=config,
        losses=losses,
    )


def _trains_aux_head(config: Config) -> bool:
    """Returns whether a loss term may read the auxiliary head: token labelling, or a custom one."""
    arch = config.model.architecture
    reads = config.loss.token_label > 0 or bool(config.loss.extra)
    return reads and isinstance(arch, Architecture) and not arch.is_slimmed


def init_state(spec: TrainSpec, mesh: Mesh, variables: Variables | None = None) -> TrainState:
    """Returns the initial training state, created with its sharding.

    The model starts with `variables`, and the reverse modules with their `rtsm`, if any; parameters that they lack
    (such as a student's slimming modules) are random.
    """
    shardings = sharding.state_shardings(mesh, abstract_state(spec))
    state = jax.jit(lambda: _fresh_state(spec), out_shardings=shardings)()
    if variables is None:
        return state
    params = _overlay(state.params, {"model": variables["params"], "rtsm": variables.get("rtsm", {})})
    stats = _overlay(state.batch_stats, variables.get("batch_stats", {}))
    ema = {"params": jax.tree.map(jnp.copy, params["model"]), "batch_stats": jax.tree.map(jnp.copy, stats)}
    return state.replace(params=params, batch_stats=stats, ema=ema if state.ema is not None else None)


def abstract_state(spec: TrainSpec) -> TrainState:
    """Returns the shapes and types of the training state, without computing it."""
    return jax.eval_shape(lambda: _fresh_state(spec))


def freeze_teachers(spec: TrainSpec, teachers: Teachers) -> Teachers:
    """Returns the teacher variables that the train step takes, with kernels cast to the type of the matrix products.

    They are cast here once instead of in every step, and need half the memory in bfloat16.
    """
    cast = jax.jit(cast_kernels, static_argnums=1)
    return {name: cast(teachers[name], model.dtype) for name, model in _teacher_models(spec).items()}


def _teacher_models(spec: TrainSpec) -> dict[str, ModelConfig]:
    """Returns the models of the teachers that the train step takes, by the name of their section."""
    return {name: x.model for name, x in spec.config.teachers.items() if getattr(spec, name) is not None}


def abstract_teachers(spec: TrainSpec) -> Teachers:
    """Returns the shapes and types of the teacher variables that the train step takes."""
    teachers = {name: abstract_variables(model.architecture) for name, model in _teacher_models(spec).items()}
    return jax.eval_shape(lambda tree: freeze_teachers(spec, tree), teachers)


def _fresh_state(spec: TrainSpec) -> TrainState:
    arch = spec.config.model.architecture
    key = stream_key(spec.config.seed, "init")
    images = jnp.zeros((2, *arch.image_shape, arch.in_channels))
    variables = spec.model.init(key, images)
    params: Params = {"model": variables["params"]}
    stats = dict(variables.get("batch_stats", {}))
    if spec.rtsm is not None:
        _, outputs = spec.model.bind(variables)(images)
        params["rtsm"] = spec.rtsm.init(jax.random.fold_in(key, 1), outputs.tokens)["params"]
    ema = {"params": params["model"], "batch_stats": stats} if spec.config.optim.ema_decay > 0 else None
    step, opt_state = jnp.zeros((), jnp.int32), spec.optimizer.init(params)
    return TrainState(step=step, params=params, batch_stats=stats, opt_state=opt_state, ema=ema)


def _overlay(mine: PyTree, theirs: PyTree) -> PyTree:
    """Returns `mine` with each leaf that `theirs` has replaced by a copy, in the sharding of `mine`.

    The train step donates the state, so an array shared with a teacher would be deleted.
    """
    if not isinstance(mine, dict):
        if jnp.shape(theirs) != jnp.shape(mine):
            raise ValueError(f"a weight is {jnp.shape(theirs)}, the model's is {jnp.shape(mine)}")
        return jax.device_put(jnp.array(theirs, mine.dtype, copy=True), mine.sharding)
    return {name: _overlay(value, theirs[name]) if name in theirs else value for name, value in mine.items()}


def make_train_step(spec: TrainSpec, mesh: Mesh, schedules: Sequence[Schedule] = ()) -> Step:
    """Returns the jitted train step `(state, batch, teachers) -> (state, metrics)`; the state is donated.

    `schedules` are the token schedules that the step trains, on all of its images; without any, the whole model.

    `batch` is a batch of the loader; `prepare_batch` prepares it for the loss. `teachers` has the frozen variables
    under `teacher` and `cnn_teacher`, if the run has these teachers.
    Metrics are float32 scalars: `loss`, each term by its name before weighting, `accuracy` if labels are used,
    `grad_norm`, and the learning rate of each parameter group.
    """
    sharded = sharding.state_shardings(mesh, abstract_state(spec))
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    # The input's sharding comes with the arrays. The output's is fixed, so that the second step reuses the compilation.
    return jax.jit(
        lambda state, batch, teachers: train_step(spec, state, batch, teachers, schedules),
        donate_argnums=0,
        out_shardings=(sharded, sharding.replicated(mesh)),
        compiler_options=cpu_options() if on_cpu else None,
    )


def train_step(
    spec: TrainSpec, state: TrainState, batch: Batch, teachers: Teachers, schedules: Sequence[Schedule] = ()
) -> tuple[TrainState, Metrics]:
    """Takes one optimizer step; a pure function. See `make_train_step`."""
    config = spec.config
    key = stream_key(config.seed, "drop_path", state.step)
    prepared = prepare_batch(config.inputs, batch, state.step)
    grads, batch_stats, metrics = _accumulated_gradients(spec, state, prepared, teachers, key, schedules)
    if config.data.on_decode_error == "skip" and "skipped" in batch:
        metrics["skipped"] = (batch["skipped"] > 0).sum(dtype=jnp.float32)
    updates, opt_state = spec.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        fresh = {"params": params["model"], "batch_stats": batch_stats}
        ema = update_ema(ema, fresh, config.optim.ema_decay, state.step)
    metrics["grad_norm"] = optax.tree.norm(grads)
    for group, rate in spec.rates.items():
        if group in params:
            metrics[f"lr/{group}"] = jnp.asarray(rate(state.step), jnp.float32)
    state = TrainState(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state, ema=ema)
    return state, metrics


def _is_second_half(x: jax.Array) -> jax.Array:
    """Returns True for the rows of the second half of an array, in a shape that broadcasts to it."""
    rows = x.shape[0]
    return (jnp.arange(rows) >= rows // 2).reshape(rows, *[1] * (x.ndim - 1))


def _accumulated_gradients(
    spec: TrainSpec,
    state: TrainState,
    batch: Batch,
    teachers: Teachers,
    key: jax.Array,
    schedules: Sequence[Schedule],
) -> tuple[Params, Params, Metrics]:
    """Returns gradients, BatchNorm statistics and metrics of a batch, accumulated over micro-batches."""
    optim = spec.config.optim
    parts = optim.accumulate_steps
    # A gradient has the type of its parameter.
    params = cast_kernels(state.params, optim.grad_dtype)
    loss = functools.partial(compute_loss, schedules=schedules)
    gradient = jax.value_and_grad(loss, argnums=1, has_aux=True)
    if parts == 1:
        (_, (stats, metrics)), grads = gradient(spec, params, state.batch_stats, batch, teachers, key)
        return jax.tree.map(lambda x: x.astype(jnp.float32), grads), stats, metrics
    # Each micro-batch takes every n-th example, so that each device keeps its own examples and none is transferred.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]), batch)
    if "token_mix" in batch:
        # The model mixes mirrored examples of a micro-batch: those of the whole batch must come into the same one.
        split = jax.tree.map(lambda x: jnp.where(_is_second_half(x), x[:, ::-1], x), split)
    split = jax.tree.map(lambda x: x.swapaxes(0, 1), split)

    def work(carry: tuple[Params, Params], part: tuple[Batch, jax.Array]) -> tuple[tuple[Params, Params], Metrics]:
        summed, stats = carry
        micro, index = part
        micro_key = jax.random.fold_in(key, index)
        (_, (stats, metrics)), grads = gradient(spec, params, stats, micro, teachers, micro_key)
        return (jax.tree.map(jnp.add, summed, grads), stats), metrics

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    (summed, stats), metrics = jax.lax.scan(work, (zeros, state.batch_stats), (split, jnp.arange(parts)))
    grads = jax.tree.map(lambda x: x / parts, summed)
    return grads, stats, jax.tree.map(lambda x: x.mean(axis=0), metrics)


class _Taught(NamedTuple):
    """Outputs of the teachers for one (micro-)batch; None without the teacher."""

    logits: jax.Array | None
    outputs: Outputs | None
    cnn_logits: jax.Array | None


def compute_loss(
    spec: TrainSpec,
    params: Params,
    batch_stats: Params,
    batch: Batch,
    teachers: Teachers,
    key: jax.Array,
    schedules: Sequence[Schedule] = (),
) -> tuple[jax.Array, tuple[Params, Metrics]]:
    """Returns the loss, the new BatchNorm statistics and the metrics of one prepared (micro-)batch.

    Loss and metrics are means over the models that are cut to `schedules`, by default the whole model alone.
    """
    taught = _teach(spec, batch, teachers)
    models = [_cut(spec, params, kept) for kept in schedules] or [(spec, params)]
    found = [_student_loss(cut, mine, batch_stats, batch, taught, key) for cut, mine in models]
    # The stem, which has the BatchNorm, is the same for all schedules.
    stats = found[0][1][0]
    metrics = jax.tree.map(lambda *values: jnp.stack(values).mean(axis=0), *(metrics for _, (_, metrics) in found))
    return jnp.stack([loss for loss, _ in found]).mean(), (stats, metrics)


def _cut(spec: TrainSpec, params: Params, kept: Schedule) -> tuple[TrainSpec, Params]:
    """Returns the modules and the parameters of a model that is cut to a token schedule."""
    cut = {"model": cut_params(spec.vit, params["model"], kept)}
    if "rtsm" in params:
        cut["rtsm"] = cut_rtsm(spec.vit, params["rtsm"], kept)
    return spec.cut(kept), cut


def _teach(spec: TrainSpec, batch: Batch, teachers: Teachers) -> _Taught:
    """Runs the teachers, without gradients."""
    images = batch["image"]
    logits = outputs = cnn_logits = None
    if spec.teacher is not None:
        logits, outputs = spec.teacher.bind(teachers["teacher"])(images, **_mixed(batch))
    if spec.cnn_teacher is not None:
        cnn_logits, _ = spec.cnn_teacher.bind(teachers["cnn_teacher"])(images)
    return jax.lax.stop_gradient(_Taught(logits, outputs, cnn_logits))


def _mixed(batch: Batch) -> dict[str, Any]:
    return {"token_mix": batch["token_mix"]} if "token_mix" in batch else {}


def _student_loss(
    spec: TrainSpec, params: Params, batch_stats: Params, batch: Batch, taught: _Taught, key: jax.Array
) -> tuple[jax.Array, tuple[Params, Metrics]]:
    """Returns what `compute_loss` does, of one model and for the outputs of its teachers."""
    config = spec.config.loss
    weights = {name: getattr(config, name) for name in _TERMS} | dict(config.extra)
    images, labels = batch["image"], batch["label"]
    variables = {"params": params["model"], "batch_stats": batch_stats}
    (logits, outputs), updated = spec.model.apply(
        variables, images, train=True, rngs={"drop_path": key}, mutable=["batch_stats"], **_mixed(batch)
    )
    terms: Metrics = {}
    accuracy: Metrics = {}
    if config.uses_labels:
        terms["classification"] = losses.soft_target_cross_entropy(logits, labels)
        right = logits.argmax(axis=-1) == labels.argmax(axis=-1)
        accuracy["accuracy"] = (right & labels.any(axis=-1)).mean(dtype=jnp.float32)
    if taught.outputs is not None:
        assert taught.logits is not None
        if config.token > 0 and spec.rtsm is not None:
            rtsm = spec.rtsm.bind({"params": params["rtsm"]})
            errors = rtsm.errors(outputs.tokens, taught.outputs.tokens, losses.mean_squared_error)
            terms["token"] = jnp.stack(errors).mean()
        elif config.token > 0:
            terms["token"] = losses.token_distillation(outputs.tokens, taught.outputs.tokens)
        if config.feature > 0:
            if outputs.features is None or taught.outputs.features is None:
                raise ConfigError("loss.feature", "the model or its teacher returns no features")
            terms["feature"] = _FEATURE_ERRORS[config.feature_error](outputs.features, taught.outputs.features)
        if config.logits > 0:
            terms["logits"] = losses.logits_distillation(logits, taught.logits, config.temperature)
    if config.token_label > 0:
        terms["token_label"] = losses.soft_target_cross_entropy(outputs.patch_logits, batch["patch_label"])
    if taught.cnn_logits is not None:
        terms["hard"] = losses.hard_distillation(outputs.distillation_logits, taught.cnn_logits)
    given = LossInputs(images, labels, logits, outputs, taught.logits, taught.outputs)
    terms |= {name: spec.losses[name](given) for name in config.extra}
    total = sum((weights[name] * value for name, value in terms.items()), start=jnp.zeros(()))
    return total, (updated.get("batch_stats", {}), {"loss": total, **terms, **accuracy})
