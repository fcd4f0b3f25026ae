"""Broken runs and hostile texts for the tests of `sit report`."""

import collections
import dataclasses
import datetime
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sit_jax.report.evaluation import ClassScore, EvalImage, EvalReport, Verdict
from sit_jax.report.load_run import read_run
from sit_jax.report.page import RunView, render

HOSTILE = "<script>window.hurt = 1</script><img src=x onerror='window.hurt = 2'>&amp;\"'"


class Breakage(NamedTuple):
    """What breaks a run, and what the page then says is missing."""

    apply: Callable[[pathlib.Path], object]
    facts: tuple[str, ...]


def damage_metrics(folder: pathlib.Path) -> None:
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    odd = [b"\xff\xfe\x00\n", b"[1, 2]\n", b'{"step": "x", "kind": "train"}\n', b'"' + b"[" * 100_000 + b"\n"]
    path.write_bytes(b"".join([*lines[:1], *odd, *lines[1:]]))


def damage_checkpoint(folder: pathlib.Path) -> None:
    for path in (folder / "checkpoints" / "22").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def configure(section: str, **values: object) -> Callable[[pathlib.Path], object]:
    def apply(folder: pathlib.Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config[section] |= values
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def cut(folder: pathlib.Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text()[:100])


BREAKAGES = {
    "damaged metrics": Breakage(damage_metrics, ("metrics.jsonl: 4 ", "(2, 3, 4, 5)")),
    "no metrics": Breakage(lambda folder: (folder / "metrics.jsonl").unlink(), ("metrics.jsonl",)),
    "no checkpoints": Breakage(lambda folder: shutil.rmtree(folder / "checkpoints"), ("no checkpoint",)),
    "damaged checkpoint": Breakage(damage_checkpoint, ("the metrics of a checkpoint are damaged",)),
    "no teacher": Breakage(lambda folder: shutil.rmtree(folder / "teacher"), ("The teacher's training has not begun",)),
    "no configuration": Breakage(lambda folder: (folder / "config.json").unlink(), ("no config.json",)),
    "damaged configuration": Breakage(cut, ("config.json", "JSON")),
    "impossible configuration": Breakage(configure("optim", lr=-1), ("Optim.lr: ", "greater than 0")),
    "damaged summary": Breakage(lambda folder: (folder / "summary.json").write_text("[]"), ("summary.json", "22 st")),
}


def hostile_page(folder: pathlib.Path) -> str:
    """The page of a run whose names, classes, files and configuration are somebody's attempt at a script."""
    run = read_run(folder, HOSTILE)
    values = {**run.values, HOSTILE: HOSTILE, "data": {HOSTILE: [HOSTILE]}}
    summary = {**run.summary, "images_per_s_measured": HOSTILE}
    metadata = {"versions": {HOSTILE: HOSTILE}, "devices": HOSTILE}
    run = dataclasses.replace(run, values=values, summary=summary, metadata=metadata, missing=[HOSTILE])
    verdicts = {"student": Verdict(HOSTILE, 0.5, False), "teacher": Verdict("7", 0.75, True)}
    image = EvalImage(0, HOSTILE, HOSTILE, verdicts, np.zeros((32, 32, 1), np.uint8))
    classes = [ClassScore(HOSTILE, 3, 1 / 3, 2 / 3), ClassScore("7", 3, 1.0, 1.0)]
    outcomes = collections.Counter({(True, True): 4, (False, True): 1, (False, False): 1})
    evaluation = EvalReport(classes, outcomes, [image], [image], None)
    return render([RunView("run-1", run, evaluation)], datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC))
