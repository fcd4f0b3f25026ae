"""Disks that are full: one clear line, and whole checkpoints stay whole."""

import os
import pathlib
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import pytest
import quick_compile
from test_interruption import train_words

from sit_jax.analysis.checkpoints import list_checkpoints, verify
from sit_jax.io.atomic_write import atomic_replace
from sit_jax.training.checkpoint import Checkpoints
from sit_jax.training.metrics import MetricWriter, read_metrics
from sit_jax.training.state import TrainState

# Limits the size of files from inside, once the run has begun: a write beyond it fails as on a full disk. The signal
# that the kernel sends besides would end the process before Python hears of the error.
FULL = """
import resource, signal, sys, threading, time
from sit_jax.training import checkpoint
from sit_jax.cli import app as cli
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = checkpoint.Checkpoints.save
def limited(self, state, *rest):
    if int(state.step) >= int(sys.argv[1]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
    save(self, state, *rest)
checkpoint.Checkpoints.save = limited
sys.exit(cli.main(sys.argv[3:]))
"""


def finish(command: list[str], timeout: float = 300) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "XLA_FLAGS": quick_compile.FLAGS, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.slow
def test_full_disk_leaves_the_earlier_checkpoints(digits_dir: str, tmp_path: pathlib.Path) -> None:
    run, more = tmp_path / "run", {"log.tensorboard": False, "checkpoint.every_steps": 2}
    words = train_words(run, digits_dir, **more)
    done = finish([sys.executable, "-c", FULL, "10", "2000", *words], timeout=200)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("sit train: ")
    assert all(fact in last for fact in (str(run), "File too large", "--resume"))
    assert "Traceback" not in done.stderr
    # The teacher comes first, and is what the disk was too small for.
    steps = [entry.step for entry in list_checkpoints(run / "teacher")]
    assert steps in ([6, 8], [4, 6])  # The eighth may still have been under way.
    for step in steps:
        assert verify(run / "teacher", step).problems == ()
    # With room again the run goes on.
    done = finish([sys.executable, "-m", "sit_jax", *words])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["top1", "cosine"])
def test_best_is_never_replaced_by_a_worse_one_after_a_resume(tmp_path: pathlib.Path, name: str) -> None:
    def state(step: int) -> Any:
        params = {"model": {"w": jnp.full(3, float(step))}}
        return TrainState(step=jnp.asarray(step), params=params, batch_stats={}, opt_state={"m": jnp.ones(3)}, ema=None)

    for step, value in ((1, 0.5), (2, 0.9), (3, 0.7), (4, 0.8), (5, 0.1), (6, None), (7, 0.2)):
        with Checkpoints(tmp_path, keep=1) as checkpoints:  # Each step by a process of its own, as it were.
            better = checkpoints.is_best({} if value is None else {name: value})
            assert better == (step in (1, 2))
            checkpoints.save(state(step), {} if value is None else {name: value})
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert (checkpoints.best_step, checkpoints.latest_step) == (2, 7)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [2, 7]


WRITER = """
import pathlib, resource, signal, sys
from sit_jax.errors import RunError
from sit_jax.training.metrics import MetricWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = pathlib.Path(sys.argv[1])
with MetricWriter(folder, tensorboard=True) as writer:
    writer.write(1, "train", {"loss": 1.0})
    (folder / "metrics.jsonl").unlink()  # The events meet their limit first.
    (folder / "metrics.jsonl").touch()
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
    try:
        for step in range(2, 60):
            writer._file.truncate(0)
            writer.write(step, "train", {f"value {n}": 1.0 for n in range(4)})
    except RunError as error:
        print(error)
"""


def test_full_disk_for_the_events(tmp_path: pathlib.Path) -> None:
    done = finish([sys.executable, "-c", WRITER, str(tmp_path)], timeout=60)
    assert all(fact in done.stdout for fact in (str(tmp_path), "File too large"))
    assert done.stderr == ""


def test_lines_of_a_run_that_is_cut_off_are_dropped_whole(tmp_path: pathlib.Path) -> None:
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        for step in (1, 2, 3):
            writer.write(step, "train", {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "kind": "tr')
    with MetricWriter(tmp_path, tensorboard=False, resume_step=2) as writer:
        writer.write(3, "train", {"loss": 2.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl"}


@pytest.mark.parametrize("kind", ["file", "new file", "folder"])
def test_a_link_stays_and_its_target_is_replaced(kind: str, tmp_path: pathlib.Path) -> None:
    target, link = tmp_path / "deep" / "target", tmp_path / "link"
    link.symlink_to("deep/target")
    target.parent.mkdir()
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.touch()
    with atomic_replace(link) as part:
        if kind == "folder":
            part.mkdir()
            part = part / "file"
        part.write_text("new")
    assert (target / "file" if kind == "folder" else target).read_text() == "new"
    assert link.is_symlink()
    assert sorted(tmp_path.rglob("*.part")) == []
