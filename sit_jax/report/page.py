"""Renders the report: inserts the loaded and evaluated runs into the template, with all resources inline."""

import base64
import datetime
import hashlib
import importlib.metadata
import importlib.resources
import itertools
import json
import platform
from collections.abc import Sequence

import jinja2
import plotly.offline
from flax.traverse_util import empty_node, flatten_dict
from markupsafe import Markup

from sit_jax import __version__
from sit_jax.analysis.table import cell
from sit_jax.config import JsonObject
from sit_jax.report.charts import Chart, class_chart, comparing_charts, run_charts
from sit_jax.report.evaluation import EvalReport
from sit_jax.report.images import show_examples, show_image, show_similar, stage_titles
from sit_jax.report.load_run import RunInfo, finite

# Maximum number of rows in the table of classes; otherwise, only the largest losses and gains are shown.
_MOST_CLASSES = 400
_TIME = "%Y-%m-%d %H:%M UTC"
ABSENT = "\N{EN DASH}"


class RunView:
    """A run in the form that the template uses, with all charts, images and texts.

    `key` is unique within the page: `run-1`. `evaluation` is None if the model was not evaluated. `lost` are images
    that only the teacher classifies correctly; `similar` are images with their nearest neighbours.
    `class_rows` have the largest losses first; for many classes, only both
    ends. `data` and `environment` are pairs of name and value, `sections` is the configuration.
    """

    def __init__(self, key: str, run: RunInfo, evaluation: EvalReport | None) -> None:
        self.key, self.run, self.evaluation = key, run, evaluation
        self.charts = run_charts(run, key)
        self.teacher_charts = {
            name: run_charts(teacher, f"{key}-{name.replace('_', '-')}") for name, teacher in run.teachers.items()
        }
        self.classes = class_chart(evaluation, f"{key}-classes") if evaluation else None
        scores = sorted(evaluation.classes, key=lambda x: (x.change, x.student)) if evaluation else []
        half = _MOST_CLASSES // 2
        self.class_rows = scores if len(scores) <= _MOST_CLASSES else scores[:half] + scores[-half:]
        self.examples = show_examples(evaluation) if evaluation else []
        self.stages = stage_titles(evaluation.maps) if evaluation and evaluation.maps else []
        self.lost = [(image, show_image(image)) for image in evaluation.lost] if evaluation else []
        self.similar = [show_similar(x) for x in evaluation.similar] if evaluation else []
        self.data = _data_rows(run)
        self.environment = _environment_rows(run)
        self.sections = _sections(run.values)

    @property
    def all_charts(self) -> list[Chart]:
        """All charts of the run."""
        own = [*self.charts, *itertools.chain(*self.teacher_charts.values()), self.classes]
        return [chart for chart in own if chart is not None]


def render(views: Sequence[RunView], made: datetime.datetime, overview: bool = False) -> str:
    """Returns the HTML page, created at the time `made`; `overview` links to `../index.html`, of `sit compare`."""
    runs = [view.run for view in views]
    several = len(views) > 1
    comparing = comparing_charts(runs, "compared") if several else []
    return fill(
        "page.html",
        made,
        [*comparing, *(chart for view in views for chart in view.all_charts)],
        title=f"{len(views)} runs compared" if several else runs[0].name,
        verb="sit report",
        views=views,
        several=several,
        comparing=comparing,
        differences=differences(runs) if several else {},
        unread=[run.name for run in runs if not run.values],
        overview=overview,
    )


def fill(template: str, made: datetime.datetime, charts: Sequence[Chart], **values: object) -> str:
    """Returns the page of a template that extends `base.html`, with all resources inline.

    Args:
        template: The template's file name.
        made: The time at which the page was created.
        charts: The charts that the template shows, a variable of it as well.
        **values: The variables of the template: `title`, `verb` (the command that makes the page), and its own.
    """
    plotly_code, own_code = _script(plotly.offline.get_plotlyjs()), _script(_source("page.js"))
    versions = [(name, importlib.metadata.version(name)) for name in ("jax", "plotly", "Jinja2")]
    page = _environment().get_template(template)
    return page.render(
        charts=charts,
        figures={chart.key: chart.figure for chart in charts},
        style=Markup(_source("style.css")),
        plotly_code=plotly_code if charts else Markup(""),
        own_code=own_code,
        script_hashes=" ".join(_hash(code) for code in (plotly_code, own_code)),
        made=made.strftime(_TIME),
        maker=[("sit_jax", __version__), ("python", platform.python_version()), *versions],
        **values,
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sit_jax.report", "templates"),
        autoescape=True,  # Class names, folders and configurations may contain any text.
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=lambda value: cell(value, "{:.2%}") or ABSENT,
        cosine=lambda value: cell(value, "{:.4f}") or ABSENT,
        count=lambda value: cell(value, "{:,.0f}") or ABSENT,
        mac=mac,
        ratio=ratio,
    )
    return environment


