"""Runs that are told to end, or killed outright, and go on as if nothing had happened."""

import errno
import fcntl
import os
import pathlib
import pty
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import psutil
import pytest
from test_distributed import overrides, wait_for_lines
from test_distributed import start as start_command

from sit_jax.analysis.checkpoints import verify
from sit_jax.config import Config
from sit_jax.errors import PreemptedError, RunError
from sit_jax.io.checkpoint import FOLDER
from sit_jax.io.load import load_run
from sit_jax.io.lock import lock_holder, locked
from sit_jax.parallel.distributed import PreemptionMonitor
from sit_jax.training.checkpoint import Checkpoints
from sit_jax.training.loop import Extensions
from sit_jax.training.loop import run as train
from sit_jax.training.metrics import read_metrics

KILLS = int(os.environ.get("SIT_JAX_KILLS", "4"))
# Long enough that every kill comes before the end.
EPOCHS = max(8, 2 * KILLS)
STEPS = 11 * EPOCHS
LONG = {"epochs": EPOCHS, "teacher.epochs": 1, "checkpoint.every_epochs": 0, "eval_every_epochs": EPOCHS}


def train_words(run: pathlib.Path, data: str, **more: Any) -> list[str]:
    return [*overrides(data, **{**LONG, **more}), "--workdir", str(run), "--resume"]


def start(run: pathlib.Path, data: str, **more: Any) -> "subprocess.Popen[str]":
    return start_command(1, *train_words(run, data, **more))


def saves(run: pathlib.Path) -> tuple[int, bool]:
    """The newest step whose save is whole, or 0, and whether one is under way or cut off.

    A save's folder gets its number as its name when it is complete.
    """
    names = [path.name for path in (run / FOLDER).glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0), not all(map(str.isdigit, names))


def kill(run: pathlib.Path, process: "subprocess.Popen[str]", whole: int, moment: float | None) -> int:
    """Kills a run once its newest whole save is of step `whole` or later; returns the newest that was seen whole.

    That is `moment` seconds later, or in the middle of the next save for None.
    """
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        newest, unfinished = saves(run)
        if newest >= whole and (moment is not None or unfinished):
            time.sleep(moment or 0)
            break
        time.sleep(0.001)
    seen, _ = saves(run)
    process.send_signal(signal.SIGKILL)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, text
    return seen


