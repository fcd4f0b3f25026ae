"""Charts of a report as Plotly figures, each with its values as an accessible table."""

import dataclasses
import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import plotly.graph_objects as go

from sit_jax.config import JsonObject
from sit_jax.report.evaluation import EvalReport
from sit_jax.report.load_run import Line, RunInfo

Scale = Literal["linear", "log", "percent"]

# Order of the loss terms; keys of the metrics that are neither listed here nor below are not shown.
LOSS_TERMS = ("loss", "classification", "token", "logits", "hard", "token_label")
ACCURACIES = ("top1", "top5", "ema_top1", "ema_top5")
# More points than pixels would slow the page down without being visible.
_MOST_POINTS, _MOST_ROWS = 4000, 100
_FEW_POINTS = 60
# With more classes, the chart is a scatter plot, since bars would be too thin.
_MOST_BARS = 30


class Series(NamedTuple):
    """A curve: optimizer step -> value, in the order of the steps."""

    name: str
    points: dict[int, float]


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart with its description in one or two sentences, and its values as the headings and rows of a table.

    `key` is unique within the page: letters, digits and hyphens. `figure` is Plotly's `data` and `layout`, as plain
    values; the page sets the colors. `note` states what the chart or the table omits.
    """

    key: str
    title: str
    summary: str
    figure: JsonObject
    headings: list[str]
    rows: list[list[str]]
    note: str


def run_charts(run: RunInfo, key: str) -> list[Chart]:
    """Returns charts of loss terms, accuracy, learning rates and gradient norm of one run."""
    losses = [*_all_of(run.train, LOSS_TERMS), *_all_of(run.scores, ("loss",), "{} (evaluation)")]
    accuracies = [*_all_of(run.scores, ACCURACIES), *_all_of(run.train, ("accuracy",), "training {}")]
    rates = _all_of(run.train, _with_prefix(run.train, "lr/"))
    norms = _all_of(run.train, ("grad_norm",))
    charts = [
        _curves(f"{key}-loss", "Loss, and its terms before weighting", losses, "log"),
        _curves(f"{key}-accuracy", "Accuracy", accuracies, "percent"),
        _curves(f"{key}-rate", "Learning rates", rates, "log"),
        _curves(f"{key}-norm", "Gradient norm", norms, "log"),
    ]
    return [chart for chart in charts if chart is not None]


def comparing_charts(runs: Sequence[RunInfo], key: str) -> list[Chart]:
    """Returns one chart per quantity of the runs, with the curves of all runs."""

    def compare(lines: list[list[Line]], name: str, title: str, scale: Scale, part: str = "") -> Chart | None:
        series = [_series(own, name, run.name) for own, run in zip(lines, runs, strict=True)]
        return _curves(f"{key}-{re.sub('[_/]', '-', part or name)}", title, series, scale)

    scores, trained = [run.scores for run in runs], [run.train for run in runs]
    titles = {name: f"Training: {name} term, before weighting" for name in LOSS_TERMS} | {"loss": "Training: loss"}
    titles |= {name: f"Learning rate: {name[3:]}" for lines in trained for name in _with_prefix(lines, "lr/")}
    charts = [
        *(compare(scores, name, f"Evaluation: {name}", "percent") for name in ACCURACIES),
        compare(scores, "loss", "Evaluation: loss", "log", part="evaluation-loss"),
        *(compare(trained, name, title, "log") for name, title in titles.items()),
    ]
    return [chart for chart in charts if chart is not None]


def class_chart(evaluation: EvalReport, key: str) -> Chart | None:
    """Returns a chart of the accuracy of each class: bars, or a scatter plot for many classes; None without images."""
    scores = evaluation.classes
    if not scores:
        return None
    paired = all(score.teacher is not None for score in scores)
    names = [html.escape(score.name) for score in scores]
    student = [100 * score.student for score in scores]
    teacher = [100 * score.teacher for score in scores if score.teacher is not None]
    figure = go.Figure()
    if len(scores) <= _MOST_BARS or not paired:
        for name, values in (("teacher", teacher if paired else []), ("student", student)):
            if values:
                figure.add_bar(x=names, y=values, name=name, hovertemplate="%{x}: %{y:.1f}%")
        figure.update_layout(barmode="group", xaxis={"title": {"text": "class"}, "type": "category"})
        figure.update_layout(yaxis={"title": {"text": "accuracy in %"}, "range": [0, 103]})
    else:
        hover = "%{text}: teacher %{x:.1f}%, student %{y:.1f}%<extra></extra>"
        figure.add_scatter(x=teacher, y=student, text=names, mode="markers", name="classes", hovertemplate=hover)
        figure.add_scatter(x=[0, 100], y=[0, 100], mode="lines", name="equal", hoverinfo="skip")
        figure.update_layout(xaxis={"title": {"text": "teacher's accuracy in %"}})
        figure.update_layout(yaxis={"title": {"text": "student's accuracy in %"}})
    worst, best = min(scores, key=lambda x: x.student), max(scores, key=lambda x: x.student)
    summary = f"{len(scores)} classes; the student's accuracy is from {worst.student:.1%} ({worst.name})"
    summary += f" to {best.student:.1%} ({best.name})."
    return Chart(key, "Accuracy of each class", summary, _plain(figure), [], [], "")


def _curves(key: str, title: str, series: list[Series], scale: Scale) -> Chart | None:
    """Returns a chart of curves over the steps, or None if there are no values."""
    if scale == "log":  # Values that a logarithmic axis cannot show would leave gaps.
        series = [Series(name, {step: x for step, x in points.items() if x > 0}) for name, points in series]
    series = [one for one in series if one.points]
    if not series:
        return None
    factor = 100 if scale == "percent" else 1
    figure = go.Figure()
    for name, points in series:
        every = -(-len(points) // _MOST_POINTS)
        figure.add_scatter(
            x=list(points)[::every],
            y=[float(f"{factor * value:.6g}") for value in list(points.values())[::every]],
            name=html.escape(name),
            mode="lines+markers" if len(points) <= _FEW_POINTS else "lines",
        )
    axis = _log_axis(series) if scale == "log" else {}
    figure.update_layout(
        xaxis={"title": {"text": "step"}},
        yaxis={"title": {"text": "%" if scale == "percent" else ""}, **axis},
        hovermode="x unified",
    )
    rows, table_note = _table(series, scale)
    thinned = any(len(one.points) > _MOST_POINTS for one in series)
    note = f"The chart shows at most {_MOST_POINTS:,} points of each curve. " if thinned else ""
    ends = []
    for name, points in series:
        first, last = (f"{_show(points[step], scale)} at step {step:,}" for step in (min(points), max(points)))
        ends.append(f"{name} from {first} to {last}")
    headings = ["step", *(one.name for one in series)]
    return Chart(key, title, "; ".join(ends) + ".", _plain(figure), headings, rows, note + table_note)


def _log_axis(series: list[Series]) -> JsonObject:
    """Returns a logarithmic axis with sparse labels; Plotly's default of one per digit does not fit."""
    values = [value for one in series for value in one.points.values()]
    decades = math.log10(max(values) / min(values))
    ticks: JsonObject = {} if decades < 1 else {"dtick": "D2"} if decades < 3 else {"dtick": 1}
    return {"type": "log", "tickformat": "~g", **ticks}


