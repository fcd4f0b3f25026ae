"""Loads a model's parameters from the tensors of a file.

Every tensor must be used once and every parameter must be set; otherwise an error lists all mismatches.
"""

import collections
import functools
import sys
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

from sit_jax.errors import UserError, listed
from sit_jax.io.convert.layouts import Layout, Source
from sit_jax.io.convert.sit_names import Entry, name_table
from sit_jax.io.convert.tensors import Tensors
from sit_jax.models import abstract_variables, build_model, build_rtsm
from sit_jax.models.architecture import Architecture
from sit_jax.models.trees import Variables


def load_params(
    arch: Architecture, tensors: Tensors, layout: Layout, rtsm: bool, absent: Collection[str] = (), label: str = ""
) -> Variables:
    """Returns `{'params': ..., 'batch_stats': ..., 'rtsm': ...}`, NumPy float32; the latter two only if not empty.

    The heads in `absent` are neither loaded nor in the result. Reverse modules are loaded only if `rtsm`, and ignored
    otherwise, as are counters of batches and averages. A terminal shows progress under the name `label`. Raises a
    UserError that lists the tensors that are missing, unexpected, of another shape or type, or not finite.
    """
    table = [entry for entry in name_table(arch, rtsm) if entry.path[1] not in absent]
    sources = {entry.key: layout.source(entry.key) for entry in table}
    uses = collections.Counter(name for source in sources.values() for name in source.names)
    wanted = set(uses)
    # A tensor that holds a parameter of all blocks is read once.
    tensors = {
        name: tensor._replace(read=functools.cache(tensor.read)) if uses[name] > 2 else tensor
        for name, tensor in tensors.items()
    }
    problems = {
        "missing": sorted(wanted - set(tensors)),
        "left over": sorted(
            name for name in set(tensors) - wanted if not (layout.knows(name) and _is_unused(name, rtsm))
        ),
        "wrong shape": [],
        "not floating-point": sorted(name for name in wanted & set(tensors) if not tensors[name].is_float),
        "not finite": [],
    }
    values: dict[tuple[str, ...], np.ndarray] = {}
    if not any(problems.values()):
        expected = flatten_dict(expected_shapes(arch, rtsm))
        hidden = not label or not sys.stderr.isatty()
        for entry in tqdm(table, label, unit="tensor", delay=1, leave=False, disable=hidden):
            names = sources[entry.key].names
            value = _convert(entry, sources[entry.key], tensors, expected[entry.path].shape)
            if value is None:
                shapes = " and ".join(f"{name} {tensors[name].shape}" for name in names)
                problems["wrong shape"].append(f"{shapes}, here it is {expected[entry.path].shape}")
            elif not np.isfinite(value).all():
                problems["not finite"] += names
            else:
                values[entry.path] = value
    if any(problems.values()):
        text = "; ".join(f"{what}: {listed(names, most=8)}" for what, names in problems.items() if names)
        raise UserError(f"the weights do not match the model: {text}")
    return unflatten_dict(values)


def _is_unused(name: str, rtsm: bool) -> bool:
    return name.endswith(("num_batches_tracked", "n_averaged")) or (name.startswith("rtsm.") and not rtsm)


def _convert(entry: Entry, source: Source, tensors: Tensors, shape: tuple[int, ...]) -> np.ndarray | None:
    """Reads one array in this package's layout; returns None if it has another shape."""
    try:
        value = entry.to_flax(source.combine(*(tensors[name].read() for name in source.names)))
    except (ValueError, IndexError):
        return None
    if value.shape != shape:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(value, np.float32).reshape(shape)


@functools.lru_cache(maxsize=8)
def expected_shapes(arch: Architecture, rtsm: bool) -> Variables:
    """Returns a model's variables as `jax.ShapeDtypeStruct`s: `params`, `batch_stats`, `rtsm`."""
    tree: Variables = {"batch_stats": {}, "rtsm": {}, **abstract_variables(arch)}
    if rtsm:
        images = jax.ShapeDtypeStruct((1, *arch.image_shape, arch.in_channels), jnp.float32)
        _, outputs = jax.eval_shape(build_model(arch).apply, tree, images)
        tree["rtsm"] = jax.eval_shape(build_rtsm(arch).init, jax.random.key(0), outputs.tokens)["params"]
    return tree
