"""Benchmarking: models are timed in turns, so that other load on the machine slows all of them equally.

The protocol is documented in docs/benchmarks.md. `sit benchmark` and a run's summary use this module for all timings.
"""

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import PyTree

from sit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Timed:
    """A computation to time, which may be asynchronous; each call uses the next input buffer, on its device."""

    run: Callable[[PyTree], PyTree]
    buffers: Sequence[PyTree]


@dataclasses.dataclass(frozen=True)
class Times:
    """Timings of one computation.

    `latencies` are the seconds from the start of each call to its result. `turns` are the seconds per call of each turn
    whose calls are started without waiting, except at the end.
    """

    latencies: list[float]
    turns: list[float]

    def latency(self, fraction: float = 0.5) -> float:
        """Returns the latency in seconds that this fraction of the calls does not exceed."""
        return float(np.quantile(self.latencies, fraction))

    @property
    def seconds(self) -> float:
        """Seconds per call, the median over the turns."""
        return statistics.median(self.turns)

    def speed_over(self, other: "Times") -> float:
        """Returns the speed-up over another computation: the median over the rounds of the ratio of their turns."""
        return statistics.median(b / a for a, b in zip(self.turns, other.turns, strict=True))


def time_interleaved(computations: Mapping[str, Timed], rounds: int = 9, seconds: float = 0.1) -> dict[str, Times]:
    """Times compiled computations in turns, A B A B ..., after three warm-up calls of each.

    A turn takes about `seconds`: in one half each call is waited for, in the other only the last one.
    """
    calls = {name: max(1, math.ceil(seconds / 2 / _each(timed, 3)[-1])) for name, timed in computations.items()}
    times = {name: Times([], []) for name in computations}
    for _ in range(rounds):
        for name, timed in computations.items():
            times[name].latencies.extend(_each(timed, calls[name]))
            times[name].turns.append(_all(timed, calls[name]))
    return times


def product_rate(dtype: str) -> float:
    """Returns the measured FLOP/s of large matrix products on the first device."""
    on_cpu = jax.default_backend() == "cpu"
    side = 1024 if on_cpu else 8192
    draws = [np.random.default_rng(seed).standard_normal((side, side), np.float32) for seed in range(2)]
    factors = [jax.device_put(jax.numpy.asarray(x, dtype)) for x in draws]
    # XLA for CPUs multiplies bfloat16 in bfloat16 if the result is float32, as in the models; otherwise in float32.
    result = jax.numpy.float32 if on_cpu else None
    multiply = jax.jit(lambda a, b: jax.numpy.dot(a, b, preferred_element_type=result)).lower(*factors).compile()
    timed = Timed(lambda pair: multiply(*pair), [factors, factors[::-1]])
    return 2 * side**3 / min(time_interleaved({"products": timed}, rounds=5)["products"].turns)


def _each(timed: Timed, calls: int) -> list[float]:
    found = []
    for index in range(calls):
        begun = time.perf_counter()
        jax.block_until_ready(timed.run(timed.buffers[index % len(timed.buffers)]))
        found.append(time.perf_counter() - begun)
    return found


def _all(timed: Timed, calls: int) -> float:
    """Returns the seconds per call."""
    begun = time.perf_counter()
    for index in range(calls):
        result = timed.run(timed.buffers[index % len(timed.buffers)])
    jax.block_until_ready(result)
    return (time.perf_counter() - begun) / calls


@contextlib.contextmanager
def memory_errors(option: str, batch: int, device: str) -> Iterator[None]:
    """Turns the error of a batch that does not fit a device's memory into a UserError that names the option."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and not isinstance(error, MemoryError):
            raise
        raise UserError(f"{option}: {batch} does not fit the memory of {device}") from None