def _table(series: list[Series], scale: Scale) -> tuple[list[list[str]], str]:
    steps = sorted({step for one in series for step in one.points})
    every = -(-len(steps) // _MOST_ROWS)
    # The last step is always included, since it is the most relevant.
    kept = steps[::every] if steps[::every][-1] == steps[-1] else [*steps[::every], steps[-1]]
    rows = [
        [f"{step:,}", *(_show(one.points[step], scale) if step in one.points else "" for one in series)]
        for step in kept
    ]
    return rows, f"The table shows {len(kept)} of {len(steps):,} steps." if every > 1 else ""


def _show(value: float, scale: Scale) -> str:
    return f"{value:.2%}" if scale == "percent" else f"{value:.4g}"


def _all_of(lines: list[Line], names: Iterable[str], label: str = "{}") -> list[Series]:
    """Returns a curve for each name that any line has."""
    found = [_series(lines, name, label.format(name)) for name in names]
    return [one for one in found if one.points]


def _series(lines: list[Line], name: str, label: str) -> Series:
    return Series(label, {int(line["step"]): line[name] for line in lines if name in line})


def _with_prefix(lines: list[Line], prefix: str) -> list[str]:
    return list(dict.fromkeys(key for line in lines for key in line if key.startswith(prefix)))


def _plain(figure: go.Figure) -> JsonObject:
    """Returns Plotly's `data` and `layout` without its default theme."""
    figure.update_layout(
        template=go.layout.Template(),
        margin={"l": 55, "r": 12, "t": 12, "b": 48},
        height=340,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        showlegend=len(figure.data) > 1,
    )
    values: JsonObject = figure.to_plotly_json()
    return values
