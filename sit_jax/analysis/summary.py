"""Summarizes a finished run: summary.json, a table, curves.png and slimming.png."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from sit_jax.analysis.benchmark import time_interleaved
from sit_jax.analysis.benchmark_models import BenchmarkModel
from sit_jax.analysis.flops import count_cost
from sit_jax.analysis.table import cell, print_table
from sit_jax.config import Config, JsonObject
from sit_jax.data.pipeline import eval_batches
from sit_jax.data.registry import open_source
from sit_jax.io import runs
from sit_jax.io.checkpoint import stored_evaluation
from sit_jax.io.load import load_run
from sit_jax.io.model import Model
from sit_jax.models.architecture import Architecture
from sit_jax.parallel import distributed
from sit_jax.training.elastic import choices, metric_key, schedule_name
from sit_jax.training.evaluate import evaluate_model, feature_comparison
from sit_jax.training.init import given_teacher
from sit_jax.training.metrics import evaluations, read_metrics
from sit_jax.visual.token_maps import model_token_maps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = "curves.png"
SLIMMING = "slimming.png"
_IMAGES_SHOWN = 6
# Ratios of a summary and their form in the table.
_RATIOS = {"gmac_ratio": "MMAC 1/{:.2f}", "speedup": "speed x{:.2f}"}


def summarize(folder: pathlib.Path) -> JsonObject:
    """Evaluates and times a finished run's student and its teacher, and writes the summary and the images.

    Returns the contents of `summary.json`: `student` and, if there is one, `teacher`, each with `top1` (fraction of 1),
    `params`, `gmac` and `images_per_s`; with a teacher also `kept_accuracy` (student's top-1 over the teacher's),
    `gmac_ratio` (teacher's over the student's) and `speedup` (student's images/s over the teacher's); a ratio is None
    if its denominator is 0 or a value is missing. Without labels, there is no accuracy; the student has the entries of
    `feature_metrics` instead. A student for several token schedules has `schedules`, the entries of each with its
    `kept_tokens`.
    """
    student = load_run(folder)
    teacher = trained_teacher(student, folder)
    models = {"student": student} if teacher is None else {"teacher": teacher, "student": student}
    config = student.config
    assert config is not None
    models |= {schedule_name(kept): student.cut(kept) for kept in choices(config)[1:]}
    source = open_source(config.data, config.data.eval_split)
    pixels = next(iter(eval_batches(config.inputs, source)))["image"]
    batch, dtype = len(pixels), config.model.dtype
    timed = {name: BenchmarkModel(name, model).compile(batch, dtype).timed for name, model in models.items()}
    times = time_interleaved(timed, rounds=15)
    entries: JsonObject = {}
    compare = None if config.loss.uses_labels else feature_comparison(teacher, config.data, student.source)
    for name, model in models.items():
        entries[name] = {}
        if compare is None:
            is_cut = name not in ("teacher", "student")
            key = metric_key("top1", student.vit.token_counts, model.vit.token_counts) if is_cut else "top1"
            entries[name]["top1"] = _top1(model, key)
        elif name != "teacher":
            entries[name] |= compare(model)
        if isinstance(model.arch, Architecture):
            cost = count_cost(model.arch)
            entries[name] |= {"params": cost.params, "gmac": cost.gmac}
        entries[name]["images_per_s"] = batch / times[name].seconds
    summary: JsonObject = {name: entry for name, entry in entries.items() if name in ("teacher", "student")}
    if choices(config):
        students = {name: model for name, model in models.items() if name != "teacher"}
        found = [{"kept_tokens": list(model.vit.token_counts), **entries[name]} for name, model in students.items()]
        summary["schedules"] = found
    if "teacher" in summary:
        mine, theirs = summary["student"], summary["teacher"]
        if config.loss.uses_labels:
            summary["kept_accuracy"] = _ratio(mine["top1"], theirs["top1"])
        summary["gmac_ratio"] = _ratio(theirs.get("gmac"), mine.get("gmac"))
        summary["speedup"] = _ratio(mine["images_per_s"], theirs["images_per_s"])
    summary["images_per_s_measured"] = f"batch of {batch}, {dtype}, {jax.devices()[0].device_kind}"
    if not distributed.is_process_0():
        return summary
    with runs.writing(folder):
        runs.write_json(folder / runs.SUMMARY, summary)
        folders = {name: pathlib.Path(model.source) for name, model in models.items() if name in summary}
        draw_curves(folder, {name: path for name, path in folders.items() if runs.is_run(path)})
        _draw_examples(folder, student, pixels, source.class_names if config.loss.uses_labels else ())
    return summary


def _top1(model: Model, key: str) -> float:
    """Returns a model's accuracy: as the training has stored it for a run's newest checkpoint, if by the same data.

    `key` is its name among the metrics of the checkpoint.
    """
    folder, step = runs.find_checkpoint(pathlib.Path(model.source))
    is_newest = step is None and runs.is_run(folder)
    if is_newest and model.config is not None and runs.read_config(folder).data == model.config.data:
        stored = stored_evaluation(folder)
        if key in stored:
            return stored[key]
    return evaluate_model(model, match_names=False)["top1"]


def trained_teacher(student: Model, folder: pathlib.Path) -> Model | None:
    """Returns the teacher of a run, with the heads in the order of the student's classes; None if there is none."""
    config = student.config
    if config is None or config.teacher is None:
        return None
    if not config.teacher.run:
        return load_run(folder / "teacher")
    return named_teacher(config, student.metadata.get("class_names"))


