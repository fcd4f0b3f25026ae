"""Published specifications of chips, and the slices that TPU topology names describe."""

import dataclasses
import math

from sit_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip, with figures from Google's Cloud TPU documentation (read November 2026).

    `name` is that of the generation in topologies, `flops` the peak of bfloat16 per second. The rates of the
    high-bandwidth memory, and to the neighbours over all links, are in bytes/s.
    """

    name: str
    flops: float
    memory_bytes: int
    memory_rate: float
    link_rate: float


_GIB = 2**30
# Interchip bandwidths are published in Gbit/s per chip: 1600, 2400, 4800, 3584.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * _GIB, 1228e9, 300e9),
        Chip("v5e", 197e12, 16 * _GIB, 819e9, 200e9),
        Chip("v5p", 459e12, 95 * _GIB, 2765e9, 600e9),
        Chip("v6e", 918e12, 32 * _GIB, 1640e9, 448e9),
    )
}

# JAX's device kind -> peak bfloat16 FLOP/s without sparsity, from the makers' data sheets (read November 2026).
PUBLISHED_FLOPS = {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU v6e": CHIPS["v6e"].flops,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to plan for: `v5e:16x16`, or `cpu:8` for virtual devices of this machine, which have no chip."""

    name: str
    chip: Chip | None
    devices: int


def parse_topology(name: str) -> Topology:
    """Parses a topology's name; raises a ConfigError if it is not of the form CHIP:SIZES, or names no such chip."""
    kind, _, sizes = name.partition(":")
    numbers = sizes.split("x")
    if not all(number.isdigit() and int(number) > 0 for number in numbers):
        raise ConfigError("--topology", f"{name!r} is not of the form v5e:4x4, v4:2x2x4 or cpu:8")
    devices = math.prod(map(int, numbers))
    if kind == "cpu":
        if len(numbers) > 1 or devices > 4096:
            raise ConfigError("--topology", f"{name!r}: virtual devices are one number, such as cpu:8, up to 4096")
        return Topology(name, None, devices)
    if kind not in CHIPS:
        raise ConfigError("--topology", f"there is no chip {kind!r}; there are {', '.join(CHIPS)}, and cpu")
    dimensions = 2 if kind in ("v5e", "v6e") else 3
    if len(numbers) != dimensions:
        example = "2x4" if dimensions == 2 else "2x2x4"
        raise ConfigError("--topology", f"slices of {kind} have {dimensions} dimensions, such as {kind}:{example}")
    return Topology(name, CHIPS[kind], devices)
