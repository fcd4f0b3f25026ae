"""Fills a model's parameters from the tensors of a file: each is used once, and each target is filled, or all that is
wrong is said."""

import functools
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax.convert.layouts import Layout
from sit_jax.convert.original import Entry, name_table
from sit_jax.convert.tensors import Tensors
from sit_jax.errors import UserError
from sit_jax.models import build_model, build_reverse
from sit_jax.models.architecture import Architecture

Tree = dict[str, Any]
Show = Callable[[Iterable[Entry]], Iterable[Entry]]


def fill(
    arch: Architecture,
    tensors: Tensors,
    layout: Layout,
    reverse: bool,
    absent: Collection[str] = (),
    show: Show = iter,
) -> Tree:
    """Reads a model's weights, tensor by tensor.

    Args:
        arch: The model.
        tensors: What the file holds; BatchNorm's batch counters are passed over.
        layout: How it is named.
        reverse: Whether the reverse modules are read too; otherwise theirs are passed over.
        absent: Heads that are not looked for, and not in the result.
        show: Wraps the tensors while they are read, to show progress.

    Returns:
        `{'params': ..., 'batch_stats': ..., 'reverse': ...}`, NumPy float32, the latter two where there are any.

    Raises:
        UserError: Tensors are missing, left over, of another shape or type, or not finite; all of them are named.
    """
    table = [entry for entry in name_table(arch, reverse) if entry.path[1] not in absent]
    sources = {entry.key: layout.source(entry.key) for entry in table}
    wanted = {name for source in sources.values() for name in source.names}
    problems = {
        "missing": sorted(wanted - set(tensors)),
        "left over": sorted(
            name for name in set(tensors) - wanted if not (layout.knows(name) and _passed_over(name, reverse))
        ),
        "wrong shape": [],
        "not floating-point": sorted(name for name in wanted & set(tensors) if not tensors[name].is_float),
        "not finite": [],
    }
    tree: Tree = {}
    if not any(problems.values()):
        targets = _target_shapes(arch, reverse)
        for entry in show(table):
            names, combine = sources[entry.key]
            value = _read(entry, [tensors[name].read for name in names], combine, targets[entry.path])
            if value is None:
                shapes = " and ".join(f"{name} {tensors[name].shape}" for name in names)
                problems["wrong shape"].append(f"{shapes}, here it is {targets[entry.path]}")
            elif not np.isfinite(value).all():
                problems["not finite"] += names
            else:
                put(tree, entry.path, value)
    if any(problems.values()):
        text = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names)
        raise UserError(f"the weights do not fill the model: {text}")
    return tree


def _passed_over(name: str, reverse: bool) -> bool:
    return name.endswith("num_batches_tracked") or (name.startswith("rtsm.") and not reverse)


def _read(
    entry: Entry, reads: list[Callable[[], np.ndarray]], combine: Callable[..., np.ndarray], shape: tuple[int, ...]
) -> np.ndarray | None:
    """One array in our layout; None where it has another shape."""
    parts = [read() for read in reads]
    try:
        combined = combine(*parts)
        del parts
        value = entry.to_flax(combined)
    except (ValueError, IndexError):
        return None
    if value.shape != shape:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(value, np.float32).reshape(shape)


@functools.lru_cache(maxsize=8)
def _target_shapes(arch: Architecture, reverse: bool) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path -> shape of every parameter and statistic of a model, and of its reverse modules where `reverse`."""
    images = jax.ShapeDtypeStruct((1, arch.image_size, arch.image_size, arch.in_channels), jnp.float32)
    model = build_model(arch)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    if reverse:
        _, outputs = jax.eval_shape(model.apply, variables, images)
        tokens = build_reverse(arch).init
        variables = {**variables, "reverse": jax.eval_shape(tokens, jax.random.key(0), outputs.tokens)["params"]}
    return {
        tuple(str(part.key) for part in path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }


def put(tree: Tree, path: tuple[str, ...], value: Any) -> None:
    """Puts an array, or a tree of them, into a tree of dictionaries."""
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value
