"""Implementation of `sit tune`: chooses a token schedule for a budget, by measured cost and measured accuracy."""

import dataclasses
import itertools
import pathlib
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import jax
import numpy as np

from sit_jax.analysis.benchmark import Timed, memory_errors, time_interleaved
from sit_jax.analysis.benchmark_models import BenchmarkModel
from sit_jax.analysis.chips import Topology
from sit_jax.analysis.compilation import without_cache
from sit_jax.analysis.flops import TPU_TILES, count_cost
from sit_jax.analysis.hlo import read_traffic
from sit_jax.analysis.plan import lower_bound, topology_devices
from sit_jax.analysis.summary import trained_teacher
from sit_jax.analysis.table import cell, print_table
from sit_jax.config import JsonObject
from sit_jax.data.config import DataConfig
from sit_jax.data.registry import open_source
from sit_jax.errors import ConfigError, UserError
from sit_jax.io.export import onnx_file
from sit_jax.io.inference import inference_model
from sit_jax.io.load import load
from sit_jax.io.model import Model
from sit_jax.io.runs import find_checkpoint
from sit_jax.models.architecture import Architecture
from sit_jax.models.cut import scaled_schedule
from sit_jax.training.elastic import schedule_text
from sit_jax.training.evaluate import evaluate_model, feature_comparison, labelled_source

