"""The train step: meshes, compilation, teachers, accumulation, and the terms that can be switched off."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sit_jax import sharding
from sit_jax.config import Config, LossConfig, ModelConfig, OptimConfig, TeacherConfig
from sit_jax.errors import ConfigError
from sit_jax.models import build_model
from sit_jax.state import TrainState
from sit_jax.train import Task, init_state, make_task, make_train_step


def teacher_variables(mesh: Any) -> dict[str, Any]:
    images = jnp.zeros((1, 32, 32, 1))
    variables = build_model(tiny.TEACHER).init(jax.random.key(7), images)
    return jax.device_put(variables, sharding.replicated(mesh))


def steps(config: Config, devices: int, count: int) -> tuple[list[dict[str, float]], TrainState, Any, Task]:
    """Runs some steps from the teacher's weights; also returns the jitted step."""
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    task = make_task(config, steps_per_epoch=10)
    teacher = teacher_variables(mesh)
    state = init_state(task, mesh, teacher)
    step = make_train_step(task, mesh)
    history = []
    for index in range(count):
        batch = sharding.put_batch(mesh, tiny.batch(config.batch_size, seed=index))
        state, metrics = step(state, batch, {"teacher": teacher})
        history.append({key: float(value) for key, value in metrics.items()})
    return history, state, step, task


@pytest.fixture(scope="module")
def one_device() -> tuple[list[dict[str, float]], TrainState, Any, Task]:
    return steps(tiny.config(), devices=1, count=5)


def test_one_and_eight_devices_agree(one_device: Any) -> None:
    eight, state, step, _ = steps(tiny.config(), devices=8, count=5)
    for mine, theirs in zip(one_device[0], eight, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["token"] == pytest.approx(theirs["token"], rel=1e-5)
    assert len(state.params["model"]["head"]["kernel"].sharding.device_set) == 8
    assert step._cache_size() == 1, "compiled again after the first step"


def test_no_recompilation_and_falling_loss(one_device: Any) -> None:
    history, state, step, _ = one_device
    assert step._cache_size() == 1
    assert int(state.step) == 5
    assert set(history[0]) == {
        "loss", "classification", "token", "logits", "accuracy", "grad_norm", "lr/model", "lr/reverse",
    }  # fmt: skip
    first = history[0]
    assert first["loss"] == pytest.approx(first["classification"] + 2 * first["token"] + 2 * first["logits"], rel=1e-5)
    assert history[-1]["token"] < first["token"]


def test_teacher_stays_bit_for_bit() -> None:
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    task = make_task(tiny.config(), steps_per_epoch=10)
    teacher = teacher_variables(mesh)
    before = jax.tree.map(np.array, teacher)
    state = init_state(task, mesh, teacher)
    mine = state.params["model"]["blocks_0"]["attn"]["qkv"]["kernel"]
    assert np.array_equal(mine, before["params"]["blocks_0"]["attn"]["qkv"]["kernel"])
    state, _ = make_train_step(task, mesh)(state, tiny.batch(16), {"teacher": teacher})
    jax.tree.map(np.testing.assert_array_equal, before, teacher)
    assert not np.array_equal(state.params["model"]["blocks_0"]["attn"]["qkv"]["kernel"], mine_kernel(before))


def mine_kernel(variables: Any) -> np.ndarray:
    kernel: np.ndarray = variables["params"]["blocks_0"]["attn"]["qkv"]["kernel"]
    return kernel


def test_accumulation_equals_the_large_batch() -> None:
    # Without BatchNorm: its statistics are those of a micro-batch, as everywhere.
    arch = dataclasses.replace(tiny.STUDENT, stem="patch")
    teacher = dataclasses.replace(tiny.TEACHER, stem="patch")
    results = []
    for parts in (1, 4):
        config = tiny.config(
            arch=arch,
            teacher=TeacherConfig(model=ModelConfig(architecture=teacher)),
            optim=OptimConfig(lr=1e-3, accumulate_steps=parts, eps=1e-3),
        )
        mesh = sharding.make_mesh(devices=jax.devices()[:2])
        task = make_task(config, steps_per_epoch=10)
        variables = build_model(teacher).init(jax.random.key(7), jnp.zeros((1, 32, 32, 1)))
        variables = jax.device_put(variables, sharding.replicated(mesh))
        state = init_state(task, mesh, variables)
        batch = sharding.put_batch(mesh, tiny.batch(16))
        results.append(make_train_step(task, mesh)(state, batch, {"teacher": variables}))
    (one, one_metrics), (four, four_metrics) = results
    assert one_metrics["loss"] == pytest.approx(float(four_metrics["loss"]), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one.params, four.params)


def test_terms_that_are_off_leave_no_trace() -> None:
    task = make_task(tiny.config(loss=LossConfig()), steps_per_epoch=10)
    assert (task.teacher, task.reverse) == (None, None)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    state, metrics = make_train_step(task, mesh)(init_state(task, mesh), tiny.batch(16), {})
    assert set(state.params) == {"model"}
    assert metrics["loss"] == metrics["classification"]


def test_cnn_teacher_trains_the_distillation_token() -> None:
    arch = dataclasses.replace(tiny.STUDENT, distillation_token=True)
    cnn = TeacherConfig(model=ModelConfig(architecture=tiny.CNN))
    config = tiny.config(dataclasses.replace(tiny.FRD, hard=1.0), arch, cnn_teacher=cnn)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    task = make_task(config, steps_per_epoch=10)
    images = jnp.zeros((1, 32, 32, 1))
    teachers = {
        "teacher": teacher_variables(mesh),
        "cnn_teacher": build_model(tiny.CNN).init(jax.random.key(3), images),
    }
    state = init_state(task, mesh, teachers["teacher"])
    before = np.array(state.params["model"]["distillation_head"]["kernel"])
    state, metrics = make_train_step(task, mesh)(state, tiny.batch(16), teachers)
    weighted = metrics["classification"] + 2 * metrics["token"] + 2 * metrics["logits"] + metrics["hard"]
    assert metrics["loss"] == pytest.approx(float(weighted), rel=1e-5)
    assert not np.array_equal(before, state.params["model"]["distillation_head"]["kernel"])


def test_batch_that_does_not_divide() -> None:
    mesh = sharding.make_mesh()
    with pytest.raises(ConfigError, match=r"^batch_size: 12 examples do not divide over 8 devices"):
        sharding.check_batch(mesh, "batch_size", 12)
    with pytest.raises(ConfigError, match="in 2 micro-batches"):
        sharding.check_batch(mesh, "batch_size", 24, parts=2)
    sharding.check_batch(mesh, "batch_size", 32, parts=2)


def test_moving_average() -> None:
    config = tiny.config(loss=LossConfig(), optim=OptimConfig(lr=1e-2, ema_decay=0.25))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    task = make_task(config, steps_per_epoch=10)
    state, step = init_state(task, mesh), make_train_step(task, mesh)
    average = np.array(state.params["model"]["head"]["kernel"])
    for done in range(3):
        state, _ = step(state, tiny.batch(16, seed=done), {})
        decay = min(0.25, (1 + done) / (10 + done))
        average = decay * average + (1 - decay) * np.array(state.params["model"]["head"]["kernel"])
    assert state.ema is not None
    np.testing.assert_allclose(state.ema["params"]["head"]["kernel"], average, atol=1e-6)
