"""The train step: metrics, teachers, accumulation, types, memory, custom terms and terms that are off."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import small

from sit_jax.analysis.flops import count_cost, count_step_macs
from sit_jax.config import Config, LossConfig, ModelConfig, OptimConfig, TeacherConfig
from sit_jax.data.config import MixConfig
from sit_jax.data.preprocess import prepare_batch
from sit_jax.errors import ConfigError
from sit_jax.models import build_model
from sit_jax.parallel import sharding
from sit_jax.training.state import TrainState
from sit_jax.training.step import (
    Loss,
    Metrics,
    TrainSpec,
    abstract_state,
    abstract_teachers,
    compute_loss,
    freeze_teachers,
    init_state,
    make_train_spec,
    make_train_step,
    train_step,
)


def make_spec(config: Config, losses: Mapping[str, Loss] | None = None) -> TrainSpec:
    return make_train_spec(config, steps_per_epoch=10, losses=losses)


@functools.cache
def variables(arch: Any = tiny.TWO_BLOCKS) -> Any:
    return jax.jit(build_model(arch).init)(jax.random.key(7), jnp.zeros((1, 32, 32, 1)))


def train(spec: TrainSpec, teachers: Any, steps: int = 1) -> tuple[list[Metrics], TrainState]:
    """Metrics of some steps from the teacher's weights, if there are any, and the state after them."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    state, step = init_state(spec, mesh, teachers.get("teacher")), make_train_step(spec, mesh)
    history = []
    for index in range(steps):
        state, metrics = step(state, tiny.batch(spec.config.batch_size, seed=index), teachers)
        history.append(metrics)
    return history, state


def test_distillation_trains_the_student_and_leaves_the_teacher() -> None:
    teacher = variables(tiny.TEACHER)
    before = jax.tree.map(np.array, teacher)
    history, state = train(make_spec(tiny.config()), {"teacher": teacher}, steps=5)
    first = history[0]
    assert set(first) == {
        "loss", "classification", "token", "logits", "accuracy", "grad_norm", "lr/model", "lr/rtsm",
    }  # fmt: skip
    weighted = first["classification"] + 2 * first["token"] + 2 * first["logits"]
    assert first["loss"] == pytest.approx(float(weighted), rel=1e-5)
    assert int(state.step) == 5
    assert history[-1]["token"] < first["token"]
    jax.tree.map(np.testing.assert_array_equal, before, teacher)
    mine, theirs = (tree["blocks_0"]["attn"]["qkv"]["kernel"] for tree in (state.params["model"], before["params"]))
    assert not np.array_equal(mine, theirs)


@pytest.mark.parametrize("mix", [MixConfig(), MixConfig(mix_token=1.0)], ids=["plain", "mix_token"])
def test_accumulation_equals_the_large_batch(mix: MixConfig) -> None:
    # Sixteen patches, of which MixToken replaces a box.
    student, teacher = (dataclasses.replace(arch, patch_size=8) for arch in (tiny.SLIMMED, tiny.TWO_BLOCKS))
    results = []
    for parts in (1, 4):
        optim = OptimConfig(lr=1e-3, accumulate_steps=parts, eps=1e-3)
        config = small(optim=optim, mix=mix, student=student, teacher=teacher)
        drawn = prepare_batch(config.inputs, tiny.batch(config.batch_size), jnp.asarray(0))
        assert drawn["token_mix"].any() if mix.mix_token else "token_mix" not in drawn
        results.append(train(make_spec(config), {"teacher": variables(teacher)}))
    ((one,), first), ((four,), second) = results
    assert one["loss"] == pytest.approx(float(four["loss"]), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), first.params, second.params)


