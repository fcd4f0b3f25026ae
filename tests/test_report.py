"""`sit report`: what is gathered, what is found, and pages of runs that are not whole."""

import base64
import dataclasses
import datetime
import hashlib
import html
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
import tiny

from sit_jax.analysis.flops import count_cost
from sit_jax.cli import app as cli
from sit_jax.data.registry import open_source
from sit_jax.data.transforms import EvalTransform
from sit_jax.io.load import load_run
from sit_jax.io.runs import read_config, write_json
from sit_jax.report.charts import comparing_charts, run_charts
from sit_jax.report.evaluation import evaluate
from sit_jax.report.load_run import read_run, read_runs
from sit_jax.report.page import ABSENT, RunView, differences, render

SUMMARY = {
    "teacher": {"top1": 0.25, "params": 12345, "gmac": 0.002, "images_per_s": 1000.0},
    "student": {"top1": 0.125, "params": 13456, "gmac": 0.001, "images_per_s": 1500.0},
    "images_per_s_measured": "batch of 64, float32, cpu",
}


class Elements(html.parser.HTMLParser):
    """The elements of a page: name and attributes, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts = re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL)
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def finished(digits_run: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run of 22 steps with its summary."""
    folder = tmp_path_factory.mktemp("report") / "digits"
    shutil.copytree(digits_run, folder)
    write_json(folder / "summary.json", SUMMARY)
    return folder


@pytest.fixture(scope="module")
def page(finished: pathlib.Path) -> str:
    """The page that the command writes about the run."""
    return report(finished, "--examples", "3")


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
    assert (run.name, bool(run.summary), run.step, run.total_steps) == ("digits", True, 22, 22)
    assert (run.entry("teacher"), run.entry("student")) == (SUMMARY["teacher"], SUMMARY["student"])
    assert [line["step"] for line in run.train] == [5, 10, 15, 20, 22]
    assert run.teachers["teacher"].step == 11
    lines = [{"step": 10.0 * i, "time": 5.0 * i + (100 if i > 2 else 0)} for i in range(6)]
    # The long evaluation does not count.
    assert dataclasses.replace(run, train=lines).training_rate == pytest.approx(10 * 128 / 5)
    titles = [chart.title for chart in run_charts(run, "run")]
    assert titles == ["Loss, and its terms before weighting", "Accuracy", "Learning rates", "Gradient norm"]
    loss = run_charts(run, "run")[0]
    assert loss.headings == ["step", "loss", "classification", "token", "logits", "loss (evaluation)"]
    last = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-2])
    assert loss.rows[-1][:3] == ["22", f"{last['loss']:.4g}", f"{last['classification']:.4g}"]
    assert loss.figure["data"][2]["y"][-1] == pytest.approx(last["token"], rel=1e-5)


def test_findings_against_numpy(finished: pathlib.Path) -> None:
    found = evaluate(read_run(finished), examples=5)
    data = read_config(finished).data
    source = open_source(data, data.eval_split)
    examples = [source[index] for index in range(len(source))]
    labels = np.array([example.label for example in examples])
    transform = EvalTransform(data, (32, 32), 1)
    pixels = np.stack([transform(example)["image"] for example in examples])
    images = jnp.asarray((pixels / 255 - np.mean(data.mean)) / np.mean(data.std), jnp.float32)
    logits = {}
    for name, folder in (("student", finished), ("teacher", finished / "teacher")):
        model = load_run(folder)
        logits[name] = np.asarray(model.module.apply(model.variables, images)[0], np.float64)
    right = {name: x.argmax(axis=1) == labels for name, x in logits.items()}
    for score in found.classes:
        mine = labels == int(score.name)
        assert score.images == mine.sum()
        assert score.student == pytest.approx(right["student"][mine].mean())
        assert score.teacher == pytest.approx(right["teacher"][mine].mean())
    for (student, teacher), count in found.outcomes.items():
        assert count == ((right["student"] == student) & (right["teacher"] == teacher)).sum()
    sure = np.exp(logits["student"].max(axis=1) - np.logaddexp.reduce(logits["student"], axis=1))
    lost = np.flatnonzero(right["teacher"] & ~right["student"])
    assert len(lost) > 1  # So short a run loses something.
    assert [image.index for image in found.lost] == sorted(lost, key=lambda index: -sure[index])[:5]
    for image in found.lost:
        assert image.verdicts["student"].probability == pytest.approx(sure[image.index], rel=1e-4)
        assert image.verdicts["teacher"].name == image.label == str(labels[image.index])
    spread = [0, 90, 179, 268, 358]
    assert [image.index for image in found.examples] == spread
    assert found.maps is not None
    np.testing.assert_allclose(found.maps.logits, logits["student"][spread], rtol=1e-3, atol=1e-4)


def test_page_holds_everything_and_loads_nothing(page: str) -> None:
    parsed = Elements(page)
    for tag, attributes in parsed.found:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            value = attributes.get(name) or ""
            assert value.startswith(("#", "data:")) or not value, (tag, name, value[:80])
    # The policy allows no source but these very scripts; figures are data.
    (policy,) = [x["content"] for tag, x in parsed.found if tag == "meta" and "http-equiv" in x]
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    hashes = {base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in parsed.scripts[1:]}
    assert len(parsed.scripts) == 3
    assert set(re.findall(r"'sha256-([^']+)'", policy)) == hashes
    figures = json.loads(parsed.scripts[0])
    plots = [attributes["data-figure"] for _, attributes in parsed.found if "data-figure" in attributes]
    assert sorted(plots, key=str) == sorted(figures)
    assert len(plots) == 4 + 4 + 1  # Student, teacher, classes.
    assert all(attributes["alt"] for tag, attributes in parsed.found if tag == "img")
    assert len([attributes for _, attributes in parsed.found if "data-stage" in attributes]) == 3 * 2
    assert all(attributes["scope"] for tag, attributes in parsed.found if tag == "th")
    assert [text in page for text in ("12.50%", "12,345", "What is missing")] == [True, True, False]


