"""`sit benchmark`: times models in turns and reports the result as a table, as JSON and as an image."""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Sequence

import jax

from sit_jax.analysis.benchmark import Times, memory_errors, product_rate, time_interleaved
from sit_jax.analysis.benchmark_models import BenchmarkModel, Compiled, open_benchmark_model
from sit_jax.analysis.chips import PUBLISHED_FLOPS
from sit_jax.analysis.table import cell, print_table
from sit_jax.config import JsonObject
from sit_jax.errors import UserError, valid_text
from sit_jax.io.atomic_write import atomic_create


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a benchmark; `seconds` is the total duration of each model's `rounds` turns, for each batch size."""

    batch_sizes: Sequence[int]
    dtype: str
    seconds: float
    rounds: int


def command(
    names: Sequence[str],
    teacher: str | None,
    settings: Settings,
    as_json: bool,
    plot: pathlib.Path | None,
    all_schedules: bool = False,
) -> None:
    """Times models and prints the result; implements `sit benchmark`.

    Raises a UserError if a model cannot be opened, is named twice, or does not fit the device's memory.
    """
    if plot is not None and (plot.suffix != ".png" or plot.exists() or not plot.parent.is_dir()):
        raise UserError(f"--plot: {plot} must be a new .png file in an existing folder")
    first = teacher if teacher is not None else names[0]
    ordered = [first, *(name for name in names if name != first)]
    if len(set(names)) < len(names):
        raise UserError("MODEL: a model is named twice")
    models = [open_benchmark_model(name) for name in ordered]
    if all_schedules:
        models = [each for model in models for each in model.schedules()]
    result = benchmark(models, settings)
    if plot is not None:
        draw(plot, result["rows"])
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _print(result)


def benchmark(models: Sequence[BenchmarkModel], settings: Settings) -> JsonObject:
    """Times models in turns; the first model is the reference.

    Returns `product_flops` (measured FLOP/s of matrix products), `published_flops` (None if not known), `rows`, one per
    model and batch size, and what was measured on.
    """
    device = jax.devices()[0]
    published = PUBLISHED_FLOPS.get(device.device_kind) if settings.dtype == "bfloat16" else None
    _log(f"measuring matrix products in {settings.dtype}")
    peak = product_rate(settings.dtype)
    rows: list[JsonObject] = []
    for batch in settings.batch_sizes:
        compiled: dict[str, Compiled] = {}
        with memory_errors("--batch_sizes", batch, device.device_kind):
            for model in models:
                _log(f"batch {batch}: compiling {model.name}")
                compiled[model.name] = model.compile(batch, settings.dtype)
            _log(f"batch {batch}: {settings.rounds} rounds")
            timed = {name: each.timed for name, each in compiled.items()}
            times = time_interleaved(timed, settings.rounds, settings.seconds / settings.rounds)
        rows += [_row(x, models[0], batch, compiled[x.name], times, peak, published) for x in models]
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "dtype": settings.dtype,
        "product_flops": peak,
        "published_flops": published,
        "rows": rows,
    }


def _row(
    model: BenchmarkModel,
    reference: BenchmarkModel,
    batch: int,
    compiled: Compiled,
    times: dict[str, Times],
    peak: float,
    published: float | None,
) -> JsonObject:
    """Returns one row; its `speedup_share` is the fraction of the saving in GMAC that became speed."""
    mine = times[model.name]
    speed, speedup = batch / mine.seconds, mine.speed_over(times[reference.name])
    flops = 2e9 * model.gmac * speed if model.gmac is not None else None
    gmac_ratio = reference.gmac / model.gmac if model.gmac is not None and reference.gmac is not None else None
    return {
        "model": model.name,
        "batch": batch,
        "images_per_s": speed,
        "latency_ms": {name: 1e3 * mine.latency(x) for name, x in (("median", 0.5), ("p10", 0.1), ("p90", 0.9))},
        "compile_s": compiled.compile_s,
        "memory_mib": compiled.memory_bytes / 2**20 if compiled.memory_bytes is not None else None,
        "gmac": model.gmac,
        "flops_per_s": flops,
        "peak_share": flops / peak if flops is not None else None,
        "published_share": flops / published if flops is not None and published else None,
        "top1": model.top1,
        "speedup": speedup,
        "gmac_ratio": gmac_ratio,
        "speedup_share": speedup / gmac_ratio if gmac_ratio else None,
    }


def draw(path: pathlib.Path, rows: Sequence[JsonObject]) -> None:
    """Plots accuracy (GMAC if the accuracy of a model is not known) against the best throughput of each model."""
    from matplotlib.figure import Figure

    names = dict.fromkeys(row["model"] for row in rows)
    best = {x: max((row for row in rows if row["model"] == x), key=lambda row: row["images_per_s"]) for x in names}
    key, label = ("top1", "top-1, %") if all(row["top1"] is not None for row in rows) else ("gmac", "GMAC")
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name, row in best.items():
        if row[key] is not None:
            place = (row["images_per_s"], row[key] * (100 if key == "top1" else 1))
            axes.plot(*place, "o")
            text = valid_text(f"{pathlib.Path(name).name}, batch {row['batch']}")
            axes.annotate(text, place, xytext=(6, 4), textcoords="offset points", parse_math=False)
    axes.set(xlabel="images/s", ylabel=label, xscale="log")
    axes.margins(0.2)
    axes.grid(alpha=0.3, which="both")
    with atomic_create(path) as part:
        figure.savefig(part, dpi=110, format="png")


def _print(result: JsonObject) -> None:
    peak = f"matrix products {result['product_flops'] / 1e9:,.0f} GFLOP/s"
    if result["published_flops"]:
        peak += f" (published {result['published_flops'] / 1e9:,.0f})"
    title = f"{result['device']}, {result['dtype']}, JAX {result['jax']}, {result['date']}; {peak}"
    headings = ("model", "batch", "images/s", "ms", "p10", "p90", "compile s", "MiB", "GMAC", "GFLOP/s", "of peak")
    rows = [
        (
            row["model"],
            str(row["batch"]),
            f"{row['images_per_s']:,.1f}",
            *(f"{row['latency_ms'][name]:.2f}" for name in ("median", "p10", "p90")),
            cell(row["compile_s"], "{:.1f}"),
            cell(row["memory_mib"], "{:,.0f}"),
            cell(row["gmac"], "{:.3f}"),
            cell(row["flops_per_s"] and row["flops_per_s"] / 1e9, "{:,.1f}"),
            cell(row["peak_share"], "{:.0%}"),
            f"x{row['speedup']:.2f}",
            cell(row["speedup_share"], "{:.2f}"),
        )
        for row in result["rows"]
    ]
    print_table((*headings, "speed", "of GMAC ratio"), rows, left=("model",), title=title)


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