def test_cnn_teacher_trains_the_distillation_token() -> None:
    arch = dataclasses.replace(tiny.SLIMMED, distillation_token=True)
    cnn = TeacherConfig(model=ModelConfig(architecture=tiny.CNN))
    spec = make_spec(small(student=arch, loss=dataclasses.replace(tiny.FRD, hard=1.0), cnn_teacher=cnn))
    teachers = {"teacher": variables(), "cnn_teacher": variables(tiny.CNN)}
    (metrics,), state = train(spec, teachers)
    weighted = metrics["classification"] + 2 * metrics["token"] + 2 * metrics["logits"] + metrics["hard"]
    assert metrics["loss"] == pytest.approx(float(weighted), rel=1e-5)
    # The first moment after one step is a tenth of the gradient.
    moments = optax.tree.get(state.opt_state, "mu")["model"]
    assert np.abs(moments["distillation_head"]["kernel"]).max() > 0


def imitate_logits(given: Any) -> jax.Array:
    return jnp.square(given.logits - given.teacher_logits).mean()


def test_custom_term_with_a_teacher() -> None:
    config = small(loss=LossConfig(extra={"imitation": 0.5}))
    (metrics,), _ = train(make_spec(config, {"imitation": imitate_logits}), {"teacher": variables()})
    assert metrics["imitation"] > 0
    assert metrics["loss"] == pytest.approx(float(metrics["classification"] + 0.5 * metrics["imitation"]), rel=1e-5)
    # Its cost includes the teacher's forward pass, which no built-in term needs.
    teacher = sum(count_cost(tiny.TWO_BLOCKS).macs.values())
    assert count_step_macs(config) - count_step_macs(small(loss=LossConfig())) == teacher


