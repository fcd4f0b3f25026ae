"""What a run would need on devices that are not here: the true train step, compiled ahead of time.

For TPU slices by libtpu's compiler, which needs no TPU; for virtual devices by XLA's for CPUs.
"""

import contextlib
import dataclasses
import importlib.metadata
import math
import os
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sit_jax.analysis.chips import Chip, Topology
from sit_jax.analysis.flops import count_step_macs, fuller_token_counts, padding
from sit_jax.analysis.hlo import Collective, Traffic, read_traffic
from sit_jax.config import Config
from sit_jax.errors import ConfigError, UserError, one_line
from sit_jax.models.architecture import Architecture
from sit_jax.parallel import sharding
from sit_jax.training.step import abstract_state, abstract_teachers, make_train_spec, make_train_step

SECONDS_PER_DAY = 86400.0
# Compilations spent on the largest batch that fits; each takes minutes.
_TRIES = 3

_NO_CHIP = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
# The two cores of a v4 chip work as one device, as on a real slice; the later chips are described so by default.
_CHIP_CONFIG = {"v4": {"chip_config_name": "megacore"}}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device while a step runs.

    Attributes:
        arguments: State, teachers and the batch.
        temporaries: Activations, gradients and what else lives within a step.
        outputs: New arrays; the state is written over the old one and not counted twice.
        program: The compiled code.
        peak: The most at any moment.
        available: What the chip has; None for virtual devices.
    """

    arguments: int
    temporaries: int
    outputs: int
    program: int
    peak: int
    available: int | None


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least time that a step can take, by the chip's published peaks.

    Attributes:
        compute_s: The products alone.
        memory_s: Moving the operands and results of every kernel through the chip's memory.
        network_s: The collectives.
        binds: The largest of the three: `compute`, `memory` or `network`.
        step_s: That one; overlap is taken to be perfect.
        images_per_s: Over all devices.
        days: For the configuration's epochs, evaluation not counted; None where the number of examples is not known.
        chip_hours: Days times devices.
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
    """What `sit plan` says.

    Attributes:
        topology: The devices.
        devices: How many.
        mesh: Sizes of the axes.
        batch_size: Examples per step, over all devices.
        steps: Steps in all; None where the number of examples is not known.
        fits: Whether the compiler found room for the step.
        largest_batch: The largest batch found to fit in a few tries, where this one does not; None if none did.
        memory: None where it does not fit.
        needed_bytes: What the compiler asked for where it does not fit.
        flops: Of a step on each device, counted from the architectures: two per multiply-accumulate.
        padding: Fraction of the TPU's products that is padding, where token counts do not fill tiles of 8 by 128.
        fuller_token_counts: Kept tokens that leave rows of their tiles empty -> the nearest counts that fill them.
        memory_bytes: Moved between each device and its memory in a step.
        collectives: Of a step.
        bound: None for virtual devices and where it does not fit.
        compile_s: Seconds that compiling took here.
    """

    topology: str
    devices: int
    mesh: dict[str, int]
    batch_size: int
    steps: int | None
    fits: bool
    largest_batch: int | None
    memory: Memory | None
    needed_bytes: int | None
    flops: float
    padding: float | None
    fuller_token_counts: dict[int, tuple[int, ...]]
    memory_bytes: int | None
    collectives: tuple[Collective, ...]
    bound: Bound | None
    compile_s: float


class _TooLargeError(Exception):
    """The compiler found no room; `needed` bytes of `available` if it said so."""

    def __init__(self, needed: int | None) -> None:
        super().__init__()
        self.needed = needed


def plan(config: Config, topology: Topology, examples: int | None = None, progress: Any = None) -> Plan:
    """Compiles a run's train step for a topology and reads its cost from the program.

    Args:
        config: The run's configuration, with its numbers of classes settled.
        topology: The devices.
        examples: Training examples, for the number of steps; None if not known.
        progress: Called with a line of text before each compilation.

    Raises:
        ConfigError: The mesh does not fit the devices, or batches or heads do not fit the mesh.
        UserError: The compiler for TPUs is not installed.
    """
    arch = config.model.architecture
    assert isinstance(arch, Architecture)
    devices = topology_devices(topology)
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_mesh(mesh, config)
    log = progress or (lambda _: None)
    log(f"compiling the step for {topology.name}, batch {config.batch_size}; this takes minutes for large models")
    steps = None
    if examples:
        steps = (config.epochs + config.optim.cooldown_epochs) * max(1, examples // config.batch_size)
    shared: dict[str, Any] = {
        "topology": topology.name,
        "devices": topology.devices,
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "steps": steps,
        "padding": padding(config) if topology.chip else None,
        "fuller_token_counts": fuller_token_counts(arch) if topology.chip else {},
        "flops": (2.0 * count_step_macs(config) + _cnn_teacher_flops(config)) * config.batch_size / topology.devices,
    }
    begun = time.monotonic()
    try:
        compiled = _compile(config, mesh)
    except _TooLargeError as error:
        largest = _largest_batch(config, mesh, topology.chip, error.needed, log)
        return Plan(
            **shared, fits=False, largest_batch=largest, memory=None, needed_bytes=error.needed, memory_bytes=None,
            collectives=(), bound=None, compile_s=time.monotonic() - begun,
        )  # fmt: skip
    seconds = time.monotonic() - begun
    traffic = read_traffic(compiled.as_text(), topology.devices)
    bound = _bound(topology, config, shared["flops"], traffic, steps) if topology.chip else None
    return Plan(
        **shared, fits=True, largest_batch=None, memory=_memory(compiled, topology.chip), needed_bytes=None,
        memory_bytes=traffic.memory_bytes, collectives=traffic.collectives, bound=bound, compile_s=seconds,
    )  # fmt: skip


def topology_devices(topology: Topology) -> list[Any]:
    """The devices of a topology.

    Raises:
        UserError: libtpu is not installed, or knows no such slice.
        ConfigError: There are not so many virtual devices.
    """
    if topology.chip is None:
        devices = jax.devices("cpu")
        if len(devices) < topology.devices:
            raise ConfigError("--topology", f"{topology.name}, but JAX was started with {len(devices)} CPU devices")
        return list(devices[: topology.devices])
    # Compiling needs no chip, so several processes of a machine may do it at a time, and nothing need be looked for.
    for name, value in _NO_CHIP.items():
        os.environ.setdefault(name, value)
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f'--topology: {topology.name} needs the TPU compiler: pip install "{libtpu_requirement()}"'
        ) from None
    from jax.experimental import topologies

    try:
        options = _CHIP_CONFIG.get(topology.chip.name, {})
        slice_ = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
        return list(slice_.devices)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        reason = one_line(error, 200)
        raise UserError(f"--topology: there is no slice {topology.name}: {reason}") from None


def libtpu_requirement() -> str:
    """What the installed JAX requires of libtpu, as pip takes it."""
    wanted = [r for r in importlib.metadata.requires("jax") or [] if r.startswith("libtpu")]
    return wanted[0].partition(";")[0].strip() if wanted else "libtpu"


def _compile(config: Config, mesh: Mesh) -> Any:
    spec = make_train_spec(config, steps_per_epoch=1000)
    state, batch, teachers = abstract_arguments(config, mesh)
    lowered = make_train_step(spec, mesh).lower(state, batch, teachers)  # type: ignore[attr-defined]
    try:
        with _without_cache():
            return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise _TooLargeError(_needed(str(error), _fixed(state, teachers))) from None


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Keeps programs for devices that are not here out of JAX's cache on disk: it could not load them again."""
    from jax.experimental.compilation_cache import compilation_cache

    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # It asks for the setting once.
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def _cnn_teacher_flops(config: Config) -> float:
    """FLOPs of the convolutional teacher's forward pass on one image; it has no loops, so the compiler can count."""
    spec = make_train_spec(config, steps_per_epoch=1000)
    if spec.cnn_teacher is None:
        return 0.0
    arch = config.teachers["cnn_teacher"].model.architecture
    images = jax.ShapeDtypeStruct((1, arch.image_size, arch.image_size, arch.in_channels), np.float32)
    analysis = jax.jit(spec.cnn_teacher.apply).lower(abstract_teachers(spec)["cnn_teacher"], images).cost_analysis()
    assert analysis is not None
    return float(analysis["flops"])


