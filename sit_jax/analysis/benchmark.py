"""How fast models run here: measured side by side, so that a busy machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Forward = Callable[[Any], Any]


def measure_throughput(
    forwards: Mapping[str, Forward], images: np.ndarray, rounds: int = 15, min_seconds: float = 0.05
) -> dict[str, float]:
    """Images per second of each model on the same batch.

    Every model is compiled and warmed up first. Then they take turns (A B A B ...), each turn long enough to time;
    the figure is the median over the turns.

    Args:
        forwards: Name -> function from a batch of images to anything; jitted here.
        images: One batch, (batch, height, width, channels).
        rounds: Turns of each model.
        min_seconds: Shortest turn.
    """
    batch = jax.device_put(images)
    compiled = {name: jax.jit(forward).lower(batch).compile() for name, forward in forwards.items()}
    repeats = {name: max(1, round(min_seconds / _seconds(run, batch, warm_up=True))) for name, run in compiled.items()}
    times: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(rounds):
        for name, run in compiled.items():
            times[name].append(_seconds(run, batch, repeats[name]))
    return {name: len(images) / statistics.median(values) for name, values in times.items()}


def _seconds(run: Any, batch: jax.Array, repeats: int = 1, warm_up: bool = False) -> float:
    """Seconds per call."""
    if warm_up:
        for _ in range(2):
            jax.block_until_ready(run(batch))
    begun = time.perf_counter()
    for _ in range(repeats):
        result = run(batch)
    jax.block_until_ready(result)
    return (time.perf_counter() - begun) / repeats