@pytest.mark.parametrize("name", ["token", "grad_norm"])
def test_custom_term_named_like_a_built_in_metric(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_spec(small(loss=LossConfig(extra={name: 1.0})), {name: imitate_logits})
    assert caught.value.key == f"loss.extra.{name}"


def test_moving_average_without_a_teacher() -> None:
    spec = make_spec(small(loss=LossConfig(), optim=OptimConfig(lr=1e-2, ema_decay=0.25)))
    assert (spec.teacher, spec.rtsm) == (None, None)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    state, step = init_state(spec, mesh), make_train_step(spec, mesh)
    average = np.array(state.params["model"]["head"]["kernel"])
    for done in range(3):
        state, metrics = step(state, tiny.batch(16, seed=done), {})
        decay = min(0.25, (1 + done) / (10 + done))
        average = decay * average + (1 - decay) * np.array(state.params["model"]["head"]["kernel"])
    assert state.ema is not None
    np.testing.assert_allclose(state.ema["params"]["head"]["kernel"], average, atol=1e-6)
    assert set(state.params) == {"model"}
    assert metrics["loss"] == metrics["classification"]


def test_state_and_metrics_stay_in_float32() -> None:
    spec = make_spec(small("bfloat16", optim=OptimConfig(ema_decay=0.9)))
    arguments = abstract_state(spec), tiny.batch(16), abstract_teachers(spec)
    result = jax.eval_shape(lambda *xs: train_step(spec, *xs), *arguments)
    assert {x.dtype for x in jax.tree.leaves(result)} <= {jnp.dtype(name) for name in ("float32", "int32")}


@functools.cache
def half_step(grad_dtype: str = "float32", parts: int = 1, cast: bool = False) -> tuple[Metrics, TrainState]:
    """One step in bfloat16, without distillation where there are micro-batches; the teacher may be cast before it."""
    optim = OptimConfig(b1=0.5, eps=1e-3, grad_dtype=grad_dtype, accumulate_steps=parts)  # type: ignore[arg-type]
    spec = make_spec(small("bfloat16", optim=optim, loss=tiny.FRD if parts == 1 else LossConfig()))
    teachers = {"teacher": variables()}
    (metrics,), state = train(spec, freeze_teachers(spec, teachers) if cast else teachers)
    return metrics, state


@pytest.mark.parametrize(("parts", "place"), [(1, "rtsm/blocks_1/channel_mlp/fc1"), (2, "model/blocks_1/mlp/fc1")])
def test_gradients_of_kernels_in_bfloat16(parts: int, place: str) -> None:
    # The first moment after one step is half of the gradient.
    moments = [optax.tree.get(half_step(dtype, parts)[1].opt_state, "mu") for dtype in ("float32", "bfloat16")]
    wide, narrow = (functools.reduce(lambda tree, name: tree[name], place.split("/"), x) for x in moments)
    rounding = 2**-8 * parts * np.abs(wide["kernel"]).max()
    np.testing.assert_allclose(narrow["kernel"], wide["kernel"], rtol=0, atol=rounding)
    rounded = narrow["kernel"].astype(jnp.bfloat16).astype(jnp.float32)
    assert np.array_equal(rounded, narrow["kernel"]) == (parts == 1), "micro-batches are added up in float32"
    assert not np.array_equal(narrow["bias"].astype(jnp.bfloat16), narrow["bias"]), "biases stay in float32"


def test_a_teacher_cast_beforehand_gives_the_same_step() -> None:
    frozen = freeze_teachers(make_spec(small("bfloat16")), {"teacher": variables()})["teacher"]["params"]["blocks_0"]
    assert (frozen["mlp"]["fc1"]["kernel"].dtype, frozen["norm1"]["scale"].dtype) == (jnp.bfloat16, jnp.float32)
    assert half_step(cast=True)[0] == half_step()[0]


def test_teacher_and_reverse_modules_leave_no_activations() -> None:
    # Widths that tell whose an activation is.
    arch, wide = dataclasses.replace(tiny.SLIMMED, mlp_ratio=3.0), dataclasses.replace(tiny.TWO_BLOCKS, mlp_ratio=7.0)
    spec = make_spec(small(student=arch, teacher=wide))
    state, batch = abstract_state(spec), {"image": jnp.zeros((16, 32, 32, 1)), "label": jnp.zeros((16, 10))}

    def residuals(params: Any, stats: Any, teachers: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return compute_loss(spec, params, stats, batch, teachers, jax.random.key(0))[0]

        return jax.vjp(loss, params)[1]

    kept = jax.eval_shape(residuals, state.params, state.batch_stats, abstract_teachers(spec))
    shapes = [x.shape for x in jax.tree.leaves(kept)]
    assert any(arch.dim * 3 in shape and 16 in shape for shape in shapes), "the student's are kept"
    assert not any(wide.dim * 7 in shape for shape in shapes)
    # Of a reverse module its gradients alone: nothing as large as all channels of all examples.
    assert not any(16 * arch.dim in shape for shape in shapes)
    assert not any(shape[-3:] == (16, arch.num_patches, 4 * arch.dim) for shape in shapes)


def test_the_training_loss_has_forward_mode_and_hessian_vector_products() -> None:
    spec = make_spec(small(model=ModelConfig(architecture=tiny.SLIMMED, attention="plain")))
    teachers = {"teacher": variables()}
    params = init_state(spec, sharding.make_mesh(devices=jax.devices()[:1])).params
    batch = {**tiny.batch(4), "label": jax.nn.one_hot(tiny.batch(4)["label"], 10)}

    def loss(params: Any) -> jax.Array:
        return compute_loss(spec, params, {}, batch, teachers, jax.random.key(0))[0]

    direction = jax.tree.map(lambda x: jnp.cos(100.0 * x), params)

    @jax.jit
    def derivatives(step: float) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The slope along the direction, by reverse and by forward mode, and the curvature, by forward over reverse."""
        moved = jax.tree.map(lambda x, d: x + step * d, params, direction)
        grad, hessian = jax.jvp(jax.grad(loss), (moved,), (direction,))
        slope, curvature = (optax.tree.vdot(tree, direction) for tree in (grad, hessian))
        return slope, jax.jvp(loss, (moved,), (direction,))[1], curvature

    slope, forward, curvature = derivatives(0.0)
    assert forward == pytest.approx(float(slope), rel=1e-4)
    difference = derivatives(2e-4)[0] - derivatives(-2e-4)[0]
    assert curvature == pytest.approx(float(difference) / 4e-4, rel=2e-2)
