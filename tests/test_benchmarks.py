"""The benchmark scripts run, in a tiny form."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest


@pytest.mark.slow
def test_loader(tmp_path: pathlib.Path) -> None:
    figures = tmp_path / "figures.json"
    words = ["--images", "64", "--pictures", "80", "--rounds", "1", "--workers", "1", "--json", str(figures)]
    done = subprocess.run([sys.executable, "benchmarks/loader.py", *words], capture_output=True, text=True, check=True)
    assert "| full | sit_jax |" in done.stdout
    rows = {(row["recipe"], row["loader"]): row for row in json.loads(figures.read_text())["results"]}
    assert {(recipe, "sit_jax") for recipe in ("plain", "full")} <= set(rows)
    assert all(row["images_per_s"] > 0 and row["start_up_s"] < 60 for row in rows.values())
    assert "timm is left out" in done.stderr or ("full", "timm") in rows


def figures(script: str, folder: pathlib.Path, *words: str) -> tuple[str, dict[str, Any]]:
    """What a script prints, and writes as JSON, in its tiny form."""
    path = folder / "figures.json"
    command = [sys.executable, f"benchmarks/{script}.py", "--tiny", "--rounds", "2", "--json", str(path), *words]
    # On the one device that the machine has, not on the tests' eight virtual ones.
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stdout, json.loads(path.read_text())


@pytest.mark.slow
def test_inference(tmp_path: pathlib.Path) -> None:
    words = ["--seconds", "0.02", "--models", "sit_xsmall", "--batch_sizes", "2", "--contenders", "jax", "eager"]
    out, found = figures("inference", tmp_path, *words)
    assert [row["dtype"] for row in found["rows"]] == ["float32", "bfloat16"]
    assert all(row[name] > 0 for row in found["rows"] for name in ("jax", "eager", "over_eager"))
    assert "| sit_xsmall | 2 | float32 |" in out
    assert set(found["idle_cpu_s"]) == {"jax", "torch"}


@pytest.mark.slow
def test_train_step(tmp_path: pathlib.Path) -> None:
    words = ["--seconds", "0.02", "--batch_size", "2", "--dtypes", "float32", "--contenders", "jax", "eager"]
    out, found = figures("train_step", tmp_path, *words)
    ours, theirs = found["rows"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=2e-3)
    assert min(ours["peak_mib"], theirs["peak_mib"], ours["seconds"], theirs["seconds"]) > 0
    assert "| PyTorch eager | float32 |" in out


@pytest.mark.slow
def test_trainer(tmp_path: pathlib.Path) -> None:
    out, found = figures("trainer", tmp_path, "--batch_size", "2", "--stretch", "2")
    assert (len(found["loop_s"]), len(found["bare_s"])) == (2, 2)
    assert min(found["loop_s"] + found["bare_s"]) > 0
    assert "| trainer |" in out


def test_strokes_of_a_run_that_is_not_there(tmp_path: pathlib.Path) -> None:
    missing = tmp_path / "runs"
    done = subprocess.run([sys.executable, "benchmarks/strokes.py", str(missing)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"strokes.py: error: {missing}: there is no such file or folder"
