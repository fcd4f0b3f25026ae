"""`sit report`: what is gathered, what is found, and pages of runs that are not whole."""

import base64
import datetime
import hashlib
import html.parser
import json
import os
import pathlib
import re
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import reports

from sit_jax.analysis.summary import summarize
from sit_jax.cli import app as cli
from sit_jax.data.registry import open_source
from sit_jax.data.transforms import EvalTransform
from sit_jax.io.load import load_run
from sit_jax.io.runs import read_config
from sit_jax.models import build_model
from sit_jax.report.charts import comparing_charts, run_charts
from sit_jax.report.compare import ABSENT, differences
from sit_jax.report.evaluation import ClassScore, EvalImage, EvalReport, Verdict, evaluate
from sit_jax.report.load_run import RunInfo, read_run, read_runs
from sit_jax.report.page import render, view_run


class Elements(html.parser.HTMLParser):
    """The elements of a page: name and attributes, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def finished(digits_run: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run with its summary."""
    folder = tmp_path_factory.mktemp("report") / "digits"
    shutil.copytree(digits_run, folder)
    summarize(folder)
    return folder


def copy(run: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(run, tmp_path / "run"))


def report(folder: pathlib.Path, *words: str) -> str:
    """The page that the command writes about a run."""
    assert cli.main(["report", str(folder), *words]) == 0
    text = (folder / "report.html").read_text()
    assert "Traceback" not in text
    return text


def test_what_a_finished_run_says(finished: pathlib.Path) -> None:
    run = read_run(finished)
    assert run.missing == []
    assert (run.name, run.finished, run.step, run.total_steps) == ("digits", True, 22, 22)
    summary = json.loads((finished / "summary.json").read_text())
    for name in ("teacher", "student"):
        assert run.entry(name) == summary[name]
    assert [line["step"] for line in run.train] == [5, 10, 15, 20, 22]
    assert run.teachers["teacher"].step == 11
    assert set(run.metadata["versions"]) >= {"sit_jax", "jax", "flax", "python", "numpy"}
    assert run.metadata["devices"] == "8 x cpu"
    titles = [chart.title for chart in run_charts(run, "run")]
    assert titles == ["Loss, and its terms before weighting", "Accuracy", "Learning rates", "Gradient norm"]
    loss = run_charts(run, "run")[0]
    assert loss.headings == ["step", "loss", "classification", "token", "logits", "loss (evaluation)"]
    last = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-2])
    assert loss.rows[-1][:3] == ["22", f"{last['loss']:.4g}", f"{last['classification']:.4g}"]
    assert loss.figure["data"][2]["y"][-1] == pytest.approx(last["token"], rel=1e-5)


def test_findings_against_numpy(finished: pathlib.Path) -> None:
    found = evaluate(read_run(finished), examples=5)
    config, variables = read_config(finished), load_run(finished).variables
    teacher = load_run(finished / "teacher").variables
    source = open_source(config.data, "test")
    transform = EvalTransform(config.data, 32, 1)
    examples = [source[index] for index in range(len(source))]
    pixels = np.stack([transform(example)["image"] for example in examples])
    images = jnp.asarray((pixels / 255 - np.mean(config.data.mean)) / np.mean(config.data.std), jnp.float32)
    labels = np.array([example.label for example in examples])
    assert config.teacher is not None
    logits = {
        "student": np.asarray(build_model(config.model.architecture).apply(variables, images)[0], np.float64),
        "teacher": np.asarray(build_model(config.teacher.model.architecture).apply(teacher, images)[0], np.float64),
    }
    right = {name: x.argmax(axis=1) == labels for name, x in logits.items()}
    for score in found.classes:
        mine = labels == int(score.name)
        assert score.images == mine.sum()
        assert score.student == pytest.approx(right["student"][mine].mean())
        assert score.teacher == pytest.approx(right["teacher"][mine].mean())
    for (student, teacher_right), count in found.outcomes.items():
        assert count == ((right["student"] == student) & (right["teacher"] == teacher_right)).sum()
    shares = np.exp(logits["student"] - logits["student"].max(axis=1, keepdims=True))
    sure = (shares / shares.sum(axis=1, keepdims=True)).max(axis=1)
    lost = np.flatnonzero(right["teacher"] & ~right["student"])
    assert len(lost) > 1  # A run of two epochs loses something.
    expected = sorted(lost, key=lambda index: -sure[index])[:5]
    assert [image.index for image in found.lost] == expected
    for image in found.lost:
        assert image.verdicts["student"].probability == pytest.approx(sure[image.index], rel=1e-4)
        assert image.verdicts["teacher"].name == image.label == str(labels[image.index])
        assert {name: verdict.right for name, verdict in image.verdicts.items()} == {
            "student": False,
            "teacher": True,
        }
    assert [image.index for image in found.examples] == [0, 90, 179, 268, 358]
    assert found.maps is not None
    assert len(found.maps.logits) == 5
    np.testing.assert_allclose(found.maps.logits, logits["student"][[0, 90, 179, 268, 358]], rtol=1e-3, atol=1e-4)


