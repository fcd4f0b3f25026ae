"""Summarizes a finished run: summary.json, a table, curves.png and slimming.png."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax.analysis.benchmark import Forward, measure_throughput
from sit_jax.analysis.flops import count_cost
from sit_jax.analysis.table import cell, print_table
from sit_jax.config import Config, JsonObject
from sit_jax.data.pipeline import eval_batches
from sit_jax.data.preprocess import normalize
from sit_jax.data.registry import open_source
from sit_jax.io import runs
from sit_jax.io.preprocessing import run_class_names
from sit_jax.models import build_model
from sit_jax.models.architecture import Architecture
from sit_jax.models.trees import Variables
from sit_jax.parallel import distributed
from sit_jax.training.init import given_teacher, is_own_run
from sit_jax.training.loop import evaluate_variables
from sit_jax.training.metrics import evaluations, read_metrics
from sit_jax.visual.slimming_png import draw_slimming
from sit_jax.visual.token_maps import token_maps

CURVES = "curves.png"
SLIMMING = "slimming.png"
_IMAGES_SHOWN = 6
# Ratios of a summary and their form in the table.
_RATIOS = {"gmac_ratio": "MMAC 1/{:.2f}", "speedup": "speed x{:.2f}"}


def summarize(folder: pathlib.Path) -> JsonObject:
    """Evaluates and times a finished run's student and its teacher, and writes the summary and the images.

    Returns:
        The contents of `summary.json`: `student` and, if there is one, `teacher`, each with `top1` (fraction of 1),
        `params`, `gmac` and `images_per_s`; with a teacher also `kept_accuracy` (student's top-1 over the teacher's),
        `gmac_ratio` (teacher's over the student's) and `speedup` (student's images/s over the teacher's); a ratio is
        None if its denominator is 0 or a value is missing.
    """
    config, variables = runs.trained_variables(folder)
    student = TrainedModel(config, variables, folder)
    teacher = trained_teacher(folder, config)
    models = {"student": student} if teacher is None else {"teacher": teacher, "student": student}
    source = open_source(config.data, config.data.eval_split)
    pixels = next(iter(eval_batches(config.inputs, source)))["image"]
    images = np.asarray(normalize(jnp.asarray(pixels), config.data))
    speed = measure_throughput({name: _forward(x.config, x.variables) for name, x in models.items()}, images)
    summary: JsonObject = {}
    for name, model in models.items():
        arch = model.config.model.architecture
        summary[name] = {"top1": evaluate_variables(model.config, model.variables, str(model.folder or name))["top1"]}
        if isinstance(arch, Architecture):
            cost = count_cost(arch)
            summary[name] |= {"params": cost.params, "gmac": cost.gmac}
        summary[name]["images_per_s"] = speed[name]
    if "teacher" in summary:
        mine, theirs = summary["student"], summary["teacher"]
        summary["kept_accuracy"] = _ratio(mine["top1"], theirs["top1"])
        summary["gmac_ratio"] = _ratio(theirs.get("gmac"), mine.get("gmac"))
        summary["speedup"] = _ratio(mine["images_per_s"], theirs["images_per_s"])
    summary["images_per_s_measured"] = f"batch of {len(images)}, {config.model.dtype}, {jax.devices()[0].device_kind}"
    if not distributed.is_process_0():
        return summary
    with runs.writing(folder):
        runs.write_json(folder / runs.SUMMARY, summary)
        draw_curves(folder, {name: x.folder for name, x in models.items() if x.folder is not None})
        _draw_examples(folder, config, variables, pixels, images, source.class_names)
    return summary


class TrainedModel(NamedTuple):
    """A run's student or its teacher.

    Attributes:
        config: The model, with the student's data.
        variables: Its variables, with the heads in the order of the student's classes.
        folder: Its run directory; None for weights of another framework, which have no curves.
    """

    config: Config
    variables: Variables
    folder: pathlib.Path | None


def trained_teacher(folder: pathlib.Path, config: Config) -> TrainedModel | None:
    """Returns the teacher of a run, or None for a run without a teacher.

    Args:
        folder: The run directory.
        config: The run's configuration.

    Raises:
        UserError: Its weights cannot be read.
    """
    if config.teacher is None:
        return None
    if not config.teacher.run:
        return TrainedModel(*runs.trained_variables(folder / "teacher"), folder / "teacher")
    place = pathlib.Path(config.teacher.run) if is_own_run(config.teacher.run) else None
    variables = given_teacher(config.teacher, "teacher", run_class_names(config, folder))
    # The teacher is evaluated on the student's data, independent of its own training data.
    return TrainedModel(config.teacher_run(config.teacher), variables, place)


def print_summary(summary: JsonObject) -> None:
    """Prints a summary as a table on standard output."""
    names = [name for name in ("teacher", "student") if name in summary]
    rows = []
    for name in names:
        entry, compared = summary[name], summary if names[0] != name else {}
        ratios = [cell(compared.get(key), form) for key, form in _RATIOS.items()]
        rows.append(
            (
                name,
                f"{entry['top1']:.2%}",
                cell(compared.get("kept_accuracy"), "{:.2%}"),
                cell(entry.get("params"), "{:,}"),
                f"{entry['gmac'] * 1e3:,.2f}" if "gmac" in entry else "",
                f"{entry['images_per_s']:,.0f}",
                ", ".join(filter(None, ratios)),
            )
        )
    headings = ("", "top-1", "kept accuracy", "parameters", "MMAC", "images/s", "ratio")
    print_table(headings, rows, left=("",), title=f"Images/s: {summary['images_per_s_measured']}")


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def draw_curves(folder: pathlib.Path, folders: dict[str, pathlib.Path]) -> None:
    """Plots loss terms and accuracy of one or several runs against their epochs, in `curves.png`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(folders), 7), layout="constrained")
    axes = figure.subplots(2, len(folders), squeeze=False)
    for column, (name, place) in enumerate(folders.items()):
        lines = read_metrics(place)
        train, scores = [line for line in lines if line["kind"] == "train"], evaluations(lines)
        terms = ("loss", "classification", "token", "logits", "hard")
        for term in [term for term in terms if train and term in train[0]]:
            axes[0, column].plot([x["step"] for x in train], [x[term] for x in train], label=term)
        axes[0, column].set(title=f"{name}: training loss (terms unweighted)", xlabel="step", yscale="log")
        axes[0, column].legend()
        for key in [key for key in ("top1", "ema_top1") if scores and key in scores[0]]:
            axes[1, column].plot([x["step"] for x in scores], [100 * x[key] for x in scores], ".-", label=key)
        axes[1, column].set(title=f"{name}: accuracy on the evaluation split", xlabel="step", ylabel="%")
        axes[1, column].grid(alpha=0.3)
        axes[1, column].legend()
    figure.savefig(folder / CURVES, dpi=110)


def _forward(config: Config, variables: Variables) -> Forward:
    model = build_model(config.model.architecture, dtype=config.model.dtype)
    return lambda images: model.apply(variables, images)[0]


def _draw_examples(
    folder: pathlib.Path,
    config: Config,
    variables: Variables,
    pixels: np.ndarray,
    images: np.ndarray,
    class_names: Sequence[str],
) -> None:
    """Draws the token maps of the student's kept tokens, for the first images of the evaluation split."""
    arch = config.model.architecture
    if not isinstance(arch, Architecture) or not arch.is_slimmed:
        return
    maps = token_maps(build_model(arch), variables, images[:_IMAGES_SHOWN])
    titles = [f"predicted: {class_names[index]}" for index in maps.logits.argmax(axis=1)]
    draw_slimming(folder / SLIMMING, pixels[:_IMAGES_SHOWN], maps, titles)
