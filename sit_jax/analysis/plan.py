"""Plans a run for devices that are not available: compiles the actual train step ahead of time.

TPU slices use the compiler of libtpu, which needs no TPU; virtual devices use XLA's for CPUs.
"""

import dataclasses
import importlib.metadata
import math
import os
import re
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from sit_jax.analysis.chips import Chip, Topology
from sit_jax.analysis.compilation import without_cache
from sit_jax.analysis.flops import count_step_macs, fuller_token_counts, padding
from sit_jax.analysis.hlo import Collective, Traffic, read_traffic
from sit_jax.config import Config
from sit_jax.errors import ConfigError, UserError, one_line
from sit_jax.models.architecture import Architecture
from sit_jax.models.trees import Variables
from sit_jax.parallel import sharding
from sit_jax.training.elastic import Schedule, largest_step
from sit_jax.training.state import TrainState
from sit_jax.training.step import abstract_state, abstract_teachers, make_train_spec, make_train_step

# Number of compilations to find the largest batch that fits; each takes minutes.
_TRIES = 3

_NO_CHIP = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
# The two cores of a v4 chip are one device, as on a real slice; later chips are described so by default.
_MEGACORE: dict[str, object] = {"chip_config_name": "megacore"}
# Hosts have four chips by default; a slice of one chip is a part of a host.
_ONE_CHIP: dict[str, object] = {"chips_per_host_bounds": (1, 1, 1)}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of memory on each device during a step.

    `arguments` are state, teachers and batch; `outputs` leave out the donated state; `program` is the compiled code;
    `available` is the chip's memory, None for virtual devices.
    """

    arguments: int
    temporaries: int
    outputs: int
    program: int
    peak: int
    available: int | None


@dataclasses.dataclass(frozen=True)
class Bound:
    """Lower bound of the step time, from the chip's published peak rates.

    The times are those of the matrix products, of all kernels' transfers from and to the chip's memory, and of the
    collectives; `binds` (`compute`, `memory` or `network`) names the largest, which is `step_s`, if they overlap
    perfectly. `images_per_s` is over all devices. `days` are those of the configuration's epochs without evaluation,
    `chip_hours` those of all devices; None if the number of examples is not known.
    """

    compute_s: float
    memory_s: float
    network_s: float
    binds: str
    step_s: float
    images_per_s: float
    days: float | None
    chip_hours: float | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Result of `sit plan`.

    `steps` is the total number, None if the number of examples is not known. `flops` (two per multiply-accumulate,
    counted from the architectures) and `memory_bytes` (transferred from and to the memory) are per device and step.
    `padding` is the fraction of the products on TPUs that fills tiles, `fuller_token_counts` as in analysis/flops.py.
    `token_schedules` are those of an elastic student's planned step, the most expensive one; all values are for it, the
    days too. If the step does not fit, `needed_bytes` is what the compiler requested, `largest_batch` the largest batch
    found to fit in a few tries, and the fields from `memory` on are empty; virtual devices have no `bound`.
    """

    topology: str
    devices: int
    mesh: dict[str, int]
    batch_size: int
    steps: int | None
    flops: float
    padding: float | None
    fuller_token_counts: dict[int, tuple[int, ...]]
    token_schedules: tuple[Schedule, ...] = ()
    fits: bool = False
    largest_batch: int | None = None
    needed_bytes: int | None = None
    memory: Memory | None = None
    memory_bytes: int | None = None
    collectives: tuple[Collective, ...] = ()
    bound: Bound | None = None
    compile_s: float = 0.0


class _TooLargeError(Exception):
    """The step does not fit; the arguments are `needed` and `fixed` as in `_largest_batch`."""


