"""Charts of a report as Plotly figures, each with its values as an accessible table."""

import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from sit_jax.config import JsonObject
from sit_jax.report.evaluation import EvalReport
from sit_jax.report.load_run import Line, RunInfo

Scale = Literal["log", "percent"]
# Name -> optimizer step -> value, in the order of the steps.
Curves = dict[str, dict[int, float]]

# Order of the loss terms; keys of the metrics that are neither listed here nor below are not shown.
LOSS_TERMS = ("loss", "classification", "token", "feature", "logits", "hard", "token_label")
ACCURACIES = ("top1", "top5", "ema_top1", "ema_top5")
SIMILARITIES = tuple(f"{part}{name}" for part in ("", "ema_") for name in ("cosine", "agreement1", "agreement5"))
# More points than pixels would slow the page down without being visible.
_MOST_POINTS, _MOST_ROWS = 4000, 100
_FEW_POINTS = 60
# With more classes, the chart is a scatter plot, since bars would be too thin.
_MOST_BARS = 30


class Chart(NamedTuple):
    """A chart with its description in one or two sentences, and its values as the headings and rows of a table.

    `key` is unique within the page: letters, digits and hyphens. `figure` is Plotly's `data` and `layout`; the page
    sets the colors. `note` states what the chart or the table omits.
    """

    key: str
    title: str
    summary: str
    figure: JsonObject
    headings: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    note: str = ""


def run_charts(run: RunInfo, key: str) -> list[Chart]:
    """Returns charts of loss terms, accuracy or similarity, learning rates and gradient norm of one run."""
    losses = _curves(run.train, LOSS_TERMS) | _curves(run.scores, ["loss"], "{} (evaluation)")
    accuracies = _curves(run.scores, ACCURACIES) | _curves(run.train, ["accuracy"], "training {}")
    charts = [
        _chart(f"{key}-loss", "Loss, and its terms before weighting", losses, "log"),
        _chart(f"{key}-accuracy", "Accuracy", accuracies, "percent"),
        _chart(f"{key}-similarity", "Similarity to the teacher", _curves(run.scores, SIMILARITIES), "percent"),
        _chart(f"{key}-rate", "Learning rates", _curves(run.train, _learning_rates(run.train)), "log"),
        _chart(f"{key}-norm", "Gradient norm", _curves(run.train, ["grad_norm"]), "log"),
    ]
    return [chart for chart in charts if chart is not None]


def comparing_charts(runs: Sequence[RunInfo], key: str) -> list[Chart]:
    """Returns one chart per quantity of the runs, with the curves of all runs."""

    def compare(kind: Literal["scores", "train"], name: str, title: str, scale: Scale, part: str = "") -> Chart | None:
        curves = {run.name: _points(getattr(run, kind), name) for run in runs}
        return _chart(f"{key}-{re.sub('[_/]', '-', part or name)}", title, curves, scale)

    titles = {name: f"Training: {name} term, before weighting" for name in LOSS_TERMS} | {"loss": "Training: loss"}
    titles |= {name: f"Learning rate: {name[3:]}" for run in runs for name in _learning_rates(run.train)}
    charts = [
        *(compare("scores", name, f"Evaluation: {name}", "percent") for name in (*ACCURACIES, *SIMILARITIES)),
        compare("scores", "loss", "Evaluation: loss", "log", part="evaluation-loss"),
        *(compare("train", name, title, "log") for name, title in titles.items()),
    ]
    return [chart for chart in charts if chart is not None]


def class_chart(evaluation: EvalReport, key: str) -> Chart | None:
    """Returns a chart of the accuracy of each class: bars, or a scatter plot for many classes; None without images."""
    scores = evaluation.classes
    if not scores:
        return None
    names = [html.escape(score.name) for score in scores]
    student = [100 * score.student for score in scores]
    teacher = [100 * score.teacher for score in scores if score.teacher is not None]
    data: list[JsonObject]
    if len(scores) <= _MOST_BARS or not teacher:
        bars = {"teacher": teacher, "student": student} if teacher else {"student": student}
        hover = "%{x}: %{y:.1f}%"
        data = [{"type": "bar", "x": names, "y": y, "name": name, "hovertemplate": hover} for name, y in bars.items()]
        layout = {"barmode": "group", "xaxis": axis("class", type="category")}
        layout["yaxis"] = axis("accuracy in %", range=[0, 103])
    else:
        hover = "%{text}: teacher %{x:.1f}%, student %{y:.1f}%<extra></extra>"
        points = {"x": teacher, "y": student, "text": names, "mode": "markers", "name": "classes"}
        diagonal = {"x": [0, 100], "y": [0, 100], "mode": "lines", "name": "equal", "hoverinfo": "skip"}
        data = [{**points, "hovertemplate": hover}, diagonal]
        layout = {"xaxis": axis("teacher's accuracy in %"), "yaxis": axis("student's accuracy in %")}
    worst, best = min(scores, key=lambda x: x.student), max(scores, key=lambda x: x.student)
    summary = f"{len(scores)} classes; the student's accuracy is from {worst.student:.1%} ({worst.name})"
    summary += f" to {best.student:.1%} ({best.name})."
    return Chart(key, "Accuracy of each class", summary, figure(data, layout))


