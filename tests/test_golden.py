"""Our numbers against the PyTorch original's: forward passes, losses, gradients and optimizer steps."""

import functools
from typing import Any

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import TRAINED

from sit_jax import losses
from sit_jax.io.convert.sit_names import to_original
from sit_jax.models import build_model, build_rtsm
from sit_jax.models.architecture import Architecture
from sit_jax.models.trees import Variables
from sit_jax.parallel.sharding import make_mesh
from sit_jax.training.state import TrainState
from sit_jax.training.step import compute_loss, make_train_spec, make_train_step


def close(mine: Any, theirs: np.ndarray, relative: float) -> None:
    """Asserts agreement relative to the largest value of the tensor."""
    assert np.shape(mine) == theirs.shape
    np.testing.assert_allclose(np.asarray(mine), theirs, rtol=0, atol=relative * max(1e-8, np.abs(theirs).max()))


def apply(arch: Architecture, variables: Variables, images: np.ndarray, **options: Any) -> tuple[jax.Array, Any]:
    """Logits and outputs of a model, whose variables may have reverse modules beside them."""
    model = functools.partial(build_model(arch).apply, **options)
    given = {key: value for key, value in variables.items() if key != "rtsm"}
    result: Any = jax.jit(model)(given, golden_files.nhwc(images))
    return result[0] if "mutable" in options else result


def close_to_all(mine: Any, data: dict[str, np.ndarray], name: str) -> None:
    for block, tokens in enumerate(mine):
        close(tokens, data[f"{name}/{block}"], 1e-4)


@pytest.mark.parametrize("name", TRAINED)
def test_forward(name: str) -> None:
    data, meta, arch, teacher, student = golden_files.load(name)
    assert list(arch.token_counts) == meta["kept_tokens"]
    assert [block + 1 for block in arch.slimming] == meta["slim_after_block"]
    for kind, model, variables in (("teacher", arch.without_slimming(), teacher), ("student", arch, student)):
        logits, outputs = apply(model, variables, data["images_nchw"])
        close(logits, data[f"eval/{kind}_logits"], 1e-4)
        close_to_all(outputs.tokens, data, f"eval/{kind}_tokens")
    trained = golden_files.from_original(golden_files.part(data, "final/"), arch)
    close(apply(arch, trained, data["images_nchw"])[0], data["final_eval/student_logits"], 1e-4)


@pytest.mark.parametrize("name", TRAINED)
def test_recovered_tokens(name: str) -> None:
    data, _, arch, _, student = golden_files.load(name)
    logits, outputs = apply(arch, student, data["steps/images_nchw"][0], train=True, mutable=["batch_stats"])
    close(logits, data["train0/logits"], 1e-4)
    recovered = build_rtsm(arch).apply({"params": student["rtsm"]}, outputs.tokens)
    close_to_all(recovered, data, "train0/student_tokens")


@functools.cache
def trajectory(name: str) -> tuple[list[dict[str, float]], list[dict[str, np.ndarray]]]:
    """Runs the golden steps: the metrics of each, and the weights after it in the original's layout."""
    golden = golden_files.load(name)
    task = make_train_spec(golden_files.config(golden), steps_per_epoch=1)
    step, state = make_train_step(task, make_mesh(devices=jax.devices()[:1])), initial_state(name, task)
    metrics, states = [], []
    for images, labels in zip(golden.data["steps/images_nchw"], golden.data["steps/soft_labels"], strict=True):
        batch = {"image": golden_files.nhwc(images), "label": jnp.asarray(labels)}
        state, values = step(state, batch, {"teacher": golden.teacher})
        metrics.append({key: float(value) for key, value in values.items()})
        tree = {**state.variables, "rtsm": state.params["rtsm"]}
        states.append(to_original(jax.device_get(tree), golden.arch))
    return metrics, states


def initial_state(name: str, task: Any) -> TrainState:
    """The golden run's state before its first step."""
    student = jax.tree.map(jnp.array, golden_files.load(name).student)
    params, stats = {"model": student["params"], "rtsm": student["rtsm"]}, student.get("batch_stats", {})
    return TrainState(jnp.zeros((), jnp.int32), params, stats, task.optimizer.init(params), ema=None)


@pytest.mark.parametrize("name", TRAINED)
def test_losses_and_learning_rates_of_every_step(name: str) -> None:
    golden = golden_files.load(name)
    weights = golden.meta["distillation"]
    for index, metrics in enumerate(trajectory(name)[0]):
        # The original prints its terms weighted.
        mine = [
            metrics["loss"],
            metrics["classification"],
            metrics["token"] * weights["lambda_token"],
            metrics["logits"] * weights["lambda_logits"],
        ]
        np.testing.assert_allclose(mine, golden.data[f"steps/{index}/losses"], rtol=1e-4)
        rates = [metrics["lr/model"], metrics["lr/rtsm"]]
        np.testing.assert_allclose(rates, golden.data[f"steps/{index}/lr_backbone_rtsm"], rtol=1e-6)


@pytest.mark.parametrize("name", TRAINED)
def test_gradients(name: str) -> None:
    golden = golden_files.load(name)
    task = make_train_spec(golden_files.config(golden), steps_per_epoch=1)
    state = initial_state(name, task)
    images = golden_files.nhwc(golden.data["steps/images_nchw"][0])
    batch = {"image": images, "label": jnp.asarray(golden.data["steps/soft_labels"][0])}

    def loss(params: Any) -> jax.Array:
        teachers = {"teacher": golden.teacher}
        return compute_loss(task, params, state.batch_stats, batch, teachers, jax.random.key(0))[0]

    grads = jax.jit(jax.grad(loss))(state.params)
    tree = {"params": grads["model"], "batch_stats": state.batch_stats, "rtsm": grads["rtsm"]}
    mine = to_original(jax.device_get(tree), golden.arch)
    theirs = golden_files.part(golden.data, "train0/grad/")
    assert set(theirs) == {key for key in mine if "running" not in key and "aux_head" not in key}
    for key, gradient in theirs.items():
        # Below float32's epsilon of the largest gradient there is only rounding, on their side as on ours: a bias that
        # the softmax over tokens does not see has the gradient zero, and a stored one of 1e-9.
        bound = max(1e-3 * np.abs(gradient).max(), 1e-7 * largest_gradient(golden.data))
        np.testing.assert_allclose(mine[key], gradient, rtol=0, atol=bound, err_msg=key)


def largest_gradient(data: dict[str, np.ndarray]) -> float:
    """The largest gradient of step 0."""
    return max(float(np.abs(value).max()) for value in golden_files.part(data, "train0/grad/").values())


def has_gradient(data: dict[str, np.ndarray], key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Which entries of a weight have a gradient that is more than rounding.

    Adam divides a gradient by its own size, so where the true gradient is zero (a bias on all keys, a bias that the
    softmax over tokens does not see) or lost in rounding, the weight moves at random by the learning rate.
    """
    gradient = data.get(f"train0/grad/{key}")
    sure = np.ones(shape, bool) if gradient is None else np.abs(gradient) > 1e-5 * largest_gradient(data)
    if key.endswith("attn.qkv.bias"):
        sure[shape[0] // 3 : 2 * shape[0] // 3] = False
    return sure


@pytest.mark.parametrize("name", TRAINED)
def test_weights_after_all_steps(name: str) -> None:
    golden = golden_files.load(name)
    final, mine = golden_files.part(golden.data, "final/"), trajectory(name)[1][-1]
    compared = total = 0
    for key in mine:
        theirs = final[key]
        sure = has_gradient(golden.data, key, theirs.shape)
        error = np.abs(mine[key] - theirs)
        assert error[sure].max(initial=0.0) <= 1e-3 * np.abs(theirs).max(), key
        assert error.max() <= 0.03, key
        compared, total = compared + sure.sum(), total + sure.size
    assert compared > 0.98 * total


@pytest.mark.parametrize("name", TRAINED)
def test_weights_after_every_step_in_sum(name: str) -> None:
    golden = golden_files.load(name)
    moved = 0.0
    for index, state in enumerate(trajectory(name)[1]):
        theirs = np.sort(golden.data[f"steps/{index}/param_sums"])
        model, reverse = golden.data[f"steps/{index}/lr_backbone_rtsm"]
        moved += float(max(model, reverse))
        sums = []
        for key, value in state.items():
            if "running" not in key:
                unsure = (~has_gradient(golden.data, key, value.shape)).sum()
                # Both sides may have moved such an entry by the rates of all steps, in either direction.
                sums.append((float(np.abs(value).sum()), 2 * moved * float(unsure)))
        assert len(theirs) == len(sums)
        mine, slack = np.array(sorted(sums)).T
        assert (np.abs(mine - theirs) <= 2e-3 + 2e-3 * theirs + slack).all()


def test_distillation_token() -> None:
    golden = golden_files.load("dist_token")
    data, weights = golden.data, golden.meta["distillation"]
    logits, outputs = apply(golden.arch, golden.student, data["images_nchw"], train=True, mutable=["batch_stats"])
    close(logits, data["train0/logits"], 1e-4)
    close(outputs.distillation_logits, data["train0/dist_logits"], 1e-4)
    recovered: Any = build_rtsm(golden.arch).apply({"params": golden.student["rtsm"]}, outputs.tokens)
    close_to_all(recovered, data, "train0/student_tokens")
    teacher_logits, teacher_outputs = apply(golden.arch.without_slimming(), golden.teacher, data["images_nchw"])
    terms = [
        float(losses.soft_target_cross_entropy(logits, jnp.asarray(data["soft_labels"]))),
        float(losses.token_distillation(recovered, teacher_outputs.tokens)) * weights["lambda_token"],
        float(losses.logits_distillation(logits, teacher_logits, weights["tau"])) * weights["lambda_logits"],
        float(losses.hard_distillation(outputs.distillation_logits, jnp.asarray(data["cnn_teacher_logits"]))),
    ]
    np.testing.assert_allclose([sum(terms), *terms], data["losses"], rtol=1e-4)


@pytest.mark.parametrize("name", [*TRAINED, "dist_token"])
def test_weights_return_bit_for_bit(name: str) -> None:
    golden = golden_files.load(name)
    teacher = golden_files.part(golden.data, "teacher/")
    student = {**teacher, **golden_files.part(golden.data, "student_own/")}
    for weights, arch in ((teacher, golden.arch.without_slimming()), (student, golden.arch)):
        back = to_original(golden_files.from_original(weights, arch), arch)
        assert set(back) == {key for key in weights if not key.endswith("num_batches_tracked")}
        assert all(np.array_equal(back[key], weights[key]) for key in back)
