"""The train step: meshes, compilation, teachers, accumulation, and the terms that can be switched off."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.ad_checkpoint import print_saved_residuals

from sit_jax.config import Config, LossConfig, ModelConfig, OptimConfig, TeacherConfig
from sit_jax.errors import ConfigError
from sit_jax.models import build_model
from sit_jax.parallel import sharding
from sit_jax.training.state import TrainState
from sit_jax.training.step import (
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


def teacher_variables(mesh: Any) -> dict[str, Any]:
    images = jnp.zeros((1, 32, 32, 1))
    variables = build_model(tiny.TEACHER).init(jax.random.key(7), images)
    return jax.device_put(variables, sharding.replicated(mesh))


def steps(config: Config, devices: int, count: int) -> tuple[list[dict[str, float]], TrainState, Any, TrainSpec]:
    """Runs some steps from the teacher's weights; also returns the jitted step."""
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    task = make_train_spec(config, steps_per_epoch=10)
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
def one_device() -> tuple[list[dict[str, float]], TrainState, Any, TrainSpec]:
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
    task = make_train_spec(tiny.config(), steps_per_epoch=10)
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
        task = make_train_spec(config, steps_per_epoch=10)
        variables = build_model(teacher).init(jax.random.key(7), jnp.zeros((1, 32, 32, 1)))
        variables = jax.device_put(variables, sharding.replicated(mesh))
        state = init_state(task, mesh, variables)
        batch = sharding.put_batch(mesh, tiny.batch(16))
        results.append(make_train_step(task, mesh)(state, batch, {"teacher": variables}))
    (one, one_metrics), (four, four_metrics) = results
    assert one_metrics["loss"] == pytest.approx(float(four_metrics["loss"]), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one.params, four.params)