def test_run_that_goes_on(finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = copy(finished, tmp_path)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "22")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)[:4]
    (folder / "metrics.jsonl").write_text("".join(lines) + '{"step": 20, "kind": "tr')
    run = read_run(folder)
    assert ["15 of 22" in run.missing[0], run.missing[1].startswith("metrics.jsonl: ")] == [True, True]
    cost = count_cost(tiny.SLIMMED)
    expected = {"top1": json.loads(lines[2])["top1"], "params": cost.params, "gmac": cost.gmac, "images_per_s": None}
    assert run.entry("student") == expected
    text = report(folder, "--no_model")
    assert "step 15 of 22" in text
    assert "The model was not evaluated (--no_model)" in text


@pytest.mark.parametrize("breakage", reports.BREAKAGES.values(), ids=reports.BREAKAGES)
def test_broken_run(breakage: reports.Breakage, finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = copy(finished, tmp_path)
    breakage.apply(folder)
    sentences = " ".join(read_run(folder).missing)
    assert all(fact in sentences for fact in breakage.facts), sentences


NO_DATA = reports.Breakage(reports.configure("data", name="cifar100", data_dir="/nowhere"), ("cifar100", "/nowhere"))


@pytest.mark.parametrize(("breakage", "has_model"), [(reports.BREAKAGES["no teacher"], True), (NO_DATA, False)])
def test_page_of_a_broken_run(
    breakage: reports.Breakage, has_model: bool, finished: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = copy(finished, tmp_path)
    breakage.apply(folder)
    text = report(folder, "--examples", "1")
    assert all(fact in html.unescape(text) for fact in ("What is missing", *breakage.facts))
    assert ("Where the tokens look" in text) == ("Accuracy of each class" in text) == has_model


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
    reports.configure("optim", lr=0.002)(other)
    runs = read_runs([finished, other])
    # As many parts of the path as it takes.
    assert [run.name for run in runs] == [f"{finished.parent.name}/digits", "elsewhere/digits"]
    assert differences(runs) == {"optim.lr": ("0.001", "0.002")}
    charts = {chart.title: chart for chart in comparing_charts(runs, "all")}
    assert {"Evaluation: top1", "Training: loss", "Learning rate: rtsm"} <= set(charts)
    assert [x["name"] for x in charts["Training: loss"].figure["data"]] == [run.name for run in runs]
    output = tmp_path / "new folder" / "both.html"
    assert cli.main(["report", str(finished), str(other), "--no_model", "--output", str(output)]) == 0
    text = output.read_text()
    assert "<code>optim.lr</code>" in text
    assert "elsewhere/digits" in text


def test_runs_without_a_configuration_are_not_compared(tmp_path: pathlib.Path) -> None:
    for name, values in (("one", {"seed": 1, "epochs": 2}), ("two", {"seed": 2, "epochs": 2}), ("lost", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("")
        if values:
            write_json(tmp_path / name / "config.json", values)
    one, two, lost = read_runs([tmp_path / name for name in ("one", "two", "lost")])
    assert differences([one, two, lost]) == {"seed": ("1", "2", ABSENT)}
    assert differences([one, lost]) == {}
    views = [RunView(f"run-{number}", run, None) for number, run in enumerate([one, lost])]
    assert "no configuration can be read for lost." in render(views, datetime.datetime.now(datetime.UTC))


def test_page_of_a_run_with_nothing_to_show(tmp_path: pathlib.Path, capsys: Any) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")  # Not UTF-8.
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("")
    text = report(folder, "--no_model")
    assert "<h1>caf?</h1>" in text
    assert "No metrics have been written yet." in text
    assert len(text) < 100_000  # No charts, no library.
    assert f"Written: {tmp_path}/caf" in capsys.readouterr().out


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
    (curve,) = chart.figure["data"]
    assert (len(curve["x"]), len(chart.rows)) == (3000, 101)
    assert chart.rows[-1] == ["9,000", f"{1 / 9000:.4g}"]
    assert chart.headings == ["step", "loss"]
    assert "8,998 steps" in chart.note


def test_text_of_users_stays_text(finished: pathlib.Path) -> None:
    text = reports.hostile_page(finished)
    # Right is what has the right class, not its name.
    assert '<span class="wrong">student: &lt;script&gt;' in text
    assert '<span class="right">teacher: 7' in text
    page = Elements(text)
    assert len(page.scripts) == 3
    assert not [attributes for _, attributes in page.found if any(name.startswith("on") for name in attributes)]
    assert all((x.get("src") or "data:").startswith("data:") for _, x in page.found)
    assert "<" not in page.scripts[0]
    names = json.loads(page.scripts[0])["run-1-classes"]["data"][0]["x"]
    assert names[0] == html.escape(reports.HOSTILE)  # Plotly reads entities, and some elements too.
