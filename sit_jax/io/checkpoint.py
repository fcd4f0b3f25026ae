"""Reads checkpoints of runs through Orbax, onto any device or mesh."""

import contextlib
import gc
import logging
import math
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from sit_jax.errors import NotFiniteError, RunError, one_line

FOLDER = "checkpoints"
BEST_BY = "top1"
NO_SCORE = -1.0


def best_step(checkpoints: Iterable[Any]) -> int | None:
    """The step of the best of Orbax's descriptions of checkpoints by accuracy, the earliest of equals.

    None where no checkpoint has an evaluation that is finite.
    """
    scored = [(found, -int(c.step)) for c in checkpoints if (found := score(c.metrics)) > NO_SCORE]
    return -max(scored)[1] if scored else None


def score(metrics: Mapping[str, float] | None) -> float:
    """Accuracy of an evaluation; below every accuracy where there is none, or where it is not finite."""
    values = metrics or {}
    return values.get(BEST_BY, NO_SCORE) if all(map(math.isfinite, values.values())) else NO_SCORE


@contextlib.contextmanager
def open_checkpoints(workdir: pathlib.Path, step: int | None = None) -> Iterator[Any]:
    """Orbax's checkpointer over a run's folder, for reading; nothing there is changed.

    Raises:
        RunError: There is no checkpoint, or none of that step.
    """
    if not (workdir / FOLDER).is_dir():
        raise RunError(f"{workdir} holds no checkpoint")
    with ocp.training.Checkpointer((workdir / FOLDER).absolute()) as checkpointer:
        steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
        if not steps:
            raise RunError(f"{workdir} holds no checkpoint")
        if step is not None and step not in steps:
            raise RunError(f"{workdir} holds no checkpoint {step}; there are {', '.join(map(str, steps))}")
        yield checkpointer


def load_variables(
    workdir: pathlib.Path, abstract: dict[str, Any], ema: bool = False, step: int | None = None
) -> dict[str, Any]:
    """Reads a model's variables, without the optimizer, onto the default device.

    Args:
        workdir: The run's folder.
        abstract: Shapes and types of `{'params': ..., 'batch_stats': ...}`.
        ema: Read the moving average instead of the weights.
        step: Which checkpoint; the newest where None.

    Raises:
        RunError: There is no checkpoint, or it is of another model, or it holds no moving average.
        NotFiniteError: It holds weights that are not finite.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract)
    with open_checkpoints(workdir, step) as checkpointer:
        chosen = checkpointer.latest.step if step is None else step
        part = "ema" if ema else "model"
        try:
            loaded = checkpointer.load_checkpointables(chosen, {part: wanted})
        except (ValueError, KeyError) as error:
            raise RunError(f"checkpoint {chosen} in {workdir} does not hold this {part}: {one_line(error)}") from None
    _check_finite(loaded[part], f"checkpoint {chosen} in {workdir}")
    return dict(loaded[part])


def _check_finite(tree: Any, where: str) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    finite = jax.device_get([jnp.isfinite(leaf).all() for _, leaf in leaves])
    bad = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, _), ok in zip(leaves, finite, strict=True)
        if not ok
    ]
    if bad:
        more = f" (and {len(bad) - 1} other arrays)" if len(bad) > 1 else ""
        raise NotFiniteError(f"{where}: {bad[0]}{more} holds values that are not finite; choose another --step")


def load_reverse(workdir: pathlib.Path, abstract: Any, step: int | None = None) -> Any:
    """Reads the reverse modules' parameters; see `load_variables`, which finds out first whether there is such a step.

    Raises:
        RunError: The checkpoint holds no such reverse modules.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract)
    partial = ocp.Context()
    partial.pytree.loading.partial_load = True
    with partial, ocp.training.Checkpointer((workdir / FOLDER).absolute()) as checkpointer:
        try:
            loaded = checkpointer.load_checkpointables(step, {"training": {"params": {"reverse": wanted}}})
        except (ValueError, KeyError) as error:
            raise RunError(f"{workdir}: its checkpoint holds no such reverse modules: {one_line(error)}") from None
    reverse = loaded["training"]["params"]["reverse"]
    _check_finite(reverse, f"{workdir}: its reverse modules")
    return reverse


def latest_step(workdir: pathlib.Path) -> int:
    """The step of a run's newest checkpoint, of which there must be one."""
    with ocp.training.Checkpointer((workdir / FOLDER).absolute()) as checkpointer:
        latest = checkpointer.latest
        assert latest is not None, "there is no checkpoint"
        return int(latest.step)


@contextlib.contextmanager
def silent_threads() -> Iterator[None]:
    """TensorStore's reads of a damaged file fail by the hundred, each with a traceback; one error is raised."""
    loggers = [logging.getLogger(name) for name in ("asyncio", "absl")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        gc.collect()  # What no one waited for complains when it is collected.
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
