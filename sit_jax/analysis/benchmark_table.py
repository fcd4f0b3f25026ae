"""`sit benchmark`: times models in turns and reports the result as a table, as JSON and as an image."""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from sit_jax.analysis.benchmark import Times, product_rate, time_interleaved
from sit_jax.analysis.benchmark_models import BenchmarkModel, Compiled, open_benchmark_model
from sit_jax.analysis.chips import published_flops
from sit_jax.errors import UserError
from sit_jax.io.atomic_write import atomic_create


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a benchmark.

    Attributes:
        batch_sizes: Batch sizes to time.
        dtype: Type of the matrix products.
        seconds: Total duration of each model's turns, for each batch size.
        rounds: Number of turns of each model.
    """

    batch_sizes: Sequence[int]
    dtype: str
    seconds: float
    rounds: int


def command(
    names: Sequence[str], teacher: str | None, settings: Settings, as_json: bool, plot: pathlib.Path | None
) -> None:
    """Times models and prints the result; implements `sit benchmark`.

    Raises:
        UserError: A model cannot be opened, is named twice, or does not fit the device's memory.
    """
    if plot is not None and (plot.suffix != ".png" or plot.exists() or not plot.parent.is_dir()):
        raise UserError(f"--plot: {plot}: give a .png file that is not there yet, in a folder that is")
    first = teacher if teacher is not None else names[0]
    ordered = [first, *(name for name in names if name != first)]
    if len(set(names)) < len(names):
        raise UserError("MODEL: a model is named twice")
    result = benchmark([open_benchmark_model(name) for name in ordered], settings)
    if plot is not None:
        draw(plot, result["rows"])
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _print(result)


def benchmark(contenders: Sequence[BenchmarkModel], settings: Settings) -> dict[str, Any]:
    """Times models in turns; the first model is the reference.

    Returns:
        JSON values: `device`, `jax`, `date`, `dtype`, `product_flops` (measured FLOP/s of matrix products),
        `published_flops` (None if not known) and `rows`, one per model and batch size.
    """
    device = jax.devices()[0]
    published = published_flops(device.device_kind) if settings.dtype == "bfloat16" else None
    _log(f"measuring matrix products in {settings.dtype}")
    peak = product_rate(settings.dtype)
    rows: list[dict[str, Any]] = []
    for batch in settings.batch_sizes:
        ready: dict[str, Compiled] = {}
        try:
            for contender in contenders:
                _log(f"batch {batch}: compiling {contender.name}")
                ready[contender.name] = contender.compile(batch, settings.dtype)
            _log(f"batch {batch}: {settings.rounds} rounds")
            timed = {name: each.timed for name, each in ready.items()}
            times = time_interleaved(timed, settings.rounds, settings.seconds / settings.rounds)
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and not isinstance(error, MemoryError):
                raise
            raise UserError(f"--batch_sizes: {batch} does not fit the memory of {device.device_kind}") from None
        reference = contenders[0]
        for contender in contenders:
            row = _row(contender, batch, ready[contender.name], times[contender.name])
            if row["flops_per_s"] is not None:
                row["peak_share"] = row["flops_per_s"] / peak
                row["published_share"] = row["flops_per_s"] / published if published else None
            row |= _compared(contender, reference, times)
            rows.append(row)
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "dtype": settings.dtype,
        "product_flops": peak,
        "published_flops": published,
        "rows": rows,
    }


def _row(contender: BenchmarkModel, batch: int, ready: Compiled, times: Times) -> dict[str, Any]:
    speed, gmac = batch / times.seconds, contender.gmac
    return {
        "model": contender.name,
        "batch": batch,
        "images_per_s": speed,
        "latency_ms": {name: 1e3 * times.latency(x) for name, x in (("median", 0.5), ("p10", 0.1), ("p90", 0.9))},
        "compile_s": ready.compile_s,
        "memory_mib": ready.memory_bytes / 2**20 if ready.memory_bytes is not None else None,
        "gmac": gmac,
        "flops_per_s": 2e9 * gmac * speed if gmac is not None else None,
        "peak_share": None,
        "published_share": None,
        "top1": contender.top1,
    }


def _compared(contender: BenchmarkModel, reference: BenchmarkModel, times: dict[str, Times]) -> dict[str, Any]:
    """Returns speed and cost relative to the reference, and the fraction of the cost saving that became speed."""
    speedup = times[contender.name].speed_over(times[reference.name])
    mine, theirs = contender.gmac, reference.gmac
    ratio = theirs / mine if mine is not None and theirs is not None else None
    return {"speedup": speedup, "gmac_ratio": ratio, "speedup_share": speedup / ratio if ratio else None}


def draw(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    """Plots accuracy (GMAC if the accuracy of a model is not known) against the best throughput of each model.

    Raises:
        UserError: The file exists already or cannot be written.
    """
    from matplotlib.figure import Figure

    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["images_per_s"] > best.get(row["model"], {"images_per_s": 0.0})["images_per_s"]:
            best[row["model"]] = row
    key, label = ("top1", "top-1, %") if all(row["top1"] is not None for row in rows) else ("gmac", "GMAC")
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name, row in best.items():
        if row[key] is not None:
            place = (row["images_per_s"], row[key] * (100 if key == "top1" else 1))
            axes.plot(*place, "o")
            text = f"{pathlib.Path(name).name}, batch {row['batch']}"
            axes.annotate(text, place, xytext=(6, 4), textcoords="offset points")
    axes.set(xlabel="images/s", ylabel=label, xscale="log")
    axes.margins(0.2)
    axes.grid(alpha=0.3, which="both")
    with atomic_create(path) as part:
        figure.savefig(part, dpi=110, format="png")


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    peak = f"matrix products {result['product_flops'] / 1e9:,.0f} GFLOP/s"
    if result["published_flops"]:
        peak += f" (published {result['published_flops'] / 1e9:,.0f})"
    title = f"{result['device']}, {result['dtype']}, JAX {result['jax']}, {result['date']}; {peak}"
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    headings = ("model", "batch", "images/s", "ms", "p10", "p90", "compile s", "MiB", "GMAC", "GFLOP/s", "of peak")
    for heading in (*headings, "speed", "of GMAC ratio"):
        table.add_column(heading, justify="left" if heading == "model" else "right", overflow="fold")
    for row in result["rows"]:
        latency = row["latency_ms"]
        table.add_row(
            row["model"],
            str(row["batch"]),
            f"{row['images_per_s']:,.1f}",
            *(f"{latency[name]:.2f}" for name in ("median", "p10", "p90")),
            _cell(row["compile_s"], "{:.1f}"),
            _cell(row["memory_mib"], "{:,.0f}"),
            _cell(row["gmac"], "{:.3f}"),
            _cell(row["flops_per_s"] and row["flops_per_s"] / 1e9, "{:,.1f}"),
            _cell(row["peak_share"], "{:.0%}"),
            f"x{row['speedup']:.2f}",
            _cell(row["speedup_share"], "{:.2f}"),
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