def named_teacher(config: Config, class_names: Sequence[str] | None) -> Model:
    """Returns the teacher in `teacher.run` of a configuration, with the heads in the order of the classes, if given."""
    assert config.teacher is not None
    variables = given_teacher(config.teacher, "teacher", class_names)
    # The teacher is evaluated on the student's data, independent of its own training data.
    own = config.teacher_run(config.teacher)
    return Model(own.model.architecture, variables, dtype=own.model.dtype, config=own, source=config.teacher.run)


def print_summary(summary: JsonObject) -> None:
    """Prints a summary as a table on standard output."""
    rows: list[tuple[str, ...]] = []
    named: JsonObject = {name: entry for name, entry in summary.items() if name in ("teacher", "student")}
    for entry in summary.get("schedules", [])[1:]:
        named[f"student, {'/'.join(map(str, entry['kept_tokens']))} tokens"] = entry
    for name, entry in named.items():
        compared = summary if name == "student" else {}
        rows.append(
            (
                name,
                cell(entry.get("top1"), "{:.2%}"),
                cell(compared.get("kept_accuracy"), "{:.2%}"),
                cell(entry.get("params"), "{:,}"),
                f"{entry['gmac'] * 1e3:,.2f}" if "gmac" in entry else "",
                f"{entry['images_per_s']:,.0f}",
                ", ".join(filter(None, (cell(compared.get(key), form) for key, form in _RATIOS.items()))),
            )
        )
    headings = ("", "top-1", "kept accuracy", "parameters", "MMAC", "images/s", "ratio")
    print_table(headings, rows, left=("",), title=f"Images/s: {summary['images_per_s_measured']}")
    if "cosine" in summary["student"]:
        print(feature_line(summary["student"]))


def feature_line(metrics: Mapping[str, float]) -> str:
    """Returns a line that says how similar the features of a student are to its teacher's; see `feature_metrics`."""
    shared = [f", agreement@{k} {metrics[f'agreement{k}']:.2%}" for k in (1, 5) if f"agreement{k}" in metrics]
    return f"features: cosine {metrics['cosine']:.4f}{''.join(shared)} over {metrics['examples']:.0f} examples"


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def draw_curves(folder: pathlib.Path, folders: dict[str, pathlib.Path]) -> None:
    """Plots loss terms and accuracy of one or several runs against their epochs, in `curves.png`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(folders), 7), layout="constrained")
    axes = figure.subplots(2, len(folders), squeeze=False)
    for column, (name, place) in enumerate(folders.items()):
        lines = read_metrics(place)
        losses, accuracies = axes[:, column]
        train = [line for line in lines if line["kind"] == "train"]
        _plot(losses, train, ("loss", "classification", "token", "feature", "logits", "hard"), log=True)
        losses.set(title=f"{name}: training loss (terms unweighted)", xlabel="step")
        scores = evaluations(lines)
        # `top1/4-2-1` is of an elastic student that is cut.
        cut = dict.fromkeys(key for line in scores for key in line if key.startswith(("top1/", "cosine/")))
        names = ("top1", "ema_top1", "cosine", "agreement1", "agreement5", *cut)
        _plot(accuracies, scores, names, log=False)
        accuracies.set(
            title=f"{name}: accuracy or similarity to the teacher on the evaluation split", xlabel="step", ylabel="%"
        )
        accuracies.grid(alpha=0.3)
    figure.savefig(folder / CURVES, dpi=110)


def _plot(axes: "Axes", lines: Sequence[JsonObject], names: Sequence[str], log: bool) -> None:
    """Plots losses on a logarithmic axis, or fractions in percent; notes on the axes if there are none."""
    for name in names:
        factor = 1 if log else 100
        # A logarithmic axis has no place for 0.
        points = [(x["step"], factor * x[name]) for x in lines if name in x and (x[name] > 0 or not log)]
        if points:
            axes.plot(*zip(*points, strict=True), "-" if log else ".-", label=name)
    if axes.lines:
        axes.set_yscale("log" if log else "linear")
        axes.legend()
    else:
        axes.text(0.5, 0.5, "nothing was logged", transform=axes.transAxes, ha="center")


def _draw_examples(folder: pathlib.Path, model: Model, pixels: np.ndarray, class_names: Sequence[str]) -> None:
    """Draws the token maps of the student's kept tokens, for the first images of the evaluation split."""
    if not isinstance(model.arch, Architecture) or not model.arch.is_slimmed:
        return
    from sit_jax.visual.figure import draw_slimming  # Matplotlib is slow to import.

    maps = model_token_maps(model, pixels[:_IMAGES_SHOWN])
    titles = [""] * len(maps.logits)
    if class_names:
        titles = [f"predicted: {class_names[index]}" for index in maps.logits.argmax(axis=1)]
    draw_slimming(folder / SLIMMING, pixels[:_IMAGES_SHOWN], maps, titles)
