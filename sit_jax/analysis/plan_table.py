"""`sit plan` and `sit train --print_sharding`: plans a configuration and prints tables."""

import math
import sys

import jax

from sit_jax.analysis.chips import Topology
from sit_jax.analysis.plan import Plan, plan
from sit_jax.analysis.table import cell, print_table
from sit_jax.config import Config
from sit_jax.data.registry import open_source
from sit_jax.errors import ConfigError, UserError
from sit_jax.models.architecture import Architecture
from sit_jax.models.trees import path_names
from sit_jax.parallel import sharding
from sit_jax.training.elastic import schedule_name
from sit_jax.training.loop import resolve_num_classes
from sit_jax.training.step import abstract_state, abstract_teachers, make_train_spec

# Allows planning a run on ImageNet without the data set.
_EXAMPLES = {"imagenet2012": 1_281_167}
_CLASSES = {"imagenet2012": 1000}
_GIB = 2**30


def make_plan(config: Config, topology: Topology, examples: int | None) -> Plan:
    """Plans a run; reports slow operations and assumptions on standard error. Without `examples`, the data is read.

    Raises a UserError if the configuration cannot be planned for the topology.
    """
    if not isinstance(config.model.architecture, Architecture):
        raise ConfigError("model", "only vision transformers can be planned")
    for teacher in config.teachers.values():
        if not teacher.run:
            _log("the teacher's own training is not included: plan it with its own config")
    classes = _CLASSES.get(config.data.name)
    if examples is None or (classes is None and config.needs_classes):
        try:
            source = open_source(config.data, config.data.train_split)
            examples, classes = examples or len(source), len(source.class_names)
        except UserError as error:
            examples = examples or _EXAMPLES.get(config.data.name)
            if examples is None:
                _log(f"no days and hours without the number of examples, see --examples ({error})")
    config = config.with_classes(classes or 1000)
    return plan(config, topology, examples, _log)


def _log(text: str) -> None:
    print(f"sit plan: {text}", file=sys.stderr, flush=True)


def print_plan(result: Plan) -> None:
    """Prints a plan as tables on standard output."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in result.mesh.items())
    print(f"{result.topology}: {result.devices} devices ({mesh}), batch {result.batch_size}")
    if not result.fits:
        needed = f": the step needs {result.needed_bytes / _GIB:.2f} GiB on each chip" if result.needed_bytes else ""
        advice = "model.remat=True, optim.accumulate_steps and mesh.fsdp save memory"
        largest = f"the largest batch that fits is {result.largest_batch}" if result.largest_batch else "no batch fits"
        print(f"does not fit{needed}; {largest}; {advice}")
        return
    print_table(("quantity", "value", "note"), _rows(result), left=("quantity", "note"), show_header=False)


def _rows(result: Plan) -> list[tuple[str, str, str]]:
    memory, bound = result.memory, result.bound
    assert memory is not None
    assert result.memory_bytes is not None
    times = (bound.compute_s, bound.memory_s, bound.network_s) if bound else (None, None, None)
    compute, transfers, network = (cell(x and 1e3 * x, "at least {:.1f} ms") for x in times)
    available = f"of {memory.available / _GIB:.0f}" if memory.available else ""
    rows: list[tuple[str, str, str]] = []
    if result.token_schedules:
        names = ", ".join(map(schedule_name, result.token_schedules))
        rows.append(("token schedules of the step", names, "the most expensive step; all values are its"))
    rows += [
        ("memory per device, GiB", f"{memory.peak / _GIB:.2f}", available),
        ("  arguments", f"{memory.arguments / _GIB:.2f}", "state, teachers, batch"),
        ("  temporaries", f"{memory.temporaries / _GIB:.2f}", "activations, gradients"),
        ("  outputs and program", f"{(memory.outputs + memory.program) / _GIB:.2f}", ""),
        ("per device and step", "", ""),
        ("  TFLOP", f"{result.flops / 1e12:.2f}", compute),
    ]
    if result.padding is not None:
        counts = [f"{n}: {' or '.join(map(str, better))}" for n, better in result.fuller_token_counts.items() if better]
        note = f"token counts that fill tiles: {'; '.join(counts)}" if counts else ""
        rows.append(("  tile padding in products, %", f"{100 * result.padding:.0f}", note))
    rows.append(("  memory traffic, GB", f"{result.memory_bytes / 1e9:.1f}", transfers))
    for c in result.collectives:
        rows.append((f"  {c.kind} over {c.group}, MB", f"{c.bytes / 1e6:.1f}", f"{c.runs} of them"))
    if bound is None:
        return rows
    rows += [
        ("  collectives", "", network),
        ("step, lower bound, ms", f"{1e3 * bound.step_s:.1f}", f"bound by {bound.binds}"),
        ("images/s, upper bound", f"{bound.images_per_s:,.0f}", ""),
    ]
    if bound.days is not None and bound.chip_hours is not None:
        rows += [
            ("days, lower bound", f"{bound.days:.2f}", f"{result.steps:,} steps, evaluation not counted"),
            ("chip-hours, lower bound", f"{bound.chip_hours:,.0f}", ""),
        ]
    return rows


def print_sharding(config: Config, quiet: bool = False) -> None:
    """Prints the sharding of every array of a run's training state and of its teachers; only validates if `quiet`.

    Raises a ConfigError if the mesh does not match the devices, or a batch or the heads do not divide by its axes.
    """
    config = resolve_num_classes(config)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_mesh(mesh, config)
    if quiet:
        return
    spec, total, rows = make_train_spec(config, steps_per_epoch=1), 0.0, []
    everything = {"state": abstract_state(spec), "teachers": abstract_teachers(spec)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(sharding.place_abstract(mesh, everything)):
        mib = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize / 2**20
        total += mib
        split = " x ".join(str(axis or "-") for axis in leaf.sharding.spec) or "-"
        rows.append(("/".join(path_names(path)), " x ".join(map(str, leaf.shape)), split, f"{mib:.3f}"))
    title = "Mesh: " + ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    left = ("array", "shape", "split along")
    print_table((*left, "MiB per device"), [*rows, ("all", "", "", f"{total:.3f}")], left=left, title=title)
