"""Flags with which XLA for CPUs compiles in a third of the time; what it compiles is slower, which tests do not feel.

Tests check what is computed, and most of their time was XLA's optimizer at work on programs that run once. What users
run, optimized, is compiled by the tests of the digits demo and of benchmarks/.
"""

import importlib.metadata

# XLA ends a process at a flag that it does not know, so other versions than the pinned ones go without.
_KNOWN = importlib.metadata.version("jaxlib").startswith("0.10.")
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false" if _KNOWN else ""


def devices(count: int) -> str:
    """The flag for so many virtual devices."""
    return f"--xla_force_host_platform_device_count={count}"
