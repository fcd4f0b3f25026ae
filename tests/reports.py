"""Broken runs and hostile texts for the tests of `sit report`."""

import dataclasses
import datetime
import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np

from sit_jax.report.evaluation import ClassScore, EvalReport, Picture, Verdict
from sit_jax.report.load_run import gather
from sit_jax.report.page import render, view_run

HOSTILE = "<script>window.hurt = 1</script><img src=x onerror='window.hurt = 2'>&amp;\"'"


def damaged_metrics(folder: pathlib.Path) -> list[str]:
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    odd = [b"\xff\xfe\x00\n", b"[1, 2]\n", b'{"step": "x", "kind": "train"}\n', b'"' + b"[" * 100_000 + b"\n"]
    path.write_bytes(b"".join([*lines[:1], *odd, *lines[1:]]))
    return ["metrics.jsonl: 4 damaged lines left out (2, 3, 4, 5)."]


def no_metrics(folder: pathlib.Path) -> list[str]:
    (folder / "metrics.jsonl").unlink()
    return ["There is no metrics.jsonl: no step has been written down."]


def no_checkpoints(folder: pathlib.Path) -> list[str]:
    shutil.rmtree(folder / "checkpoints")
    return ["holds no checkpoint."]


def damaged_checkpoint(folder: pathlib.Path) -> list[str]:
    for path in (folder / "checkpoints" / "22").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    return ["The checkpoints cannot be read: "]


def no_teacher(folder: pathlib.Path) -> list[str]:
    shutil.rmtree(folder / "teacher")
    return ["The teacher's training has not begun.", "is not a run directory: it has no config.json."]


def no_configuration(folder: pathlib.Path) -> list[str]:
    (folder / "config.json").unlink()
    return ["There is no config.json."]


def damaged_configuration(folder: pathlib.Path) -> list[str]:
    path = folder / "config.json"
    path.write_text(path.read_text()[:100])
    return ["config.json cannot be read: it is not valid JSON."]


def impossible_configuration(folder: pathlib.Path) -> list[str]:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["optim"]["lr"] = -1
    path.write_text(json.dumps(values))
    return ["Optim.lr: input should be greater than 0"]


def damaged_summary(folder: pathlib.Path) -> list[str]:
    (folder / "summary.json").write_text("[]")
    return ["summary.json holds no values.", "All 22 steps are done, but there is no summary.json"]


def no_data(folder: pathlib.Path) -> list[str]:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["data"] |= {"name": "cifar100", "data_dir": str(folder)}
    path.write_text(json.dumps(values))
    return ["cifar100 is not prepared in"]


BREAKAGES: list[Callable[[pathlib.Path], list[str]]] = [
    damaged_metrics,
    no_metrics,
    no_checkpoints,
    damaged_checkpoint,
    no_teacher,
    no_configuration,
    damaged_configuration,
    impossible_configuration,
    damaged_summary,
    no_data,
]
# Broken runs whose student can be asked all the same.
STILL_ASKED = [damaged_metrics, no_metrics, no_teacher, damaged_summary]


def hostile_page(run: pathlib.Path) -> str:
    """The page of a run whose names, classes, files and configuration are somebody's attempt at a script."""
    record = gather(run, HOSTILE)
    values = {**record.values, HOSTILE: HOSTILE, "data": {HOSTILE: [HOSTILE]}}
    summary = {**record.summary, "images_per_s_measured": HOSTILE}
    metadata = {"versions": {HOSTILE: HOSTILE}, "devices": HOSTILE}
    record = dataclasses.replace(record, values=values, summary=summary, metadata=metadata, missing=[HOSTILE])
    verdicts = {"student": Verdict(HOSTILE, 0.5, False), "teacher": Verdict("7", 0.75, True)}
    picture = Picture(0, HOSTILE, HOSTILE, verdicts, np.zeros((32, 32, 1), np.uint8))
    classes = [ClassScore(HOSTILE, 3, 1 / 3, 2 / 3), ClassScore("7", 3, 1.0, 1.0)]
    outcomes = {(True, True): 4, (True, False): 0, (False, True): 1, (False, False): 1}
    findings = EvalReport(classes, outcomes, [picture], [picture], None)
    return render([view_run("run-1", record, findings)], datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC))
