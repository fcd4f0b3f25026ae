"""How fast models run here: measured side by side, so that a busy machine slows all of them alike.

The protocol is written down in docs/benchmarks.md; every figure of `sit benchmark` and of a run's report is made here.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

Forward = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Timed:
    """What is timed.

    Attributes:
        run: Starts the computation on an input buffer and returns its result, which may be still on its way.
        buffers: Inputs that lie where the computation wants them; each call takes the next one.
    """

    run: Forward
    buffers: Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Times:
    """The times of one contender.

    Attributes:
        latencies: Seconds from the start of a call to its result, of every call.
        turns: Seconds per call of each turn whose calls are started one after the other and waited for at its end.
    """

    latencies: list[float]
    turns: list[float]

    def latency(self, share: float = 0.5) -> float:
        """The latency in seconds that this share of the calls does not exceed."""
        return float(np.quantile(self.latencies, share))

    @property
    def seconds(self) -> float:
        """Seconds per call, the median turn."""
        return statistics.median(self.turns)

    def speed_over(self, other: "Times") -> float:
        """How many times faster than another: the median over the rounds, each turn beside the other's."""
        return statistics.median(b / a for a, b in zip(self.turns, other.turns, strict=True))


def time_interleaved(contenders: Mapping[str, Timed], rounds: int = 9, seconds: float = 0.1) -> dict[str, Times]:
    """Times contenders in turns, A B A B ..., after three calls of each to warm up.

    Args:
        contenders: Name -> what is timed; compiled already.
        rounds: Turns of each.
        seconds: A turn lasts about so long: one half waiting for every call, the other for the last one.
    """
    calls = {}
    for name, timed in contenders.items():
        jax.block_until_ready(timed.run(timed.buffers[0]))
        once = _each(timed, 2)[-1]
        calls[name] = max(1, math.ceil(seconds / 2 / once))
    times = {name: Times([], []) for name in contenders}
    for _ in range(rounds):
        for name, timed in contenders.items():
            times[name].latencies.extend(_each(timed, calls[name]))
            times[name].turns.append(_all(timed, calls[name]))
    return times


def measure_throughput(
    forwards: Mapping[str, Forward], images: np.ndarray, rounds: int = 15, min_seconds: float = 0.05
) -> dict[str, float]:
    """Images per second of each model on the same batch; see `time_interleaved`.

    Args:
        forwards: Name -> function from a batch of images to anything; jitted here.
        images: One batch, (batch, height, width, channels).
        rounds: Turns of each model.
        min_seconds: A turn's length.
    """
    # Copies, so that no call finds the last one's input in the cache.
    buffers = [jax.device_put(np.array(images)) for _ in range(2)]
    compiled = {
        name: Timed(jax.jit(forward).lower(buffers[0]).compile(), buffers) for name, forward in forwards.items()
    }
    times = time_interleaved(compiled, rounds, 2 * min_seconds)
    return {name: len(images) / found.seconds for name, found in times.items()}


def product_rate(dtype: str, seconds: float = 0.5) -> float:
    """FLOP/s of large matrix products on the first device: what this machine can do, as measured."""
    on_cpu = jax.default_backend() == "cpu"
    side = 1024 if on_cpu else 8192
    draws = [np.random.default_rng(seed).standard_normal((side, side), np.float32) for seed in range(2)]
    factors = [jax.device_put(jax.numpy.asarray(x, dtype)) for x in draws]
    # XLA for CPUs multiplies bfloat16 in bfloat16 where the result is float32, as the models have it, else in float32.
    result = jax.numpy.float32 if on_cpu else None
    multiply = jax.jit(lambda a, b: jax.numpy.dot(a, b, preferred_element_type=result)).lower(*factors).compile()
    timed = Timed(lambda pair: multiply(*pair), [factors, factors[::-1]])
    found = time_interleaved({"products": timed}, rounds=5, seconds=seconds / 5)["products"]
    return 2 * side**3 / min(found.turns)


def _each(timed: Timed, calls: int) -> list[float]:
    found = []
    for index in range(calls):
        begun = time.perf_counter()
        jax.block_until_ready(timed.run(timed.buffers[index % len(timed.buffers)]))
        found.append(time.perf_counter() - begun)
    return found


def _all(timed: Timed, calls: int) -> float:
    """Seconds per call."""
    begun = time.perf_counter()
    for index in range(calls):
        result = timed.run(timed.buffers[index % len(timed.buffers)])
    jax.block_until_ready(result)
    return (time.perf_counter() - begun) / calls