def plan(
    config: Config, topology: Topology, examples: int | None = None, log: Callable[[str], None] = lambda _: None
) -> Plan:
    """Compiles a run's train step for a topology and reads its cost from the compiled program.

    The numbers of classes are resolved in `config`; `log` is called before each compilation. Raises a ConfigError if
    the configuration does not match the devices, and a UserError if there is no compiler for them.
    """
    arch = config.model.architecture
    assert isinstance(arch, Architecture)
    mesh = sharding.make_mesh(config.mesh, topology_devices(topology))
    sharding.check_mesh(mesh, config)
    log(f"compiling the step for {topology.name}, batch {config.batch_size}; this takes minutes for large models")
    steps = None
    if examples:
        steps = (config.epochs + config.optim.cooldown_epochs) * max(1, examples // config.batch_size)
    flops = (2.0 * count_step_macs(config) + _cnn_teacher_flops(config)) * config.batch_size / topology.devices
    result = Plan(
        topology.name, topology.devices, dict(mesh.shape), config.batch_size, steps, flops,
        padding(config) if topology.chip else None, fuller_token_counts(arch) if topology.chip else {},
        largest_step(config),
    )  # fmt: skip
    begun = time.monotonic()
    try:
        compiled = compile_step(config, mesh)
    except _TooLargeError as error:
        needed, fixed = error.args
        largest = _largest_batch(config, mesh, topology.chip, needed, fixed, log)
        seconds = time.monotonic() - begun
        return dataclasses.replace(result, largest_batch=largest, needed_bytes=needed, compile_s=seconds)
    seconds = time.monotonic() - begun
    traffic = read_traffic(compiled.as_text() or "", topology.devices)
    bound = None
    if topology.chip is not None:
        bound = lower_bound(topology.chip, topology.devices, config.batch_size, flops, traffic, steps)
    return dataclasses.replace(
        result, fits=True, memory=_memory(compiled, topology.chip), memory_bytes=traffic.memory_bytes,
        collectives=traffic.collectives, bound=bound, compile_s=seconds,
    )  # fmt: skip


def libtpu_requirement() -> str:
    """Returns the requirement of the installed JAX for libtpu, in pip's syntax; the Makefile installs it."""
    wanted = next((x for x in importlib.metadata.requires("jax") or [] if x.startswith("libtpu")), "libtpu")
    return wanted.partition(";")[0].strip()


def topology_devices(topology: Topology) -> list[jax.Device]:
    """Returns the devices of a topology.

    Raises a UserError if libtpu is not installed or does not know the slice, a ConfigError for too few virtual devices.
    """
    if topology.chip is None:
        devices = jax.devices("cpu")
        if len(devices) < topology.devices:
            raise ConfigError("--topology", f"{topology.name}, but JAX was started with {len(devices)} CPU devices")
        return list(devices[: topology.devices])
    # Compiling needs no chip: several processes of a machine may compile at a time, and devices need not be detected.
    for name, value in _NO_CHIP.items():
        os.environ.setdefault(name, value)
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        command = f'pip install "{libtpu_requirement()}"'
        raise UserError(f"--topology: {topology.name} needs the TPU compiler: {command}") from None
    from jax.experimental import topologies

    try:
        options = (_MEGACORE if topology.chip.name == "v4" else {}) | (_ONE_CHIP if topology.devices == 1 else {})
        slice_ = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
        return list(slice_.devices)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        reason = one_line(error, 200)
        raise UserError(f"--topology: there is no slice {topology.name}: {reason}") from None


def compile_step(config: Config, mesh: Mesh) -> jax.stages.Compiled:
    """Compiles the train step of a run for a mesh, whose devices may be absent; of several, the most expensive one."""
    spec = make_train_spec(config, steps_per_epoch=1000)
    state, batch, teachers = abstract_arguments(config, mesh)
    lowered = make_train_step(spec, mesh, largest_step(config)).lower(state, batch, teachers)  # type: ignore[attr-defined]
    try:
        with without_cache():
            compiled: jax.stages.Compiled = lowered.compile()
            return compiled
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # The bytes on each device that do not depend on the batch size.
        leaves = jax.tree.leaves((state, teachers))
        fixed = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
        raise _TooLargeError(_requested_bytes(str(error), fixed), fixed) from None


def _cnn_teacher_flops(config: Config) -> float:
    """Returns the FLOPs of the CNN teacher's forward pass on one image, by the compiler, as it has no loops."""
    spec = make_train_spec(config, steps_per_epoch=1000)
    if spec.cnn_teacher is None:
        return 0.0
    arch = config.teachers["cnn_teacher"].model.architecture
    images = jax.ShapeDtypeStruct((1, *arch.image_shape, arch.in_channels), np.float32)
    analysis = jax.jit(spec.cnn_teacher.apply).lower(abstract_teachers(spec)["cnn_teacher"], images).cost_analysis()
    assert analysis is not None
    return float(analysis["flops"])


def abstract_arguments(
    config: Config, mesh: Mesh
) -> tuple[TrainState, dict[str, jax.ShapeDtypeStruct], dict[str, Variables]]:
    """Returns state, batch and teachers of a run's train step as shapes with shardings."""
    spec = make_train_spec(config, steps_per_epoch=1000)
    teachers = {name: sharding.place_abstract(mesh, x) for name, x in abstract_teachers(spec).items()}
    arch, count = config.model.architecture, config.batch_size
    fields: dict[str, tuple[tuple[int, ...], jax.typing.DTypeLike]] = {
        "image": ((count, *arch.image_shape, arch.in_channels), np.uint8),
        "label": ((count,), np.int32),
    }
    if config.data.on_decode_error == "skip":
        fields["skipped"] = ((count,), np.int32)
    if config.loss.token_label > 0:
        assert isinstance(arch, Architecture)
        maps = (count, *arch.grid, 5)
        fields |= {"map_classes": (maps, np.int32), "map_values": (maps, np.float32)}
        fields |= {"crop": ((count, 4), np.float32), "flipped": ((count,), np.bool_)}
    split = sharding.batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=split) for name, (shape, dtype) in fields.items()}
    return sharding.place_abstract(mesh, abstract_state(spec)), batch, teachers