def _fixed(state: Any, teachers: Any) -> int:
    """Bytes on each device that do not grow with the batch."""
    leaves = jax.tree.leaves((state, teachers))
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def abstract_arguments(config: Config, mesh: Mesh) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """State, batch and teachers of a run's train step as shapes with shardings."""
    spec = make_train_spec(config, steps_per_epoch=1000)
    teachers = {name: sharding.place_abstract(mesh, x) for name, x in abstract_teachers(spec).items()}
    arch, count = config.model.architecture, config.batch_size
    fields: dict[str, tuple[tuple[int, ...], Any]] = {
        "image": ((count, arch.image_size, arch.image_size, arch.in_channels), np.uint8),
        "label": ((count,), np.int32),
    }
    if config.data.on_decode_error == "skip":
        fields["skipped"] = ((count,), np.int32)
    if config.loss.token_label > 0:
        assert isinstance(arch, Architecture)
        maps = (count, arch.grid_size, arch.grid_size, 5)
        fields |= {"map_classes": (maps, np.int32), "map_values": (maps, np.float32)}
        fields |= {"crop": ((count, 4), np.float32), "flipped": ((count,), np.bool_)}
    split = sharding.batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=split) for name, (shape, dtype) in fields.items()}
    return sharding.place_abstract(mesh, abstract_state(spec)), batch, teachers