Target = Literal["jax", "onnxruntime"]
Kind = Literal["latency_ms", "images_per_s", "gmac"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_UNITS = {"latency_ms": "ms", "images_per_s": "images/s", "gmac": "GMAC"}
_ROUNDS = 9
# A budget may be copied from the table or from an error, which have four digits.
_ROUNDING = 1e-3
# Fractions of the tokens of a model for one schedule, per reducer, down to which schedules are tried.
_LEAST_FACTOR = 0.4


class Budget(NamedTuple):
    """The limit of a schedule's cost, to 0.1%: `latency_ms` and `gmac` are largest values, `images_per_s` the least."""

    kind: Kind
    value: float

    def allows(self, row: JsonObject) -> bool:
        """Returns whether a row of costs is within the budget."""
        cost: float = row[self.kind]
        if self.kind == "images_per_s":
            return cost >= self.value * (1 - _ROUNDING)
        return cost <= self.value * (1 + _ROUNDING)


class Runtime(NamedTuple):
    """Where the model runs.

    Attributes:
        target: `jax` or `onnxruntime`, on this machine.
        topology: A TPU slice of one chip, whose time is the compiler's bound; None for this machine.
        batch: The batch size.
        dtype: Type of the matrix products; float32 for `onnxruntime`.
        seconds: Measuring time of each schedule.
    """

    target: Target = "jax"
    topology: Topology | None = None
    batch: int = 1
    dtype: str = "float32"
    seconds: float = 3.0


def candidate_schedules(arch: Architecture, between: int, rows: int = 1) -> list[tuple[int, ...]]:
    """Returns the token schedules to try, from the model's own down.

    They are those that the model was trained for, and `between` ones between every two of them, interpolated
    geometrically. For a model with one schedule, they go down to 0.4 times the tokens, per reducer.

    Args:
        arch: A slimmed architecture.
        between: Number of schedules between two.
        rows: Rows of a tile of the target: numbers of tokens, with the prefix tokens, are rounded up to fill whole
            tiles, as far as the larger schedule allows. 1 for no rounding.
    """
    whole = arch.token_counts
    least = scaled_schedule(whole, _LEAST_FACTOR)
    trained = arch.kept_tokens_choices or (whole, least)
    found = {trained[0]: None}
    for first, second in itertools.pairwise(trained):
        for step in range(1, between + 1):
            part = step / (between + 1)
            ideal = [a * (b / a) ** part for a, b in zip(first, second, strict=True)]
            filled = [_fill(count, arch.num_prefix_tokens, rows) for count in ideal]
            counts = map(min, filled, first)
            found[tuple(itertools.accumulate(counts, min))] = None
        found[second] = None
    return list(found)


def _fill(count: float, prefix: int, rows: int) -> int:
    """Returns the number of tokens, rounded up to fill whole tiles together with the prefix tokens."""
    return max(1, -(-(round(count) + prefix) // rows) * rows - prefix)


def tune(
    model: Model, budget: Budget, runtime: Runtime, data: DataConfig, between: int = 3, by_labels: bool = True
) -> JsonObject:
    """Measures the schedules of a slimmed model and chooses the best one within a budget.

    Accuracies are measured on the evaluation split, without training, in the type of the runtime; only of the schedules
    within the budget.

    Args:
        model: The model.
        budget: The limit.
        runtime: Where the model runs.
        data: What to evaluate on.
        between: Number of schedules that are tried between two trained ones.
        by_labels: Whether the score is the accuracy, or the similarity to the teacher.

    Returns:
        JSON values: `rows`, each with `kept_tokens`, `trained`, `fills_tiles`, `gmac`, `latency_ms`, `images_per_s` and
        `score` (None outside the budget); `score` names what it is, `top1` or `cosine`; `chosen`, the index of a row;
        `measured`, on what.

    Raises:
        UserError: No schedule is within the budget; the message has the fastest one. Or there is nothing to evaluate
            on, or the batch does not fit the memory.
        ConfigError: The model is not slimmed.
    """
    arch = model.vit
    if not arch.is_slimmed:
        raise ConfigError("MODEL", f"{model.source} is not slimmed; --before_training proposes a schedule for it")
    score = _scorer(model, data, by_labels)
    tiles = _tile_rows(runtime)
    schedules = candidate_schedules(arch, between, tiles)
    models = {schedule_text(kept): dataclasses.replace(model.cut(kept), dtype=runtime.dtype) for kept in schedules}
    trained = arch.kept_tokens_choices or (arch.token_counts,)
    rows: list[JsonObject] = [
        {
            "kept_tokens": list(kept),
            "trained": kept in trained,
            "fills_tiles": tiles > 1 and all((n + arch.num_prefix_tokens) % tiles == 0 for n in kept[1:]),
            "gmac": count_cost(cut.vit).gmac,
            "score": None,
        }
        for kept, cut in zip(schedules, models.values(), strict=True)
    ]
    if budget.kind == "gmac":
        _within(budget, rows)  # Raises its error before the measurement.
    costs, measured = _costs(models, runtime)
    for row, name in zip(rows, models, strict=True):
        row |= {"latency_ms": 1e3 * costs[name][0], "images_per_s": costs[name][1]}
    possible = _within(budget, rows)
    for number, index in enumerate(possible, start=1):
        row = rows[index]
        name = schedule_text(row["kept_tokens"])
        log(f"evaluating {name} ({number} of {len(possible)})")
        row["score"] = score(models[name])
    chosen = max(possible, key=lambda i: (rows[i]["score"], rows[i]["fills_tiles"], -rows[i]["latency_ms"]))
    kind = "top1" if by_labels else "cosine"
    return {"score": kind, "chosen": chosen, "measured": measured, "rows": rows}


def _within(budget: Budget, rows: Sequence[JsonObject]) -> list[int]:
    """Returns the indices of the rows within the budget; raises a UserError if there are none."""
    possible = [index for index, row in enumerate(rows) if budget.allows(row)]
    if not possible:
        best = (max if budget.kind == "images_per_s" else min)(rows, key=lambda row: row[budget.kind])
        kept = schedule_text(best["kept_tokens"])
        least = f"{_digits(best[budget.kind])} {_UNITS[budget.kind]}"
        problem = f"{budget.value:g} is not possible; the fastest schedule, {kept}, has {least}"
        raise UserError(f"--{budget.kind}: {problem}")
    return possible


def _tile_rows(runtime: Runtime) -> int:
    """Returns the rows of a tile of the target's matrix units, 1 if it has none."""
    if runtime.topology is not None:
        return TPU_TILES.rows
    has_units = runtime.target == "jax" and jax.default_backend() in ("tpu", "gpu")
    return TPU_TILES.rows if has_units else 1


def _digits(value: float) -> str:
    """Returns a number with at least four digits, as the options take it."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _scorer(model: Model, data: DataConfig, by_labels: bool) -> Callable[[Model], float]:
    """Returns the function that computes the score of a model that is cut; raises a UserError without data for it."""
    if by_labels:
        labelled_source(model, data)  # Raises its errors before the measurement.
        return lambda cut: evaluate_model(cut, data)["top1"]
    open_source(data, data.eval_split)
    compare = feature_comparison(
        trained_teacher(model, find_checkpoint(pathlib.Path(model.source))[0]), data, model.source
    )
    return lambda cut: compare(cut)["cosine"]


def _costs(models: dict[str, Model], runtime: Runtime) -> tuple[dict[str, tuple[float, float]], str]:
    """Returns the latency in seconds and the images/s of each model, and what they were measured on."""
    if runtime.topology is not None:
        seconds = {}
        device = topology_devices(runtime.topology)[0]
        for name, model in models.items():
            log(f"compiling {name} for {runtime.topology.name}")
            with memory_errors("--batch", runtime.batch, runtime.topology.name):
                seconds[name] = _bound(model, runtime, device)
        what = f"{runtime.topology.name}, batch {runtime.batch}, {runtime.dtype}, lower bound by the compiler"
        return {name: (x, runtime.batch / x) for name, x in seconds.items()}, what
    kind = jax.devices()[0].device_kind
    with memory_errors("--batch", runtime.batch, kind):
        timed = _timed(models, runtime)
        log(f"timing {len(timed)} schedules in turns")
        times = time_interleaved(timed, _ROUNDS, runtime.seconds / _ROUNDS)
    place = f"jax on {kind}" if runtime.target == "jax" else runtime.target
    where = f"{place}, batch {runtime.batch}, {runtime.dtype}"
    return {name: (x.latency(), runtime.batch / x.seconds) for name, x in times.items()}, where


def _timed(models: dict[str, Model], runtime: Runtime) -> dict[str, Timed]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            log(f"compiling {name}")
            if runtime.target == "onnxruntime":
                path = pathlib.Path(folder, f"{name}.onnx")
                onnx_file.save(path, model, "float32", raw_input=False)
                model = load(path)
            found[name] = BenchmarkModel(name, model).compile(runtime.batch, runtime.dtype).timed
    return found


def _bound(model: Model, runtime: Runtime, device: jax.Device) -> float:
    """Returns the lower bound of the time of a batch on a chip, in seconds."""
    chip = None if runtime.topology is None else runtime.topology.chip
    assert chip is not None
    arch, dtype = model.vit, runtime.dtype
    prepared = inference_model(arch, model.variables, dtype, attention="plain")
    place = jax.sharding.SingleDeviceSharding(device)

    def abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    images = np.zeros((runtime.batch, *arch.image_shape, arch.in_channels), np.float32)
    arguments = jax.tree.map(abstract, (prepared.weights, images))
    with without_cache():
        compiled = jax.jit(prepared.apply).lower(*arguments).compile()
    traffic = read_traffic(compiled.as_text() or "", 1)
    # With the products that only fill tiles: a token count that fills them costs no more than a smaller one.
    flops = 2e9 * count_cost(arch, TPU_TILES).gmac * runtime.batch
    return lower_bound(chip, 1, runtime.batch, flops, traffic, None).step_s


def print_tuning(result: JsonObject, budget: Budget, words: Sequence[str]) -> None:
    """Prints the table, the choice and the commands that use it; `words` are the arguments that name the model."""
    rows, chosen = result["rows"], result["rows"][result["chosen"]]
    label, form = ("top-1", "{:.2%}") if result["score"] == "top1" else ("cosine", "{:.4f}")
    table = [
        (
            schedule_text(row["kept_tokens"]),
            "trained" if row["trained"] else "",
            "full" if row["fills_tiles"] else "",
            f"{row['gmac']:.4g}",
            _digits(row["latency_ms"]),
            _digits(row["images_per_s"]),
            cell(row["score"], form),
            "*" if row is chosen else "",
        )
        for row in rows
    ]
    headings = ("tokens", "schedule", "tiles", "GMAC", "ms", "images/s", label, "best")
    print_table(headings, table, left=("tokens", "schedule", "tiles"), title=f"Measured: {result['measured']}")
    kept = schedule_text(chosen["kept_tokens"])
    print(f"Best within --{budget.kind} {budget.value:g}: {kept}, {label} {form.format(chosen['score'])}")
    if chosen["fills_tiles"]:
        print("Its numbers of tokens fill the tiles of the target; of equal schedules, these are preferred.")
    path, *options = words
    print(shlex.join(["sit", "export", path, "model.onnx", "--format", "onnx", *options, "--kept_tokens", kept]))
    print(shlex.join(["sit", "predict", path, "IMAGES", *options, "--kept_tokens", kept]))


def log(line: str) -> None:
    """Prints a line of progress on standard error."""
    print(f"tune: {line}", file=sys.stderr, flush=True)
