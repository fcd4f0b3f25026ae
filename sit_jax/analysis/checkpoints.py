"""Lists, inspects and verifies checkpoints. A single CPU can open checkpoints of any mesh."""

import contextlib
import datetime
import json
import math
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

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

    Attributes:
        step: Number of optimizer steps done.
        time: When its writing was completed, ISO 8601 in UTC.
        metrics: Metrics of the evaluation of its weights; empty if there is none.
        best: Whether it is the best by accuracy.
        newest: Whether a resumed run starts from it.
        bytes: Size on disk.
    """

    step: int
    time: str
    metrics: dict[str, float]
    best: bool
    newest: bool
    bytes: int


class ArrayEntry(NamedTuple):
    """One array of a checkpoint.

    Attributes:
        name: Its path, starting with the item: `model/params/blocks_0/attn/qkv/kernel`.
        shape: Its shape.
        dtype: Name of its type.
        written_from: Its sharding on the devices that wrote it, if Orbax recorded it.
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
    """The contents of a checkpoint.

    Attributes:
        step: Number of optimizer steps done.
        metadata: Its metadata: `config`, `data`, `mesh`, `processes`, `devices`, `versions`, and the metrics of the
            steps since the last line that was written (`window`); empty in older checkpoints.
        metrics: Metrics of the evaluation of its weights.
        arrays: All arrays.
    """

    step: int
    metadata: dict[str, Any]
    metrics: dict[str, float]
    arrays: tuple[ArrayEntry, ...]


def list_checkpoints(folder: pathlib.Path) -> list[Entry]:
    """Returns the complete checkpoints of a run, oldest first.

    Raises:
        RunError: There is no checkpoint.
    """
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
    """Returns the contents of a checkpoint, without reading its arrays.

    Args:
        folder: The run directory.
        step: Step of the checkpoint; the newest if None.

    Raises:
        RunError: There is no such checkpoint, or its metadata is damaged.
    """
    with silent_threads(), open_checkpoints(folder, step) as checkpointer:
        chosen = checkpointer.latest.step if step is None else step
        metrics = next(dict(c.metrics or {}) for c in checkpointer.checkpoints if c.step == chosen)
        return _contents(checkpointer, chosen, metrics, folder)