HOLDER = """
import pathlib, sys
from sit_jax.io.lock import lock_holder, locked
with locked(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_one_trainer_in_a_folder(digits_config: Config, tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "teacher")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        for folder in (tmp_path, tmp_path / "teacher"):  # The run trains its teacher first.
            with pytest.raises(
                RunError, match=f"{tmp_path / 'teacher'} .* process {other.pid} on {socket.gethostname()}"
            ):
                train(digits_config, folder, resume=True)
            assert not (tmp_path / "teacher" / "config.json").exists()
        other.kill()
    with locked(tmp_path), locked(tmp_path / "teacher"):  # The failed run and the killed process left no lock.
        pass
    holders: list[str | None] = []
    finish = Extensions(finish=lambda: holders.append(lock_holder(tmp_path / "teacher")))
    assert digits_config.teacher is not None
    train(digits_config.teacher_run(digits_config.teacher), tmp_path / "teacher", resume=True, extensions=finish)
    assert holders == [f"process {os.getpid()} on {socket.gethostname()}"]
    assert lock_holder(tmp_path / "teacher") is None


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EROFS])
def test_file_systems_without_locks(code: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path), locked(tmp_path):
        pass


def test_a_file_is_no_folder(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file is not a folder"), locked(tmp_path / "file"):
        pass


@pytest.fixture
def terminal_signals() -> Iterator[None]:
    """SIGHUP ends processes, also if the tests are run under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("terminal_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_that_stop_a_run(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with PreemptionMonitor(), PreemptionMonitor() as stop:
        assert not stop.should_stop()
        signal.raise_signal(number)
        assert stop.should_stop()
    assert signal.getsignal(number) is before


def test_nohup_stays_in_force() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with PreemptionMonitor() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.should_stop()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


ONE_MODEL: dict[str, Any] = {"teacher": None, "init": "random", "loss.token": 0.0, "loss.logits": 0.0}
ONE_MODEL |= {"model.stem": "patch", "model.depth": 2, "model.dim": 16, "model.num_heads": 2}
ONE_MODEL |= {"model.stage_blocks": (1, 1), "epochs": 1000, "checkpoint.every_epochs": 1000, "data.workers": 2}


def read(terminal: int, until: Callable[[], bool]) -> str:
    """What is printed until a condition holds, or until all processes have closed the terminal."""
    text, deadline = b"", time.monotonic() + 300
    while not until() and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                text += os.read(terminal, 2**16)
            except OSError:
                return text.decode()
    return text.decode()


@pytest.mark.usefixtures("terminal_signals")
@pytest.mark.parametrize("end", ["closed", "Ctrl-C", "SIGKILL"])
def test_end_of_a_run_in_a_terminal(end: str, tmp_path: pathlib.Path, digits_dir: str) -> None:
    values = {"data.data_dir": digits_dir, "log.every_steps": 1, "eval_every_epochs": 1000, **ONE_MODEL}
    words = ["--config", "configs/digits.py", *(f"--config.{key}={value}" for key, value in values.items())]
    command = [sys.executable, "-m", "sit_jax", "train", *words, "--workdir", str(tmp_path)]
    terminal, inside = pty.openpty()
    streams: dict[str, Any] = {"stdin": inside, "stdout": inside, "stderr": inside}
    if end == "closed":  # The first terminal that a process without one opens becomes its own.
        command = ["sh", "-c", f': < {os.ttyname(inside)}; exec "$@"', "sh", *command]
    with subprocess.Popen(command, **streams, start_new_session=True) as process:
        os.close(inside)
        read(terminal, lambda: any(line["step"] > 1 for line in read_metrics(tmp_path)) or process.poll() is not None)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 3  # Two loaders, and Python's resource tracker.
        if end == "closed":
            os.close(terminal)
        else:
            os.kill(process.pid, signal.SIGKILL) if end == "SIGKILL" else os.killpg(process.pid, signal.SIGINT)
            text = read(terminal, lambda: not any(map(psutil.Process.is_running, children)))
            assert "resource_tracker" not in text
            os.close(terminal)
        try:
            code = process.wait(300)
        finally:
            process.kill()
    assert code == {"closed": PreemptedError.exit_code, "Ctrl-C": 130, "SIGKILL": -signal.SIGKILL}[end]
    assert bool(saves(tmp_path)[0]) == (end == "closed")
    assert psutil.wait_procs(children, 60)[1] == []


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: pathlib.Path, digits_dir: str) -> None:
    run, undisturbed, rng = tmp_path / "run", tmp_path / "undisturbed", random.Random(0)
    more = {"checkpoint.every_steps": 2, "checkpoint.keep": 2}
    # The step that each process goes on from, and how often a save was cut off.
    reached, cut = 0, 0
    for number in range(KILLS):
        process = start(run, digits_dir, **more)
        whole = reached + 2 * rng.randrange(1, 5)
        seen = kill(run, process, whole, rng.uniform(0, 0.1) if number % 2 else None)
        cut += saves(run)[1]
        with Checkpoints(run) as checkpoints:
            latest = checkpoints.latest_step or 0
        assert latest == saves(run)[0]
        assert latest >= max(seen, reached)
        # What the next process starts from is whole: every array there, of its size, finite.
        assert not latest or verify(run).problems == ()
        reached = latest
    assert cut >= KILLS // 4, "too few of the moments were within a save"
    # The last one is told to end, and saves first.
    written = read_metrics(run)[-1]["step"]
    process = start(run, digits_dir, **more)
    wait_for_lines(run / "metrics.jsonl", [process], beyond=written)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == PreemptedError.exit_code, text
    assert f"sit train: stopped by a signal: saved after step {saves(run)[0]} of {STEPS}" in text
    for folder in (run, undisturbed):
        process = start(folder, digits_dir, **more)
        text, _ = process.communicate(timeout=600)
        assert process.returncode == 0, text
    jax.tree.map(np.testing.assert_array_equal, *(load_run(x).variables for x in (run, undisturbed)))
    losses = [[line["loss"] for line in read_metrics(x) if line["kind"] == "train"] for x in (run, undisturbed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS
