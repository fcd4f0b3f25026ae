"""Restores checkpoints of runs with Orbax, onto any device or mesh."""

import contextlib
import gc
import json
import logging
import math
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from sit_jax.errors import NotFiniteError, RunError, one_line
from sit_jax.models.trees import Params, Variables

FOLDER = "checkpoints"
# The name in checkpoints of what is `rtsm` in the code.
STORED_RTSM = "reverse"
# The metrics that the best checkpoint is chosen by: the first that the evaluation has.
BEST_BY = ("top1", "cosine")
NO_SCORE = -1.0
DAMAGED = "is damaged (sit checkpoint verify says where)"


def best_step(checkpoints: Iterable[Any]) -> int | None:
    """Returns the step of the checkpoint with the best score, the earliest of equals.

    The argument has Orbax's checkpoint infos. The result is None if no checkpoint has a finite evaluation.
    """
    scored = [(found, -int(c.step)) for c in checkpoints if (found := score(c.metrics)) > NO_SCORE]
    return -max(scored)[1] if scored else None


def score(metrics: Mapping[str, float] | None) -> float:
    """Returns the accuracy of an evaluation, or without labels the mean cosine similarity of features to the teacher's.

    The result is `NO_SCORE` if there is none or a value is not finite.
    """
    values = metrics or {}
    if not all(map(math.isfinite, values.values())):
        return NO_SCORE
    return next((values[name] for name in BEST_BY if name in values), NO_SCORE)


@contextlib.contextmanager
def open_checkpoints(workdir: pathlib.Path, step: int | None = None) -> Iterator[Any]:
    """Opens Orbax's checkpointer of a run directory for reading; nothing is modified.

    Raises:
        RunError: There is no checkpoint, none of that step, or the metrics of one are damaged.
    """
    if not (workdir / FOLDER).is_dir():
        raise RunError(f"{workdir} has no checkpoint")
    with contextlib.ExitStack() as stack:
        try:
            with silent_threads():  # Orbax warns of steps without metadata.
                checkpointer = stack.enter_context(ocp.training.Checkpointer((workdir / FOLDER).absolute()))
                steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
        except json.JSONDecodeError as error:
            raise RunError(f"{workdir}: the metrics of a checkpoint are damaged: {one_line(error)}") from None
        if not steps:
            raise RunError(f"{workdir} has no checkpoint")
        if step is not None and step not in steps:
            raise RunError(f"{workdir} has no checkpoint {step}; there are {', '.join(map(str, steps))}")
        yield checkpointer


def stored_evaluation(workdir: pathlib.Path) -> dict[str, float]:
    """Returns the metrics of the newest checkpoint's evaluation; empty if it was not evaluated."""
    with open_checkpoints(workdir) as checkpointer:
        return dict(checkpointer.latest.metrics or {})


def load_variables(
    workdir: pathlib.Path, abstract: Variables, ema: bool = False, step: int | None = None
) -> tuple[Variables, int]:
    """Restores a model's variables, without the optimizer state, onto the default device.

    `abstract` has the shapes and types of `{'params': ..., 'batch_stats': ...}`; `step` is the newest if None. Returns
    the variables, and the step. Raises a RunError if there is no checkpoint, it is of another model, or contains no
    moving average, and a NotFiniteError if the weights are not finite.
    """
    wanted = _on_default_device(abstract)
    with open_checkpoints(workdir, step) as checkpointer:
        chosen = checkpointer.latest.step if step is None else step
        part = "ema" if ema else "model"
        try:
            with silent_threads():
                loaded = checkpointer.load_checkpointables(chosen, {part: wanted})
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            problem = f"does not hold this {part}: {one_line(error)}"
            if is_damaged(checkpointer, chosen, part, wanted):
                problem = f"{DAMAGED}; {way_out(checkpointer, chosen, (part,))}"
            raise RunError(f"checkpoint {chosen} in {workdir} {problem}") from None
    _check_finite(loaded[part], f"checkpoint {chosen} in {workdir}")
    return dict(loaded[part]), chosen


def stored_items(checkpointer: Any, step: int) -> dict[str, PyTree]:
    """Returns the items of a checkpoint whose metadata are readable; they are not after an interrupted removal."""
    try:
        with silent_threads():
            there = checkpointer.checkpointables_metadata(step).metadata
        return {name: item for name, item in there.items() if item is not None}
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def is_damaged(checkpointer: Any, step: int, part: str, expected: PyTree) -> bool:
    """Returns whether an item that cannot be restored is damaged, and not of another model."""
    there = stored_items(checkpointer, step)
    stored, wanted = (sorted(tuple(x.shape) for x in jax.tree.leaves(tree)) for tree in (there.get(part), expected))
    return "model" not in there or stored == wanted


def way_out(checkpointer: Any, step: int, parts: Iterable[str]) -> str:
    """Returns advice on a checkpoint that cannot be used: the newest one before it that has the same parts."""
    before = sorted((c.step for c in checkpointer.checkpoints if c.step < step), reverse=True)
    earlier = next((other for other in before if {*parts} <= stored_items(checkpointer, other).keys()), None)
    return "there is none before it" if earlier is None else f"move {step} away to go on from step {earlier}"


def _on_default_device(abstract: PyTree) -> PyTree:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract)


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


def load_rtsm(workdir: pathlib.Path, abstract: Params, step: int) -> Params:
    """Restores the parameters of the reverse modules from a checkpoint that exists.

    Raises:
        RunError: The checkpoint contains no such reverse modules.
    """
    wanted = _on_default_device(abstract)
    partial = ocp.Context()
    partial.pytree.loading.partial_load = True
    with partial, ocp.training.Checkpointer((workdir / FOLDER).absolute()) as checkpointer:
        try:
            loaded = checkpointer.load_checkpointables(step, {"training": {"params": {STORED_RTSM: wanted}}})
        except (ValueError, KeyError) as error:
            raise RunError(f"{workdir}: its checkpoint holds no such reverse modules: {one_line(error)}") from None
    rtsm: Params = loaded["training"]["params"][STORED_RTSM]
    _check_finite(rtsm, f"{workdir}: its reverse modules")
    return rtsm


def rename_keys(tree: PyTree, old: str, new: str) -> PyTree:
    """Returns a tree of dicts and (named) tuples, such as an optimizer's state, with another name for a key."""
    if isinstance(tree, dict):
        return {new if key == old else key: rename_keys(value, old, new) for key, value in tree.items()}
    if isinstance(tree, tuple):
        items = (rename_keys(value, old, new) for value in tree)
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    return tree


@contextlib.contextmanager
def silent_threads() -> Iterator[None]:
    """Suppresses the hundreds of tracebacks of TensorStore's reads of a damaged file, and Orbax's log messages.

    The error of a read must leave the block: an error that is caught inside needs a block of its own around the read.
    """
    loggers = [logging.getLogger(name) for name in ("asyncio", "absl")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    try:
        yield
    except Exception:
        gc.collect()  # Futures that were not awaited log their errors when they are garbage-collected.
        raise
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
