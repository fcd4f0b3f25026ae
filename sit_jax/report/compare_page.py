"""The page of `sit compare`: accuracy of token reducers against their cost and speed."""

import datetime
import html
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jinja2 import TemplateError

from sit_jax.analysis.compare import TEACHER, pareto_front
from sit_jax.analysis.table import cell
from sit_jax.config import JsonObject
from sit_jax.data.sources import writing
from sit_jax.errors import RunError
from sit_jax.io.atomic_write import atomic_replace
from sit_jax.report.charts import Chart, axis, figure
from sit_jax.report.page import ABSENT, fill

# A reducer is told by its color and its symbol, an objective by its dashes and the filling of the symbol.
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "pentagon", "hexagram")
_FILLINGS = {"frd": "", "ce": "-open", "untrained": "-open-dot"}
_DASHES = {"frd": "solid", "ce": "dash", "untrained": "dot"}
_SIZE, _RING = 11, 20
_FRONT = "Pareto front"


class Mark(NamedTuple):
    """A model in a chart: its cost or speed, its accuracy and the spread of that over seeds in percent, and texts."""

    x: float
    y: float
    least: float
    most: float
    name: str
    more: str = ""


def write_page(result: JsonObject, output: pathlib.Path, key: str) -> None:
    """Writes the page of a comparison, the contents of `compare.json`.

    Raises:
        UserError: The page cannot be written (`key` is the option that names its place), or the contents are damaged.
    """
    try:
        page = render_comparison(result, datetime.datetime.now(datetime.UTC))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, TemplateError) as error:
        raise RunError(f"compare.json is damaged ({type(error).__name__}: {error}); sit compare writes it") from None
    with writing(output, key=key), atomic_replace(output) as part:
        part.write_text(page, encoding="utf-8", errors="replace")


def render_comparison(result: JsonObject, made: datetime.datetime) -> str:
    """Returns the HTML page of a comparison, created at the time `made`."""
    batches = list(result["teacher"]["images_per_s"])
    charts = [_cost_chart(result), *(_speed_chart(result, batch) for batch in batches)]
    headings = ["of the teacher's", "top-1", "spread", "seeds", "Pareto front"]
    headings = ["reducer", "keep ratio", "objective", "tokens", "GMAC", *headings, *(f"batch {x}" for x in batches)]
    return fill(
        "compare.html",
        made,
        charts,
        title=f"Token reducers compared: {result['page']}",
        verb="sit compare",
        headings=headings,
        rows=_table(result, batches),
        result=result,
    )


def _table(result: JsonObject, batches: Sequence[str]) -> list[list[str]]:
    teacher, rows = result["teacher"], result["rows"]
    front = pareto_front([(line["gmac"], line["top1"]) for line in (teacher, *rows)])
    whole = {"reducer": TEACHER, "keep_ratio": ABSENT, "objective": ABSENT, "tokens": [], "seeds": {}}
    table = []
    for line, is_front in zip(({**whole, **teacher}, *rows), front, strict=True):
        table.append(
            [
                line["reducer"],
                str(line["keep_ratio"]),
                line["objective"],
                "/".join(map(str, line["tokens"])) or ABSENT,
                f"{line['gmac']:.4g}",
                f"{line['gmac'] / teacher['gmac']:.1%}",
                cell(line["top1"], "{:.2%}") or "failed",
                _spread(line) or ABSENT,
                str(len(line["seeds"]) or ABSENT),
                "yes" if is_front else "no",
                *(f"{line['images_per_s'][batch]:,.0f}" for batch in batches),
            ]
        )
    return table


def _spread(line: JsonObject) -> str:
    return f"{line['least']:.2%} to {line['most']:.2%}" if len(line["seeds"]) > 1 else ""


def _cost_chart(result: JsonObject) -> Chart:
    marks = [
        Mark(entry["gmac"], *3 * (100 * entry["top1"],), f"{entry['name']}, reported") for entry in result["reported"]
    ]
    data = _traces(result, lambda line: float(line["gmac"]), more_is_better=False)
    if marks:
        data.append({**_trace(marks, "reported", symbol="cross-open"), "mode": "markers", "meta": {"muted": True}})
    return _chart("cost", "Accuracy against cost", "GMAC per image", data)


