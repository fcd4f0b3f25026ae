"""Runs that are told to end, or killed outright, and go on as if nothing had happened."""

import itertools
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest
from test_distributed import SMALL

from sit_jax.checkpoint import Checkpoints
from sit_jax.cli import STOPPED
from sit_jax.metrics import read_metrics
from sit_jax.run import trained_variables

LONG = {**SMALL, "epochs": 8, "teacher.epochs": 1, "checkpoint.every_epochs": 0, "eval_every_epochs": 8}


def start(run: pathlib.Path, data: str, **more: Any) -> "subprocess.Popen[str]":
    values = {**LONG, "data.data_dir": data, **more}
    words = ["train", "--config", "configs/digits.py", "--workdir", str(run), "--resume"]
    words += [f"--config.{key}={value}" for key, value in values.items()]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "sit_jax", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(run: pathlib.Path, process: "subprocess.Popen[str]", step: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        lines = read_metrics(run) if (run / "metrics.jsonl").exists() else []
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[0]}")


def assert_same_weights(mine: pathlib.Path, theirs: pathlib.Path) -> None:
    jax.tree.map(np.testing.assert_array_equal, trained_variables(mine)[1], trained_variables(theirs)[1])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, digits_dir: str) -> pathlib.Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(run, digits_dir)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    return run


@pytest.mark.slow
def test_sigterm_saves_at_once(undisturbed: pathlib.Path, tmp_path: pathlib.Path, digits_dir: str) -> None:
    run = tmp_path / "run"
    process = start(run, digits_dir)
    wait_for_step(run, process, 30)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == STOPPED, text
    last = text.strip().splitlines()[-1]
    assert last.startswith("sit train: told to end: saved after step ")
    with Checkpoints(run) as checkpoints:
        assert f"after step {checkpoints.latest_step} of 88" in last
    process = start(run, digits_dir)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert_same_weights(run, undisturbed)
    steps = [line["step"] for line in read_metrics(run) if line["kind"] == "train"]
    assert steps == list(range(1, 89))


@pytest.mark.slow
def test_killed_at_random_moments(undisturbed: pathlib.Path, tmp_path: pathlib.Path, digits_dir: str) -> None:
    # A checkpoint after every second step: many of these moments are within a save.
    run, rng = tmp_path / "run", random.Random(0)
    kills = int(os.environ.get("SIT_JAX_KILLS", "4"))
    reached = 0
    for number in itertools.count():
        process = start(run, digits_dir, **{"checkpoint.every_steps": 2, "checkpoint.keep": 2})
        if number == kills:
            break
        begin = max(2, reached + 2)
        wait_for_step(run, process, min(80, begin + rng.randrange(8)))
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        text, _ = process.communicate(timeout=60)
        lines = [line["step"] for line in read_metrics(run)]
        with Checkpoints(run) as checkpoints:
            latest = checkpoints.latest_step or 0
        # Saves are asynchronous: one may have been under way, the one before it was whole.
        assert latest >= max(lines) - 6, text
        assert latest >= reached
        reached = latest
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert_same_weights(run, undisturbed)