def _chart(key: str, title: str, curves: Curves, scale: Scale) -> Chart | None:
    """Returns a chart of curves over the steps, or None if there are no values."""
    if scale == "log":  # Values that a logarithmic axis cannot show would leave gaps.
        curves = {name: {step: x for step, x in points.items() if x > 0} for name, points in curves.items()}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    factor, form = (100, "{:.2%}") if scale == "percent" else (1, "{:.4g}")
    data, ends = [], []
    for name, points in curves.items():
        shown = list(points.items())[:: -(-len(points) // _MOST_POINTS)]
        data.append(
            {
                "x": [step for step, _ in shown],
                "y": [float(f"{factor * value:.6g}") for _, value in shown],
                "name": html.escape(name),
                "mode": "lines+markers" if len(points) <= _FEW_POINTS else "lines",
            }
        )
        first, last = (f"{form.format(points[step])} at step {step:,}" for step in (min(points), max(points)))
        ends.append(f"{name} from {first} to {last}")
    layout: JsonObject = {"xaxis": axis("step"), "hovermode": "x unified"}
    layout["yaxis"] = axis("%" if scale == "percent" else "", **(_log_axis(curves) if scale == "log" else {}))
    steps = sorted(set().union(*curves.values()))
    # The last step is always included, since it is the most relevant.
    kept = list(dict.fromkeys([*steps[:: -(-len(steps) // _MOST_ROWS)], steps[-1]]))
    rows = [
        [f"{step:,}", *(form.format(points[step]) if step in points else "" for points in curves.values())]
        for step in kept
    ]
    thinned = any(len(points) > _MOST_POINTS for points in curves.values())
    note = f"The chart shows at most {_MOST_POINTS:,} points of each curve. " if thinned else ""
    note += f"The table shows {len(kept)} of {len(steps):,} steps." if len(kept) < len(steps) else ""
    return Chart(key, title, "; ".join(ends) + ".", figure(data, layout), ["step", *curves], rows, note)


def _log_axis(curves: Curves) -> JsonObject:
    """Returns a logarithmic axis with sparse labels; Plotly's default of one per digit does not fit."""
    values = [value for points in curves.values() for value in points.values()]
    decades = math.log10(max(values) / min(values))
    ticks: JsonObject = {} if decades < 1 else {"dtick": "D2"} if decades < 3 else {"dtick": 1}
    return {"type": "log", "tickformat": "~g", **ticks}


def axis(title: str, **values: Any) -> JsonObject:
    """Returns an axis of a Plotly layout."""
    return {"title": {"text": title}, **values}


def _curves(lines: list[Line], names: Iterable[str], label: str = "{}") -> Curves:
    return {label.format(name): _points(lines, name) for name in names}


def _points(lines: list[Line], name: str) -> dict[int, float]:
    return {int(line["step"]): line[name] for line in lines if name in line}


def _learning_rates(lines: list[Line]) -> list[str]:
    return list(dict.fromkeys(key for line in lines for key in line if key.startswith("lr/")))


def figure(data: list[JsonObject], layout: JsonObject) -> JsonObject:
    """Returns a Plotly figure in the layout of all charts, except for the values of `layout`.

    A trace's `meta` may have `series`, the number of its color and dashes, if not its index, and `muted`, for grey.
    """
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    margin = {"l": 55, "r": 12, "t": 12, "b": 48}
    common = {"margin": margin, "height": 340, "legend": legend, "showlegend": len(data) > 1}
    return {"data": data, "layout": {**common, **layout}}