def _contents(checkpointer: Any, step: int, metrics: dict[str, float], folder: pathlib.Path) -> Contents:
    try:
        described = checkpointer.checkpointables_metadata(step)
        parts = {name: described.metadata[name] for name in _PARTS if name in described.metadata}
        arrays = tuple(
            ArrayEntry(name, tuple(leaf.shape), np.dtype(leaf.dtype).name, _written_from(leaf))
            for part, tree in parts.items()
            for name, leaf in _leaves(tree, part)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # A damaged file raises many types.
        raise RunError(f"checkpoint {step} in {folder} is damaged: {one_line(error)}") from None
    if not arrays:
        raise RunError(f"checkpoint {step} in {folder} is damaged: it describes no array")
    return Contents(step, dict(described.custom_metadata or {}), metrics, arrays)


class Verdict(NamedTuple):
    """Result of verifying a checkpoint.

    Attributes:
        step: Step of the checkpoint.
        arrays: Number of arrays read.
        bytes: Their size in memory.
        problems: Problems, one line each; empty for a valid checkpoint.
    """

    step: int
    arrays: int
    bytes: int
    problems: tuple[str, ...]


def verify(folder: pathlib.Path, step: int | None = None) -> Verdict:
    """Reads every array of a checkpoint and checks that it is readable, finite, and of the configured shape.

    Memory use is about half a GiB, or the size of the largest array.

    Args:
        folder: The run directory.
        step: Step of the checkpoint; the newest if None.

    Raises:
        RunError: There is no such checkpoint, or its metadata is damaged.
    """
    with silent_threads():
        return _verify(folder, step)


def _verify(folder: pathlib.Path, step: int | None) -> Verdict:
    contents = read_contents(folder, step)
    problems = list(_wrong_shapes(folder, contents))
    problems += [f"metrics: {name} is {x}" for name, x in contents.metrics.items() if not math.isfinite(x)]
    sizes = {array.name: array.bytes for array in contents.arrays}
    done = 0
    with (
        open_checkpoints(folder, contents.step) as checkpointer,
        tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar,
    ):
        described = checkpointer.checkpointables_metadata(contents.step).metadata
        for part in [name for name in _PARTS if name in described]:
            names = [name for name, _ in _leaves(described[part], part)]
            for group in _groups([sizes[name] for name in names]):
                found = _read(checkpointer, contents.step, part, described[part], group)
                problems += [f"{names[index]}: {problem}" for index, problem in found.items()]
                bar.update(sum(sizes[names[index]] for index in group))
                done += len(group)
    return Verdict(contents.step, done, sum(sizes.values()), tuple(problems))


def _groups(sizes: list[int]) -> Iterator[list[int]]:
    """Yields the indices in order, in groups of at most `_READ_AT_ONCE` bytes or of one array."""
    group: list[int] = []
    for index, size in enumerate(sizes):
        if group and sum(sizes[i] for i in group) + size > _READ_AT_ONCE:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _read(checkpointer: Any, step: int, part: str, described: Any, group: list[int]) -> dict[int, str]:
    """Returns the problems of arrays of an item, by their index."""
    device = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    leaves, structure = jax.tree.flatten(described)
    wanted: list[Any] = [ocp.PLACEHOLDER] * len(leaves)
    for index in group:
        wanted[index] = jax.ShapeDtypeStruct(leaves[index].shape, leaves[index].dtype, sharding=device)
    try:
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
    # The optimizer's structure has other names on disk, so only the sizes of its arrays are compared.
    expected = {
        name: tuple(leaf.shape)
        for part, tree in checkpoint_parts(state).items()
        for name, leaf in _leaves(tree, part)
        if not name.startswith("training/opt_state")
    }
    moments = [sorted((tuple(x.shape), str(x.dtype)) for x in jax.tree.leaves(state.opt_state))]
    moments.append(sorted((a.shape, a.dtype) for a in contents.arrays if a.name.startswith("training/opt_state")))
    if moments[0] != moments[1]:
        yield "training/opt_state: its arrays are not those of the configuration's optimizer"
    there = {a.name: a.shape for a in contents.arrays if not a.name.startswith("training/opt_state")}
    for name in sorted(expected.keys() | there.keys()):
        if name not in there:
            yield f"{name}: is missing"
        elif name not in expected:
            yield f"{name}: is not in the configuration's model"
        elif there[name] != expected[name]:
            yield f"{name}: is {there[name]}, the configuration says {expected[name]}"


def describe_problems(verdict: Verdict) -> str:
    """Returns a verdict's problems in one line: the first few, and the number of others."""
    shown = "; ".join(verdict.problems[:_FEW])
    more = len(verdict.problems) - _FEW
    return shown + (f"; and {more} more" if more > 0 else "")


def print_list(entries: list[Entry]) -> None:
    """Prints checkpoints as a table on standard output."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("step", "written", "MiB", *sorted({name for e in entries for name in e.metrics}), ""):
        table.add_column(heading, justify="left" if heading in ("written", "") else "right", no_wrap=True)
    names = sorted({name for e in entries for name in e.metrics})
    for e in entries:
        marks = [word for word, applies in (("best", e.best), ("newest", e.newest)) if applies]
        scores = [f"{e.metrics[name]:.4f}" if name in e.metrics else "" for name in names]
        table.add_row(str(e.step), e.time, f"{e.bytes / 2**20:.1f}", *scores, ", ".join(marks))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def print_contents(contents: Contents) -> None:
    """Prints the contents of a checkpoint on standard output."""
    print(f"step {contents.step}")
    for name, value in contents.metadata.items():
        if name not in ("config", "window"):
            print(f"{name}: {json.dumps(value)}")
    if contents.metrics:
        print("metrics: " + ", ".join(f"{name} {value:.4f}" for name, value in sorted(contents.metrics.items())))
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("array", "shape", "type", "KiB", "written from"):
        table.add_column(heading, justify="right" if heading == "KiB" else "left", overflow="fold")
    for array in contents.arrays:
        shape = " x ".join(map(str, array.shape))
        table.add_row(array.name, shape, array.dtype, f"{array.bytes / 1024:,.1f}", array.written_from)
    total = sum(array.bytes for array in contents.arrays) / 1024
    table.add_row(f"{len(contents.arrays)} arrays", "", "", f"{total:,.1f}", "")
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _leaves(tree: Any, part: str) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield "/".join([part, *(jax.tree_util.keystr((key,), simple=True) for key in path)]), leaf


def _written_from(leaf: Any) -> str:
    noted = getattr(leaf, "sharding_metadata", None)
    shape, spec = getattr(noted, "shape", None), getattr(noted, "partition_spec", None)
    if shape is None or spec is None:
        return "one device" if noted is not None else ""
    split = [str(axis) for axis in spec if axis is not None]
    return (
        f"{' x '.join(map(str, shape))}, split along {', '.join(split)}"
        if split
        else f"{' x '.join(map(str, shape))}, copies"
    )


def _time(nanoseconds: int | None) -> str:
    if nanoseconds is None:
        return ""
    return datetime.datetime.fromtimestamp(nanoseconds / 1e9, datetime.UTC).isoformat(timespec="seconds")