def _speed_chart(result: JsonObject, batch: str) -> Chart:
    data = _traces(result, lambda line: float(line["images_per_s"][batch]), more_is_better=True)
    title = f"Accuracy against measured speed, batch {batch}"
    return _chart(f"speed-{batch}", title, "images/s", data)


def _chart(key: str, title: str, label: str, data: list[JsonObject]) -> Chart:
    front = next(trace for trace in data if trace["name"] == _FRONT)
    summary = f"On the Pareto front: {'; '.join(front['text'])}."
    layout = {"xaxis": axis(label), "yaxis": axis("top-1 in %", **_frame(data)), "height": 480}
    return Chart(key, title, html.unescape(summary), figure(data, layout))


def _frame(data: list[JsonObject]) -> JsonObject:
    """Returns the range of the accuracies, without untrained models that are far below all others."""
    drawn = {trace["name"]: trace["y"] for trace in data if trace["name"] != _FRONT}
    trained = [y for name, values in drawn.items() if not name.endswith(", untrained") for y in values]
    margin = 0.2 * (max(trained) - min(trained))
    least = min(trained) - margin
    everything = [y for values in drawn.values() for y in values]
    return {"range": [least, max(everything) + margin]} if margin and min(everything) < least else {}


def _traces(result: JsonObject, value: Callable[[JsonObject], float], more_is_better: bool) -> list[JsonObject]:
    """Returns the Pareto front, the teacher, and each reducer by each objective; `value` is that of the x axis."""
    rows = [row for row in result["rows"] if row["top1"] is not None]
    teacher = {**result["teacher"], "seeds": {}, "least": result["teacher"]["top1"], "most": result["teacher"]["top1"]}
    marks = {TEACHER: [_mark(teacher, TEACHER, value)]}
    looks: dict[str, tuple[str, str, int]] = {}
    reducers = list(dict.fromkeys(row["reducer"] for row in result["rows"]))
    for row in rows:
        name = f"{row['reducer']}, {row['objective']}"
        text = f"{row['reducer']}, keep ratio {row['keep_ratio']}, {row['objective']}"
        marks.setdefault(name, []).append(_mark(row, text, value))
        series = reducers.index(row["reducer"])
        symbol = _SYMBOLS[series % len(_SYMBOLS)] + _FILLINGS[row["objective"]]
        looks[name] = symbol, _DASHES[row["objective"]], series
    every = sorted(mark for group in marks.values() for mark in group)
    front = pareto_front([(mark.x, mark.y) for mark in every], more_is_better)
    best = [mark._replace(more="") for mark, is_front in zip(every, front, strict=True) if is_front]
    ring = _trace(best, _FRONT, "circle-open", "dot")
    ring["marker"]["size"] = _RING
    muted = {"hoverinfo": "skip", "hovertemplate": None, "meta": {"muted": True}}
    data = [{**ring, **muted}, {**_trace(marks[TEACHER], TEACHER, "star"), "meta": {"muted": True}}]
    for name, (symbol, dash, series) in looks.items():
        group = sorted(marks[name])
        trace = _trace(group, name, symbol, dash)
        errors = {"arrayminus": [x.y - x.least for x in group], "array": [x.most - x.y for x in group]}
        if any(map(any, errors.values())):
            trace["error_y"] = {"type": "data", "symmetric": False, **errors}
        data.append({**trace, "meta": {"series": series}})
    return data


def _mark(line: JsonObject, name: str, value: Callable[[JsonObject], float]) -> Mark:
    spread = f" ({_spread(line)}, {len(line['seeds'])} seeds)" if _spread(line) else ""
    speeds = ", ".join(f"{speed:,.0f} images/s at batch {batch}" for batch, speed in line["images_per_s"].items())
    more = f"{spread}, {line['gmac']:.4g} GMAC, {speeds}"
    return Mark(value(line), 100 * line["top1"], 100 * line["least"], 100 * line["most"], name, more)


def _trace(marks: Sequence[Mark], name: str, symbol: str, dash: str = "solid") -> JsonObject:
    return {
        "x": [mark.x for mark in marks],
        "y": [mark.y for mark in marks],
        "text": [html.escape(f"{mark.name}: {mark.y:.2f}%{mark.more}") for mark in marks],
        "name": html.escape(name),
        "mode": "lines+markers",
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"symbol": symbol, "size": _SIZE},
        "line": {"dash": dash},
    }
