"""Runs that are told to end, or killed outright, and go on as if nothing had happened."""

import os
import pathlib
import random
import signal
import subprocess
import time
from typing import Any

import jax
import numpy as np
import pytest
from test_distributed import SMALL
from test_distributed import start as start_command

from sit_jax.analysis.checkpoints import verify
from sit_jax.errors import PreemptedError
from sit_jax.io.checkpoint import FOLDER
from sit_jax.io.load import load_run
from sit_jax.training.checkpoint import Checkpoints
from sit_jax.training.metrics import read_metrics

KILLS = int(os.environ.get("SIT_JAX_KILLS", "4"))
# Long enough that every kill comes before the end.
EPOCHS = max(8, 2 * KILLS)
STEPS = 11 * EPOCHS
LONG = {**SMALL, "epochs": EPOCHS, "teacher.epochs": 1, "checkpoint.every_epochs": 0, "eval_every_epochs": EPOCHS}


def train_words(run: pathlib.Path, data: str, **more: Any) -> list[str]:
    values = {**LONG, "data.data_dir": data, **more}
    words = ["train", "--config", "configs/digits.py", "--workdir", str(run), "--resume"]
    return words + [f"--config.{key}={value}" for key, value in values.items()]


def start(run: pathlib.Path, data: str, **more: Any) -> "subprocess.Popen[str]":
    return start_command(1, *train_words(run, data, **more))


def wait_for_step(run: pathlib.Path, process: "subprocess.Popen[str]", step: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        lines = read_metrics(run) if (run / "metrics.jsonl").exists() else []
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[0]}")


def assert_same_weights(mine: pathlib.Path, theirs: pathlib.Path) -> None:
    jax.tree.map(np.testing.assert_array_equal, load_run(mine).variables, load_run(theirs).variables)


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
    assert process.returncode == PreemptedError.exit_code, text
    last = text.strip().splitlines()[-1]
    assert last.startswith("sit train: ")
    with Checkpoints(run) as checkpoints:
        assert f"after step {checkpoints.latest_step} of {STEPS}" in last
    process = start(run, digits_dir)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert_same_weights(run, undisturbed)
    steps = [line["step"] for line in read_metrics(run) if line["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1))


def finished(run: pathlib.Path) -> list[int]:
    """The steps of the saves that are whole, by the folders' own names: a save gets its number when it is complete."""
    folder = run / FOLDER
    return sorted(int(name) for name in os.listdir(folder) if name.isdigit()) if folder.is_dir() else []


def unfinished(run: pathlib.Path) -> list[str]:
    """The folders of saves that are under way, or were cut off."""
    folder = run / FOLDER
    return [name for name in os.listdir(folder) if not name.isdigit()] if folder.is_dir() else []


def kill(run: pathlib.Path, process: "subprocess.Popen[str]", whole: int, moment: float | None) -> int:
    """Kills a run once its newest whole save is of step `whole` or later; returns the newest that was seen whole.

    That is `moment` seconds later, or in the middle of the next save for None.
    """
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if max(finished(run), default=0) >= whole:
            if moment is not None:
                time.sleep(moment)
                break
            if unfinished(run):
                break
        time.sleep(0.001)
    seen = max(finished(run), default=0)
    process.send_signal(signal.SIGKILL)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, text
    return seen


@pytest.mark.slow
def test_killed_at_random_moments(undisturbed: pathlib.Path, tmp_path: pathlib.Path, digits_dir: str) -> None:
    run, rng = tmp_path / "run", random.Random(0)
    more = {"checkpoint.every_steps": 2, "checkpoint.keep": 2}
    # The step that each process goes on from, and how often a save was cut off.
    reached, cut = 0, 0
    for number in range(KILLS):
        process = start(run, digits_dir, **more)
        whole = reached + 2 * rng.randrange(1, 5)
        seen = kill(run, process, whole, rng.uniform(0, 0.1) if number % 2 else None)
        cut += bool(unfinished(run))
        with Checkpoints(run) as checkpoints:
            latest = checkpoints.latest_step or 0
        assert latest == max(finished(run), default=0)
        assert latest >= max(seen, reached)
        # What the next process starts from is whole: every array there, of its size, finite.
        assert not latest or verify(run).problems == ()
        reached = latest
    assert cut >= KILLS // 4, "too few of the moments were within a save"
    process = start(run, digits_dir, **more)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert_same_weights(run, undisturbed)
    losses = [[line["loss"] for line in read_metrics(x) if line["kind"] == "train"] for x in (run, undisturbed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS
