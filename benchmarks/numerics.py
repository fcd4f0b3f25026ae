"""Compares bfloat16 training with the original's float32 numbers, and with our float32.

    python benchmarks/numerics.py

For each golden file (tests/golden: weights, losses, gradients and optimizer steps of the PyTorch original), the largest
relative error of the loss over the steps, the error of the first step's gradient and that of the weights after the last
step, both as the norm of the difference over the norm: of the gradient, and of how far the weights moved.
"""

import argparse
import dataclasses
import pathlib
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))

import golden_files

from sit_jax.io.convert.sit_names import to_original
from sit_jax.ops.linear import cast_kernels
from sit_jax.parallel.sharding import make_mesh
from sit_jax.training.state import TrainState
from sit_jax.training.step import compute_loss, make_train_spec, make_train_step

Dtype = Literal["float32", "bfloat16"]
# Type of the products, and of the kernels' gradients.
SETTINGS: tuple[tuple[Dtype, Dtype], ...] = (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))


def errors(name: str, dtype: Dtype, grad_dtype: Dtype) -> tuple[float, float, float]:
    """Errors of loss, first gradient and weights after the last step."""
    golden = golden_files.load(name)
    config = golden_files.config(golden)
    assert config.teacher is not None
    model, teacher, optim = config.model, config.teacher.model, config.optim
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(model, dtype=dtype),
        teacher=dataclasses.replace(config.teacher, model=dataclasses.replace(teacher, dtype=dtype)),
        optim=dataclasses.replace(optim, grad_dtype=grad_dtype),
    )
    task = make_train_spec(config, steps_per_epoch=1)
    params = {"model": golden.student["params"], "rtsm": golden.student["rtsm"]}
    params = jax.tree.map(jnp.array, params)
    stats = jax.tree.map(jnp.array, golden.student.get("batch_stats", {}))
    teachers = {"teacher": golden.teacher}
    batches = [
        {"image": golden_files.nhwc(images), "label": jnp.asarray(labels)}
        for images, labels in zip(golden.data["steps/images_nchw"], golden.data["steps/soft_labels"], strict=True)
    ]

    def loss(params: Any) -> jax.Array:
        return compute_loss(task, params, stats, batches[0], teachers, jax.random.key(0))[0]

    grads = jax.jit(jax.grad(loss))(cast_kernels(params, grad_dtype))
    grads = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
    gradient = distance(in_original(golden, grads, stats), golden_files.part(golden.data, "train0/grad/"))

    fresh, fresh_stats = jax.tree.map(jnp.array, (params, stats))  # The step takes its arguments over.
    state = TrainState(jnp.zeros((), jnp.int32), fresh, fresh_stats, task.optimizer.init(params), None)
    step = make_train_step(task, make_mesh(devices=jax.devices()[:1]))
    worst = 0.0
    for index, batch in enumerate(batches):
        state, metrics = step(state, batch, teachers)
        theirs = float(golden.data[f"steps/{index}/losses"][0])
        worst = max(worst, abs(float(metrics["loss"]) - theirs) / theirs)
    before = in_original(golden, params, stats)
    after, final = in_original(golden, state.params, stats), golden_files.part(golden.data, "final/")
    trained = [key for key in before if "running" not in key and "aux_head" not in key]
    moved = {key: final[key] - before[key] for key in trained}
    return worst, gradient, distance({key: after[key] - before[key] for key in trained}, moved)


def in_original(golden: Any, params: Any, stats: Any) -> dict[str, np.ndarray]:
    tree = {"params": params["model"], "batch_stats": stats, "rtsm": params["rtsm"]}
    return to_original(jax.device_get(tree), golden.arch)


def distance(mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Norm of the difference over the norm."""
    apart = sum(float(np.square(mine[key] - value, dtype=np.float64).sum()) for key, value in theirs.items())
    whole = sum(float(np.square(value, dtype=np.float64).sum()) for value in theirs.values())
    return float(np.sqrt(apart / whole))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| golden file | products | kernels' gradients | loss | gradient | weights |\n|---|---|---|---|---|---|")
    for name in golden_files.TRAINED:
        for dtype, grad_dtype in SETTINGS:
            loss, gradient, weights = errors(name, dtype, grad_dtype)
            print(f"| {name} | {dtype} | {grad_dtype} | {loss:.1e} | {gradient:.1e} | {weights:.1e} |", flush=True)


if __name__ == "__main__":
    main()
