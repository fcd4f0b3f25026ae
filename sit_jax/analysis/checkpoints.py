"""Lists, inspects and verifies checkpoints. A single CPU can open checkpoints of any mesh."""

import contextlib
import datetime
import itertools
import json
import math
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from sit_jax.analysis.table import cell, print_table
from sit_jax.config import JsonObject
from sit_jax.errors import RunError, one_line
from sit_jax.io import runs
from sit_jax.io.checkpoint import best_step, open_checkpoints, silent_threads
from sit_jax.training.checkpoint import checkpoint_parts
from sit_jax.training.step import abstract_state, make_train_spec

_PARTS = ("model", "ema", "training")
_FEW = 5
_READ_AT_ONCE = 2**29


class Entry(NamedTuple):
    """One checkpoint of a run.

    `time` is when its writing was completed, ISO 8601 in UTC; `metrics` are empty if its weights were not evaluated;
    `best` is by accuracy; a resumed run starts from the `newest`; `bytes` is the size on disk.
    """

    step: int
    time: str
    metrics: dict[str, float]
    best: bool
    newest: bool
    bytes: int


class ArrayEntry(NamedTuple):
    """One array of a checkpoint.

    `name` is its path, starting with the item: `model/params/blocks_0/attn/qkv/kernel`. `written_from` is its sharding
    on the devices that wrote it, if Orbax recorded it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    written_from: str

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Contents(NamedTuple):
    """The contents of a checkpoint, and the metrics of the evaluation of its weights.

    `metadata` has `config`, `data`, `mesh`, `processes`, `devices`, `versions`, and the metrics of the steps since the
    last line that was written (`window`); it is empty in older checkpoints.
    """

    step: int
    metadata: JsonObject
    metrics: dict[str, float]
    arrays: tuple[ArrayEntry, ...]


def list_checkpoints(folder: pathlib.Path) -> list[Entry]:
    """Returns the complete checkpoints of a run, oldest first; raises a RunError if there is none."""
    with open_checkpoints(folder) as checkpointer:
        found = list(checkpointer.checkpoints)
        place = pathlib.Path(checkpointer.directory)
    best = best_step(found)
    return [
        Entry(
            step=c.step,
            time=_time(c.commit_timestamp_nsecs),
            metrics=dict(c.metrics or {}),
            best=c.step == best,
            newest=c.step == found[-1].step,
            bytes=_disk_size(place / str(c.step)),
        )
        for c in found
    ]


def _disk_size(folder: pathlib.Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # A running training may remove it meanwhile.
            total += path.stat().st_size if path.is_file() else 0
    return total


def read_contents(folder: pathlib.Path, step: int | None = None) -> Contents:
    """Returns the contents of a run's checkpoint, the newest if `step` is None, without reading its arrays.

    Raises a RunError if there is no such checkpoint, or its metadata is damaged.
    """
    with silent_threads(), open_checkpoints(folder, step) as checkpointer:
        found = next(c for c in reversed(checkpointer.checkpoints) if step in (None, c.step))
        try:
            described = checkpointer.checkpointables_metadata(found.step)
            arrays = tuple(
                ArrayEntry(name, tuple(leaf.shape), np.dtype(leaf.dtype).name, _written_from(leaf))
                for part in _PARTS
                if part in described.metadata
                for name, leaf in _leaves(described.metadata[part], part)
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # A damaged file raises many types.
            raise RunError(f"checkpoint {found.step} in {folder} is damaged: {one_line(error)}") from None
    if not arrays:
        raise RunError(f"checkpoint {found.step} in {folder} is damaged: it describes no array")
    return Contents(found.step, dict(described.custom_metadata or {}), dict(found.metrics or {}), arrays)


class Verdict(NamedTuple):
    """Number of arrays of a checkpoint, their size in memory, and its problems, one line each; none if it is valid."""

    step: int
    arrays: int
    bytes: int
    problems: tuple[str, ...]


def verify(folder: pathlib.Path, step: int | None = None) -> Verdict:
    """Reads every array of a checkpoint and checks that it is readable, finite, and of the configured shape.

    Memory use is at most half a GiB and the size of the largest array. Raises as `read_contents` does.
    """
    contents = read_contents(folder, step)
    problems = list(_wrong_shapes(folder, contents))
    problems += [f"metrics: {name} is {x}" for name, x in contents.metrics.items() if not math.isfinite(x)]
    total = sum(array.bytes for array in contents.arrays)
    with (
        silent_threads(),  # An error that `_read` catches may free its futures after the block there.
        open_checkpoints(folder, contents.step) as checkpointer,
        tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar,
    ):
        described = checkpointer.checkpointables_metadata(contents.step).metadata
        for part in [name for name in _PARTS if name in described]:
            arrays = [array for array in contents.arrays if array.name.startswith(f"{part}/")]
            ends = np.cumsum([array.bytes for array in arrays]) // _READ_AT_ONCE
            for _, indices in itertools.groupby(range(len(arrays)), key=ends.__getitem__):
                group = list(indices)
                found = _read(checkpointer, contents.step, part, described[part], group)
                problems += [f"{arrays[index].name}: {problem}" for index, problem in found.items()]
                bar.update(sum(arrays[index].bytes for index in group))
    return Verdict(contents.step, len(contents.arrays), total, tuple(problems))


def _read(
    checkpointer: ocp.training.Checkpointer, step: int, part: str, described: PyTree, group: list[int]
) -> dict[int, str]:
    """Returns the problems of arrays of an item, by their index."""
    device = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    leaves, structure = jax.tree.flatten(described)
    wanted = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device) if index in group else ocp.PLACEHOLDER
        for index, leaf in enumerate(leaves)
    ]
    try:
        with silent_threads():
            loaded = checkpointer.load_checkpointables(step, {part: jax.tree.unflatten(structure, wanted)})
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if len(group) == 1:
            return {group[0]: f"cannot be read: {one_line(error)}"}
        found: dict[int, str] = {}
        for index in group:  # Reading each array separately identifies the damaged ones; a few are enough.
            if len(found) < _FEW:
                found |= _read(checkpointer, step, part, described, [index])
        return found
    values = [leaf for leaf in jax.tree.leaves(loaded[part]) if isinstance(leaf, jax.Array)]
    problems = {}
    for index, value in zip(group, values, strict=True):
        if jnp.issubdtype(value.dtype, jnp.inexact):
            wrong = int(value.size - np.isfinite(np.asarray(value)).sum())
            if wrong:
                problems[index] = f"{wrong:,} of {value.size:,} values are not finite"
    return problems


def _wrong_shapes(folder: pathlib.Path, contents: Contents) -> Iterator[str]:
    """Yields arrays whose shape differs from the run's configuration, or that are missing or unexpected."""
    state = abstract_state(make_train_spec(runs.read_config(folder), steps_per_epoch=1))
    expected = {
        name: tuple(leaf.shape) for part, tree in checkpoint_parts(state).items() for name, leaf in _leaves(tree, part)
    }
    there = {a.name: a.shape for a in contents.arrays}
    # The optimizer's structure has other names on disk, so only the sizes of its arrays are compared.
    optimizer = "training/opt_state"
    moments = sorted((tuple(x.shape), str(x.dtype)) for x in jax.tree.leaves(state.opt_state))
    if moments != sorted((a.shape, a.dtype) for a in contents.arrays if a.name.startswith(optimizer)):
        yield f"{optimizer}: its arrays are not those of the configuration's optimizer"
    for name in sorted(name for name in expected.keys() | there.keys() if not name.startswith(optimizer)):
        if name not in there:
            yield f"{name}: is missing"
        elif name not in expected:
            yield f"{name}: is not in the configuration's model"
        elif there[name] != expected[name]:
            yield f"{name}: is {there[name]}, the configuration says {expected[name]}"