def _memory(compiled: jax.stages.Compiled, chip: Chip | None) -> Memory:
    stats = compiled.memory_analysis()
    assert stats is not None
    arguments, temporaries = int(stats.argument_size_in_bytes), int(stats.temp_size_in_bytes)
    outputs = int(stats.output_size_in_bytes - stats.alias_size_in_bytes)
    program = int(stats.generated_code_size_in_bytes)
    # If the backend reports a peak, it includes arguments and temporaries only; the code is added.
    peak = arguments + temporaries + outputs + program
    return Memory(arguments, temporaries, outputs, program, peak, chip.memory_bytes if chip else None)


def lower_bound(chip: Chip, devices: int, batch_size: int, flops: float, traffic: Traffic, steps: int | None) -> Bound:
    """Returns the lower bound of the step time on a TPU slice; `flops` are per device and step."""
    network = sum(collective.sent for collective in traffic.collectives)
    compute_s, memory_s = flops / chip.flops, traffic.memory_bytes / chip.memory_rate
    network_s = network / chip.link_rate
    step, binds = max((compute_s, "compute"), (memory_s, "memory"), (network_s, "network"))
    hours = None if steps is None else steps * step / 3600
    days, chip_hours = (None, None) if hours is None else (hours / 24, hours * devices)
    return Bound(compute_s, memory_s, network_s, binds, step, batch_size / step, days, chip_hours)


def _requested_bytes(message: str, fixed: int) -> int | None:
    """Returns the bytes that the compiler requested, from either of its messages, or None.

    One of the messages counts only temporary values; `fixed` are the bytes of the others.
    """
    found = re.search(r"(Used |required for HLO temporaries \()([\d.]+)([KMGT])", message)
    if found is None:
        return None
    size = int(float(found[2]) * 1024 ** (1 + "KMGT".index(found[3])))
    return size if found[1] == "Used " else size + fixed


def _largest_batch(
    config: Config, mesh: Mesh, chip: Chip | None, needed: int | None, fixed: int, log: Callable[[str], None]
) -> int | None:
    """Finds a nearly maximal batch whose step compiles.

    The first estimate is by the `needed` bytes on each device that the compiler requested, None if it did not state
    them, and by those of them that do not depend on the batch size, `fixed`.
    """
    unit = mesh.shape["data"] * mesh.shape["fsdp"] * config.optim.accumulate_steps
    per_unit = config.batch_size // unit
    guess = per_unit // 2
    if needed and chip and needed > fixed:
        guess = min(per_unit - 1, int(per_unit * (chip.memory_bytes - fixed) / (needed - fixed)))
    fits, fails = 0, per_unit
    # Memory is nearly linear in the batch size, so the estimate is close and a few tries narrow the bounds.
    for _ in range(_TRIES):
        if fails - fits <= max(1, fails // 20):
            break
        guess = min(max(guess, fits + 1), fails - 1)
        log(f"does not fit; trying batch {guess * unit}")
        try:
            compile_step(dataclasses.replace(config, batch_size=guess * unit), mesh)
            fits, guess = guess, max(guess + 1, int(guess * 1.05))
        except _TooLargeError:
            fails, guess = guess, min(guess - 1, int(guess * 0.95))
    return fits * unit or None