def test_page_holds_everything_and_loads_nothing(finished: pathlib.Path, capsys: Any) -> None:
    text = report(finished, "--examples", "3")
    assert f"Written: {finished / 'report.html'}" in capsys.readouterr().out
    page = Elements(text)
    for tag, attributes in page.found:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            value = attributes.get(name) or ""
            assert value.startswith(("#", "data:")) or not value, (tag, name, value[:80])
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    # The policy allows no source but these very scripts; figures are data.
    (policy,) = [x["content"] for tag, x in page.found if tag == "meta" and "http-equiv" in x]
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    hashes = {base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in page.scripts[1:]}
    assert len(page.scripts) == 3
    assert set(re.findall(r"'sha256-([^']+)'", policy)) == hashes
    figures = json.loads(page.scripts[0])
    plots = [attributes["data-figure"] for _, attributes in page.found if "data-figure" in attributes]
    assert sorted(plots, key=str) == sorted(figures)
    assert len(plots) == 4 + 4 + 1  # Student, teacher, classes.
    images = [attributes for tag, attributes in page.found if tag == "img"]
    assert all(image["alt"] for image in images)
    stages = [attributes for _, attributes in page.found if "data-stage" in attributes]
    assert len(stages) == 3 * 2
    assert all(attributes["scope"] for tag, attributes in page.found if tag == "th")
    summary = json.loads((finished / "summary.json").read_text())
    assert f"{summary['student']['top1']:.2%}" in text
    assert f"{summary['teacher']['params']:,}" in text
    assert "What is missing" not in text


def test_run_that_goes_on(finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = copy(finished, tmp_path)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "22")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)[:4]
    (folder / "metrics.jsonl").write_text("".join(lines) + '{"step": 20, "kind": "tr')
    run = read_run(folder)
    assert ["15 of 22" in run.missing[0], run.missing[1].startswith("metrics.jsonl: ")] == [True, True]
    scores = [json.loads(line) for line in lines if '"eval"' in line]
    assert run.entry("student")["top1"] == scores[-1]["top1"]
    assert run.entry("student")["images_per_s"] is None
    assert run.entry("student")["params"] == json.loads((finished / "summary.json").read_text())["student"]["params"]
    text = report(folder, "--no_model")
    assert "step 15 of 22" in text
    assert "The model was not evaluated (--no_model)" in text


@pytest.mark.parametrize("breakage", reports.BREAKAGES.values(), ids=reports.BREAKAGES)
def test_broken_run(breakage: reports.Breakage, finished: pathlib.Path, tmp_path: pathlib.Path, capsys: Any) -> None:
    folder = copy(finished, tmp_path)
    breakage.apply(folder)
    text = report(folder, "--examples", "1")
    missing = html.unescape(text[text.index("What is missing") : text.index("</ul>", text.index("What is missing"))])
    assert all(fact in missing for fact in breakage.facts), missing
    assert ("Where the tokens look" in text) == ("Accuracy of each class" in text) == breakage.evaluated
    assert "Traceback" not in capsys.readouterr().err


def test_mistakes_are_one_line(finished: pathlib.Path, tmp_path: pathlib.Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(finished.iterdir())
    for args, fact in (
        ([tmp_path / "none"], f"{tmp_path / 'none'}: "),
        ([tmp_path / "file"], f"{tmp_path / 'file'}: "),
        ([finished, tmp_path / "empty"], f"{tmp_path / 'empty'}: "),
        ([finished, finished], f"{finished}: is given twice"),
        ([finished, "--output", finished / "config.json"], "--output: "),
        ([finished, "--no_model", "--output", tmp_path / "file" / "page.html"], "--output: "),
    ):
        assert cli.main(["report", *map(str, args)]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"sit report: {fact}")
    assert sorted(finished.iterdir()) == before


def test_several_runs(finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    other = tmp_path / "elsewhere" / "digits"
    shutil.copytree(finished, other)
    values = json.loads((other / "config.json").read_text())
    values["optim"]["lr"] = 0.002
    values["seed"] = 1
    (other / "config.json").write_text(json.dumps(values))
    runs = read_runs([finished, other])
    # As many parts of the path as it takes.
    assert [run.name for run in runs] == [f"{finished.parent.name}/digits", "elsewhere/digits"]
    assert differences(runs) == {"seed": ("0", "1"), "optim.lr": ("0.001", "0.002")}
    charts = {chart.title: chart for chart in comparing_charts(runs, "all")}
    assert {"Evaluation: top1", "Training: loss", "Learning rate: rtsm"} <= set(charts)
    assert [x["name"] for x in charts["Training: loss"].figure["data"]] == [run.name for run in runs]
    output = tmp_path / "new folder" / "both.html"
    assert cli.main(["report", str(finished), str(other), "--no_model", "--output", str(output)]) == 0
    text = output.read_text()
    assert "<code>optim.lr</code>" in text
    assert "elsewhere/digits" in text


def test_runs_without_a_configuration_are_not_compared(tmp_path: pathlib.Path) -> None:
    configurations: dict[str, Any] = {"one": {"seed": 1, "epochs": 2}, "two": {"seed": 2, "epochs": 2}, "lost": None}
    for name, values in configurations.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("")
        if values:
            (tmp_path / name / "config.json").write_text(json.dumps(values))
    one, two, lost = read_runs([tmp_path / name for name in configurations])
    assert differences([one, two, lost]) == {"seed": ("1", "2", ABSENT)}
    assert differences([one, lost]) == {}
    for runs, known in (([one, lost], False), ([one, two, lost], True), ([one, one], True)):
        views = [view_run(f"run-{number}", run, None) for number, run in enumerate(runs)]
        text = render(views, datetime.datetime.now(datetime.UTC))
        section = text[text.index("Where the configurations differ") : text.index("<h3>Curves")]
        assert ("no configuration can be read for lost." in section) == (lost in runs)
        assert ("Not known of all" in section) == (known and lost in runs)
        assert ("Nowhere." in section) == (runs == [one, one])


def test_names_that_are_not_utf8(tmp_path: pathlib.Path, capsys: Any) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": 1.0, "time": 1.0}\n')
    assert "<h1>caf?</h1>" in report(folder, "--no_model")
    assert f"Written: {tmp_path}/caf" in capsys.readouterr().out


def test_two_classes_of_one_name(finished: pathlib.Path) -> None:
    verdicts = {"student": Verdict("crane", 0.5, False), "teacher": Verdict("crane", 0.75, True)}
    image = EvalImage(0, "bird.jpg", "crane", verdicts, np.zeros((32, 32, 1), np.uint8))
    outcomes = {(mine, theirs): 0 for mine in (True, False) for theirs in (True, False)}
    evaluation = EvalReport([ClassScore("crane", 1, 0.0, 1.0)], outcomes, [], [image], None)
    text = render([view_run("run-1", read_run(finished), evaluation)], datetime.datetime.now(datetime.UTC))
    assert '<span class="wrong">student: crane, 50.00%' in text
    assert '<span class="right">teacher: crane, 75.00%' in text


def test_long_runs_are_thinned_and_odd_values_left_out(tmp_path: pathlib.Path) -> None:
    lines: list[dict[str, Any]] = [
        {"step": step, "kind": "train", "time": step / 2, "loss": 1 / step, "token": 0.0} for step in range(1, 9001)
    ]
    lines[4] |= {"loss": float("nan")}
    lines[5] |= {"loss": "1", "accuracy": True}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(tmp_path)
    assert "There is no config.json." in run.missing
    (chart,) = run_charts(run, "run")  # Token has nothing that a logarithm shows.
    assert len(chart.figure["data"]) == 1
    assert len(chart.figure["data"][0]["x"]) == 3000
    assert len(chart.rows) <= 102
    assert chart.rows[-1] == ["9,000", f"{1 / 9000:.4g}"]
    assert chart.headings == ["step", "loss"]
    assert "8,998 steps" in chart.note


def test_rate_of_training(finished: pathlib.Path) -> None:
    run = read_run(finished)
    lines = [{"step": 10.0 * i, "time": 5.0 * i + (100 if i > 2 else 0)} for i in range(6)]
    changed = RunInfo(**{**run.__dict__, "train": lines})
    assert changed.training_rate == pytest.approx(10 * 128 / 5)  # The long evaluation does not count.


def test_text_of_users_stays_text(finished: pathlib.Path) -> None:
    page = Elements(reports.hostile_page(finished))
    assert len(page.scripts) == 3
    assert "script" not in [tag for tag, _ in page.found if tag not in ("script", "noscript")]
    assert not [attributes for _, attributes in page.found if any(name.startswith("on") for name in attributes)]
    assert all((x.get("src") or "data:").startswith("data:") for _, x in page.found)
    figures = json.loads(page.scripts[0])
    names = figures["run-1-classes"]["data"][0]["x"]
    assert reports.HOSTILE not in names
    assert html.escape(reports.HOSTILE) in names  # Plotly reads entities, and some elements too.
    assert "<" not in page.scripts[0]


def test_page_without_any_run_to_speak_of(tmp_path: pathlib.Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    run = read_run(tmp_path)
    text = render([view_run("run-1", run, None)], datetime.datetime.now(datetime.UTC))
    assert "No metrics have been written yet." in text
    assert len(text) < 100_000  # No charts, no library.