def _memory(compiled: Any, chip: Chip | None) -> Memory:
    stats = compiled.memory_analysis()
    arguments, temporaries = int(stats.argument_size_in_bytes), int(stats.temp_size_in_bytes)
    outputs = int(stats.output_size_in_bytes - stats.alias_size_in_bytes)
    program = int(stats.generated_code_size_in_bytes)
    # Where the backend reports a peak it is of arguments and temporaries alone; code lies beside them.
    peak = arguments + temporaries + outputs + program
    return Memory(arguments, temporaries, outputs, program, peak, chip.memory_bytes if chip else None)


def _bound(topology: Topology, config: Config, flops: float, traffic: Traffic, steps: int | None) -> Bound:
    chip = topology.chip
    assert chip is not None
    times = {
        "compute": flops / chip.flops,
        "memory": traffic.memory_bytes / chip.memory_rate,
        "network": sum(collective.sent for collective in traffic.collectives) / chip.link_rate,
    }
    binds = max(times, key=lambda name: times[name])
    step = times[binds]
    days = steps * step / SECONDS_PER_DAY if steps else None
    return Bound(
        compute_s=times["compute"],
        memory_s=times["memory"],
        network_s=times["network"],
        binds=binds,
        step_s=step,
        images_per_s=config.batch_size / step,
        days=days,
        chip_hours=None if days is None else days * 24 * topology.devices,
    )


def _needed(message: str, fixed: int) -> int | None:
    """The bytes that the compiler asked for, in either of its wordings; the second leaves arguments (`fixed`) out."""
    amount = r"([\d.]+)([KMGT])"
    match = re.search(rf"Used {amount} of", message)
    temporaries = re.search(rf"required for HLO temporaries \({amount}\)", message)
    found = match or temporaries
    if found is None:
        return None
    size = int(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]])
    return size if match else size + fixed


def _largest_batch(config: Config, mesh: Mesh, chip: Chip | None, needed: int | None, log: Any) -> int | None:
    """A batch whose step compiles, and nearly the largest: guessed from what the compiler asked for, and tried."""
    unit = mesh.shape["data"] * mesh.shape["fsdp"] * config.optim.accumulate_steps
    per_unit = config.batch_size // unit
    state, _, teachers = abstract_arguments(config, mesh)
    fixed, guess = _fixed(state, teachers), per_unit // 2
    if needed and chip and needed > fixed:
        guess = min(per_unit - 1, int(per_unit * (chip.memory_bytes - fixed) / (needed - fixed)))
    fits, fails = 0, per_unit
    # The step's memory is nearly linear in the batch, so the first guess is near, and a few tries close the bounds.
    for _ in range(_TRIES):
        if fails - fits <= max(1, fails // 20):
            break
        guess = min(max(guess, fits + 1), fails - 1)
        log(f"does not fit; trying batch {guess * unit}")
        try:
            _compile(dataclasses.replace(config, batch_size=guess * unit), mesh)
            fits, guess = guess, max(guess + 1, int(guess * 1.05))
        except _TooLargeError:
            fails, guess = guess, min(guess - 1, int(guess * 0.95))
    return fits * unit or None
