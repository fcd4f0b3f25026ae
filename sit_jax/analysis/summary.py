"""Summarizes a finished run: summary.json, a table, curves.png and slimming.png."""

import functools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from rich.console import Console
from rich.table import Table

from sit_jax.analysis.benchmark import measure_throughput
from sit_jax.analysis.flops import count_cost
from sit_jax.config import JsonObject
from sit_jax.data.pipeline import eval_batches
from sit_jax.data.preprocess import normalize
from sit_jax.data.registry import open_source
from sit_jax.io import runs
from sit_jax.io.load import load_run
from sit_jax.io.model import Model
from sit_jax.models.architecture import Architecture
from sit_jax.parallel import distributed
from sit_jax.training.evaluate import evaluate_model
from sit_jax.training.init import given_teacher
from sit_jax.training.metrics import evaluations, read_metrics
from sit_jax.visual.slimming_png import draw_slimming
from sit_jax.visual.token_maps import model_token_maps

CURVES = "curves.png"
SLIMMING = "slimming.png"
_PICTURES_SHOWN = 6


def summarize(folder: pathlib.Path) -> JsonObject:
    """Evaluates and times a finished run's student and its teacher, and writes the summary and the images.

    Returns:
        The contents of `summary.json`: `student` and, if there is one, `teacher`, each with `top1` (fraction of 1),
        `params`, `gmac` and `images_per_s`; with a teacher also `kept_accuracy` (student's top-1 over the teacher's),
        `gmac_ratio` (teacher's over the student's) and `speedup` (student's images/s over the teacher's); a ratio is
        None if its denominator is 0 or a value is missing.
    """
    models = trained_models(folder)
    student_model = models["student"]
    config = student_model.config
    assert config is not None
    source = open_source(config.data, config.data.eval_split)
    pixels = next(iter(eval_batches(config.inputs, source)))["image"]
    images = np.asarray(normalize(jnp.asarray(pixels), config.data))
    forwards = {name: functools.partial(_logits, model) for name, model in models.items()}
    speed = measure_throughput(forwards, images)
    summary: JsonObject = {}
    for name, model in sorted(models.items(), reverse=True):
        entry: JsonObject = {"top1": evaluate_model(model, match_names=False)["top1"]}
        if isinstance(model.arch, Architecture):
            cost = count_cost(model.arch)
            entry |= {"params": cost.params, "gmac": cost.gmac}
        summary[name] = {**entry, "images_per_s": speed[name]}
    if "teacher" in summary:
        student, teacher = summary["student"], summary["teacher"]
        summary["kept_accuracy"] = _ratio(student["top1"], teacher["top1"])
        summary["gmac_ratio"] = _ratio(teacher.get("gmac"), student.get("gmac"))
        summary["speedup"] = _ratio(student["images_per_s"], teacher["images_per_s"])
    summary["images_per_s_measured"] = f"batch of {len(images)}, {config.model.dtype}, {jax.devices()[0].device_kind}"
    if not distributed.is_process_0():
        return summary
    with runs.writing(folder):
        runs.write_json(folder / runs.SUMMARY, summary)
        draw_curves(
            folder, {name: pathlib.Path(x.source) for name, x in models.items() if runs.is_run(pathlib.Path(x.source))}
        )
        _draw_examples(folder, student_model, pixels, source.class_names)
    return summary


def trained_models(folder: pathlib.Path) -> dict[str, Model]:
    """Returns a run's `student` and, if there is one, its `teacher`.

    Raises:
        UserError: The weights of a model cannot be read.
    """
    student = load_run(folder)
    teacher = trained_teacher(student, folder)
    return {"student": student} if teacher is None else {"student": student, "teacher": teacher}


def trained_teacher(student: Model, folder: pathlib.Path) -> Model | None:
    """Returns the teacher of a run, with the heads in the order of the student's classes; None if there is none.

    Args:
        student: The run's model.
        folder: The run directory.

    Raises:
        UserError: Its weights cannot be read.
    """
    config = student.config
    if config is None or config.teacher is None:
        return None
    if not config.teacher.run:
        return load_run(folder / "teacher")
    variables = given_teacher(config.teacher, "teacher", student.metadata.get("class_names"))
    # The teacher is evaluated on the student's data, independent of its own training data.
    own = config.teacher_run(config.teacher)
    arch, dtype = own.model.architecture, own.model.dtype
    return Model(arch, variables, dtype=dtype, config=own, source=config.teacher.run)


def print_summary(summary: JsonObject) -> None:
    """Prints a summary as a table on standard output."""
    table = Table(title=f"Images/s: {summary['images_per_s_measured']}")
    for heading in ("", "top-1", "kept accuracy", "parameters", "MMAC", "images/s", "ratio"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name in ("teacher", "student"):
        if name not in summary:
            continue
        entry = summary[name]
        compared = name == "student" and "teacher" in summary
        forms = (("gmac_ratio", "MMAC 1/{:.2f}"), ("speedup", "speed x{:.2f}"))
        ratios = [_cell(summary.get(key), form) for key, form in forms]
        table.add_row(
            name,
            f"{entry['top1']:.2%}",
            _cell(summary["kept_accuracy"] if compared else None, "{:.2%}"),
            f"{entry['params']:,}" if "params" in entry else "",
            f"{entry['gmac'] * 1e3:,.2f}" if "gmac" in entry else "",
            f"{entry['images_per_s']:,.0f}",
            ", ".join(filter(None, ratios)) if compared else "",
        )
    Console().print(table)


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def draw_curves(folder: pathlib.Path, runs: dict[str, pathlib.Path]) -> None:
    """Plots loss terms and accuracy of one or several runs against their epochs, in `curves.png`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(runs), 7), layout="constrained")
    axes = figure.subplots(2, len(runs), squeeze=False)
    for column, (name, place) in enumerate(sorted(runs.items(), reverse=True)):
        lines = read_metrics(place)
        train = [line for line in lines if line["kind"] == "train"]
        scores = evaluations(lines)
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


def _logits(model: Model, images: Array) -> Array:
    logits: Array = model.module.apply(model.variables, images)[0]
    return logits


def _draw_examples(folder: pathlib.Path, model: Model, pixels: np.ndarray, class_names: Sequence[str]) -> None:
    """Draws the token maps of the student's kept tokens, for the first images of the evaluation split."""
    if not isinstance(model.arch, Architecture) or not model.arch.is_slimmed:
        return
    maps = model_token_maps(model, pixels[:_PICTURES_SHOWN])
    titles = [f"says {class_names[index]}" for index in maps.logits.argmax(axis=1)]
    draw_slimming(folder / SLIMMING, pixels[:_PICTURES_SHOWN], maps, titles)