def test_terms_that_are_off_leave_no_trace() -> None:
    task = make_train_spec(tiny.config(loss=LossConfig()), steps_per_epoch=10)
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
    task = make_train_spec(config, steps_per_epoch=10)
    images = jnp.zeros((1, 32, 32, 1))
    teachers: dict[str, Any] = {
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
    task = make_train_spec(config, steps_per_epoch=10)
    state, step = init_state(task, mesh), make_train_step(task, mesh)
    average = np.array(state.params["model"]["head"]["kernel"])
    for done in range(3):
        state, _ = step(state, tiny.batch(16, seed=done), {})
        decay = min(0.25, (1 + done) / (10 + done))
        average = decay * average + (1 - decay) * np.array(state.params["model"]["head"]["kernel"])
    assert state.ema is not None
    np.testing.assert_allclose(state.ema["params"]["head"]["kernel"], average, atol=1e-6)


def every_equation(jaxpr: Any) -> Any:
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from every_equation(inner)


def test_bfloat16_is_for_products_alone() -> None:
    teacher = TeacherConfig(model=ModelConfig(architecture=tiny.TEACHER, dtype="bfloat16"))
    config = tiny.config(
        model=ModelConfig(architecture=tiny.STUDENT, dtype="bfloat16"),
        teacher=teacher,
        optim=OptimConfig(ema_decay=0.9),
    )
    task = make_train_spec(config, steps_per_epoch=10)
    arguments = abstract_state(task), tiny.batch(16), abstract_teachers(task)
    state, metrics = jax.eval_shape(lambda *xs: train_step(task, *xs), *arguments)
    floats = [x.dtype for x in jax.tree.leaves((state, metrics)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype("float32")}
    seen: dict[str, set[str]] = {}
    for equation in every_equation(jax.make_jaxpr(lambda *xs: train_step(task, *xs))(*arguments).jaxpr):
        kinds = {str(x.aval.dtype) for x in equation.invars if hasattr(x.aval, "dtype")}
        seen.setdefault(equation.primitive.name, set()).update(kinds)
    # Softmax, GELU, losses, statistics and whatever is summed up, gradients of biases and positions included.
    for name in ("exp", "log", "erf", "rsqrt", "sqrt", "reduce_sum"):
        assert "float32" in seen[name], name
        assert "bfloat16" not in seen[name], name
    assert "bfloat16" in seen["dot_general"]


@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_of_kernels_in_bfloat16(parts: int) -> None:
    model = ModelConfig(architecture=tiny.STUDENT, dtype="bfloat16")
    teacher = TeacherConfig(model=ModelConfig(architecture=tiny.TEACHER, dtype="bfloat16"))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    moments = {}
    for grad_dtype in ("float32", "bfloat16"):
        optim = OptimConfig(b1=0.5, eps=1e-3, grad_dtype=grad_dtype, accumulate_steps=parts)
        task = make_train_spec(tiny.config(model=model, teacher=teacher, optim=optim), steps_per_epoch=10)
        given = {"teacher": teacher_variables(mesh)}
        state, _ = make_train_step(task, mesh)(init_state(task, mesh), tiny.batch(16), given)
        assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
        # The first moment after one step is half of the gradient.
        moments[grad_dtype] = optax.tree.get(state.opt_state, "mu")["reverse"]["blocks_1"]["channel_mlp"]["fc1"]
    wide, narrow = moments["float32"], moments["bfloat16"]
    rounding = 2**-8 * parts * np.abs(wide["kernel"]).max()
    np.testing.assert_allclose(narrow["kernel"], wide["kernel"], rtol=0, atol=rounding)
    rounded = narrow["kernel"].astype(jnp.bfloat16).astype(jnp.float32)
    assert np.array_equal(rounded, narrow["kernel"]) == (parts == 1), "micro-batches are added up in float32"
    assert not np.array_equal(narrow["bias"].astype(jnp.bfloat16), narrow["bias"]), "biases stay in float32"


def test_a_teacher_cast_beforehand_gives_the_same_step() -> None:
    model = ModelConfig(architecture=tiny.STUDENT, dtype="bfloat16")
    teacher = TeacherConfig(model=ModelConfig(architecture=tiny.TEACHER, dtype="bfloat16"))
    task = make_train_spec(tiny.config(model=model, teacher=teacher), steps_per_epoch=10)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    given = {"teacher": teacher_variables(mesh)}
    frozen = freeze_teachers(task, given)
    kernel = frozen["teacher"]["params"]["blocks_0"]["mlp"]["fc1"]["kernel"]
    scale = frozen["teacher"]["params"]["blocks_0"]["norm1"]["scale"]
    assert (kernel.dtype, scale.dtype) == (jnp.bfloat16, jnp.float32)
    step = make_train_step(task, mesh)
    (_, expected), (_, metrics) = (step(init_state(task, mesh), tiny.batch(16), x) for x in (given, frozen))
    assert {name: float(x) for name, x in metrics.items()} == {name: float(x) for name, x in expected.items()}


def test_teacher_and_reverse_modules_leave_no_activations(capsys: pytest.CaptureFixture[str]) -> None:
    # Widths that tell whose an activation is.
    arch = dataclasses.replace(tiny.STUDENT, mlp_ratio=3.0)
    wide = dataclasses.replace(tiny.TEACHER, mlp_ratio=7.0)
    config = tiny.config(arch=arch, teacher=TeacherConfig(model=ModelConfig(architecture=wide)))
    task = make_train_spec(config, steps_per_epoch=10)
    teachers = abstract_teachers(task)
    state, batch = abstract_state(task), {"image": jnp.zeros((16, 32, 32, 1)), "label": jnp.zeros((16, 10))}

    def loss(params: Any, stats: Any, batch: Any, teachers: Any) -> jax.Array:
        return compute_loss(task, params, stats, batch, teachers, jax.random.key(0))[0]

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (state.params, state.batch_stats, batch, teachers))
    print_saved_residuals(loss, *zeros)
    lines = [line for line in capsys.readouterr().out.splitlines() if " from the argument " not in line]
    shapes = [
        tuple(int(n) for n in found[1].split(",")) for line in lines if (found := re.match(r"\w+\[([\d,]+)\]", line))
    ]
    assert any(arch.dim * 3 in shape and 16 in shape for shape in shapes), "the student's are kept"
    assert not any(wide.dim * 7 in shape for shape in shapes)
    # Of a reverse module its gradients alone: nothing as large as all channels of all examples.
    assert not any(16 * arch.dim in shape for shape in shapes)
    assert not any(shape[-3:] == (16, arch.num_patches, 4 * arch.dim) for shape in shapes)


def test_the_training_loss_has_forward_mode_and_hessian_vector_products() -> None:
    arch = dataclasses.replace(tiny.STUDENT, stem="patch")
    teacher = dataclasses.replace(tiny.TEACHER, stem="patch")
    config = tiny.config(
        model=ModelConfig(architecture=arch, attention="plain"),
        teacher=TeacherConfig(model=ModelConfig(architecture=teacher)),
    )
    task = make_train_spec(config, steps_per_epoch=10)
    teachers: dict[str, Any] = {"teacher": build_model(teacher).init(jax.random.key(7), jnp.zeros((1, 32, 32, 1)))}
    params = init_state(task, sharding.make_mesh(devices=jax.devices()[:1])).params
    batch = {**tiny.batch(4), "label": jax.nn.one_hot(tiny.batch(4)["label"], 10)}

    def loss(params: Any) -> jax.Array:
        return compute_loss(task, params, {}, batch, teachers, jax.random.key(0))[0]

    direction = jax.tree.map(lambda x: jnp.cos(100.0 * x), params)

    def along(tree: Any) -> jax.Array:
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, tree, direction)))  # type: ignore[return-value]

    grad = jax.jit(jax.grad(loss))
    slope = jax.jit(lambda x: jax.jvp(loss, (x,), (direction,))[1])(params)
    assert slope == pytest.approx(float(along(grad(params))), rel=1e-4)
    # Forward over reverse, against the difference of two gradients.
    curvature = along(jax.jit(lambda x: jax.jvp(jax.grad(loss), (x,), (direction,))[1])(params))
    step = 2e-4
    ends = [grad(jax.tree.map(lambda x, d, s=sign: x + s * step * d, params, direction)) for sign in (1, -1)]
    differences = along(ends[0]) - along(ends[1])
    assert float(curvature) == pytest.approx(float(differences) / (2 * step), rel=2e-2)