def ratio(above: float | None, below: float | None) -> str:
    """Formats the ratio of two numbers; empty if one is missing."""
    return ABSENT if above is None or not below else f"{above / below:.2f}"


def mac(gmac: float | None) -> str:
    """Formats multiply-accumulates with a suitable unit."""
    if gmac is None:
        return ABSENT
    return f"{gmac:.3g} GMAC" if gmac >= 0.1 else f"{gmac * 1e3:.3g} MMAC"


def _day(seconds: float) -> str:
    """Formats a time in seconds since 1970, in UTC."""
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime(_TIME)
    except (OverflowError, OSError, ValueError):
        return ABSENT


def _data_rows(run: RunInfo) -> list[tuple[str, str]]:
    config = run.config
    if config is None:
        return []
    arch, data = config.model.architecture, config.data
    examples = run.scores[-1].get("examples") if run.scores else None
    noted = run.metadata.get("data")
    position = finite(noted.get("epoch")) if isinstance(noted, dict) else None
    colours = "grey" if arch.in_channels == 1 else f"{arch.in_channels} channels"
    classes = f"{arch.num_classes:,}" if arch.num_classes else "as many as the data has"
    classes = classes if run.has_labels else "labels are not used"
    rows = [
        ("data set", data.name),
        ("folder", data.data_dir or "tfds's own"),
        ("training split", data.train_split),
        ("evaluation split", data.eval_split + (f", {examples:,.0f} images" if examples else "")),
        ("classes", classes),
        ("images", f"{arch.image_shape[0]} x {arch.image_shape[1]} pixels, {colours}"),
        ("resize", f"{data.resize}, {data.interpolation}"),
        ("batch", f"{config.batch_size:,} images"),
    ]
    if run.total_steps:
        epochs = config.epochs + config.optim.cooldown_epochs
        rows.append(("steps in an epoch", f"{run.total_steps / epochs:,.0f}"))
    if position is not None:
        rows.append(("newest checkpoint", f"after {position:g} epochs of the data"))
    changed = run.metadata.get("changes")
    for x in changed if isinstance(changed, list) else []:
        if isinstance(x, dict) and x.keys() >= {"after_step", "key", "before", "now"}:
            text = f"{_show(x['key'])} {_show(x['now'])}, before {_show(x['before'])}"
            rows.append((f"changed after step {_show(x['after_step'])}", text))
    skipped = sum(line.get("skipped", 0.0) for line in run.train)
    if skipped:
        rows.append(("unreadable images", "were skipped"))
    return rows


def _environment_rows(run: RunInfo) -> list[tuple[str, str]]:
    metadata = run.metadata
    rows = [(str(name), _show(metadata[name])) for name in ("devices", "processes") if name in metadata]
    mesh, versions = metadata.get("mesh"), metadata.get("versions")
    if isinstance(mesh, dict):
        rows.append(("mesh", ", ".join(f"{axis} {_show(size)}" for axis, size in mesh.items())))
    if isinstance(versions, dict):
        rows += [(str(name), _show(version)) for name, version in versions.items()]
    measured = run.summary.get("images_per_s_measured")
    if isinstance(measured, str):
        rows.append(("images/s measured on", measured))
    times = [line["time"] for line in (*run.train, *run.scores) if "time" in line]
    if times:
        rows.append(("last metrics", _day(max(times))))
    return rows


def _sections(values: JsonObject) -> list[tuple[str, dict[str, str]]]:
    flat = {key: _show(value) for key, value in values.items() if not isinstance(value, dict)}
    sections = [(key, _flatten(value)) for key, value in values.items() if isinstance(value, dict)]
    return ([("run", flat)] if flat else []) + sections


def differences(runs: Sequence[RunInfo]) -> dict[str, tuple[str, ...]]:
    """Returns the keys in which configurations differ, in the first run's order -> one value per run, as text.

    Runs with unreadable configurations are not compared.
    """
    flat = [_flatten(run.values) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = {key: tuple(values.get(key, ABSENT) for values in flat) for key in keys}
    known = [bool(values) for values in flat]
    return {key: row for key, row in rows.items() if len(set(itertools.compress(row, known))) > 1}


def _flatten(values: JsonObject) -> dict[str, str]:
    """Flattens a nested configuration to `section.key` -> value as text."""
    flat = flatten_dict(values, keep_empty_nodes=True, sep=".")
    return {key: ABSENT if value is empty_node else _show(value) for key, value in flat.items()}


def _show(value: object) -> str:
    """Formats a value of a configuration as text."""
    if value is None or value == "" or value == {}:
        return ABSENT
    return value if isinstance(value, str) else json.dumps(value)


def _source(name: str) -> str:
    return importlib.resources.files("sit_jax.report").joinpath("templates", name).read_text(encoding="utf-8")


def _script(code: str) -> Markup:
    """Escapes code for an HTML script element, so that it cannot end the element."""
    return Markup(code.replace("\r\n", "\n").replace("\r", "\n").replace("</script", "<\\/script"))


def _hash(code: str) -> str:
    """Returns the hash of a script for a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"