def describe_problems(verdict: Verdict) -> str:
    """Returns a verdict's problems in one line: the first few, and the number of others."""
    more = len(verdict.problems) - _FEW
    return "; ".join([*verdict.problems[:_FEW], *([f"and {more} more"] if more > 0 else [])])


def print_list(entries: Sequence[Entry]) -> None:
    """Prints checkpoints as a table on standard output."""
    names = sorted({name for entry in entries for name in entry.metrics})
    rows = [
        (
            str(entry.step),
            entry.time,
            f"{entry.bytes / 2**20:.1f}",
            *(cell(entry.metrics.get(name), "{:.4f}") for name in names),
            ", ".join(word for word in ("best", "newest") if getattr(entry, word)),
        )
        for entry in entries
    ]
    print_table(("step", "written", "MiB", *names, ""), rows, left=("written", ""))


def print_contents(contents: Contents) -> None:
    """Prints the contents of a checkpoint on standard output."""
    print(f"step {contents.step}")
    for name, value in contents.metadata.items():
        if name not in ("config", "window"):
            print(f"{name}: {json.dumps(value)}")
    if contents.metrics:
        print("metrics: " + ", ".join(f"{name} {value:.4f}" for name, value in sorted(contents.metrics.items())))
    rows = [
        (array.name, " x ".join(map(str, array.shape)), array.dtype, f"{array.bytes / 1024:,.1f}", array.written_from)
        for array in contents.arrays
    ]
    total = sum(array.bytes for array in contents.arrays) / 1024
    rows.append((f"{len(contents.arrays)} arrays", "", "", f"{total:,.1f}", ""))
    left = ("array", "shape", "type", "written from")
    print_table((*left[:3], "KiB", left[3]), rows, left=left)


def _leaves(tree: PyTree, part: str) -> Iterator[tuple[str, PyTree]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield f"{part}/{jax.tree_util.keystr(path, simple=True, separator='/')}", leaf


def _written_from(leaf: object) -> str:
    """Returns the sharding of an array on disk as text; empty if Orbax did not record it."""
    noted = getattr(leaf, "sharding_metadata", None)
    shape, spec = getattr(noted, "shape", None), getattr(noted, "partition_spec", None)
    if shape is None or spec is None:
        return "one device" if noted is not None else ""
    split = [str(axis) for axis in spec if axis is not None]
    return f"{' x '.join(map(str, shape))}, " + (f"split along {', '.join(split)}" if split else "copies")


def _time(nanoseconds: int | None) -> str:
    if nanoseconds is None:
        return ""
    return datetime.datetime.fromtimestamp(nanoseconds / 1e9, datetime.UTC).isoformat(timespec="seconds")
