"""Real runs of two processes under the launch scripts: told to end, started again, done."""

import json
import os
import pathlib
import signal
import subprocess
import time

import pytest
from launch_machine import Machine

from sit_jax.training.metrics import read_metrics

# A small model on the digits, without a teacher: what is tried here is how runs begin and end.
CONFIG = "configs/imagenet_lvvit_tiny.py:scratch"
SMALL = """
    data.name=digits data.eval_split=test data.resize=stretch data.workers=0
    augment.rand_augment= augment.repeats=1 augment.erase=0 mix.mixup=0 mix.cutmix=0
    model.image_size=32 model.in_channels=1 model.num_classes=10 model.dim=16 model.depth=1 model.num_heads=2
    model.dtype=float32 optim.warmup_epochs=0 optim.cooldown_epochs=0
    batch_size=128 eval_batch_size=128 log.every_steps=1
"""
STEPS = 11


def run_words(folder: pathlib.Path, digits_dir: str, epochs: int) -> list[str]:
    values = [*SMALL.split(), f"data.data_dir={digits_dir}", f"epochs={epochs}", f"eval_every_epochs={epochs}"]
    return ["--config", CONFIG, "--workdir", str(folder), *(f"--config.{value}" for value in values)]


def wait_for_step(folder: pathlib.Path, step: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and [m for m in read_metrics(folder) if m["step"] >= step]:
            return
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError(f"step {step} was not reached: {process.communicate()}")


def assert_done(folder: pathlib.Path, epochs: int) -> None:
    steps = [line["step"] for line in read_metrics(folder) if line["kind"] == "train"]
    assert steps == list(range(1, STEPS * epochs + 1))
    assert "top1" in json.dumps(json.loads((folder / "summary.json").read_text()))


@pytest.mark.slow
def test_slurm(machine: Machine, tmp_path: pathlib.Path, digits_dir: str) -> None:
    folder = tmp_path / "my run"
    words = [*run_words(folder, digits_dir, epochs=2), "--sit", machine.sit]
    variables = {"SLURM_JOB_ID": machine.environment["FAKE_JOB"], "SLURM_NTASKS": "2"}
    process = machine.start("slurm.sbatch", *words, **variables)
    wait_for_step(folder, 2, process)
    process.send_signal(signal.SIGTERM)
    result = machine.finish(process, timeout=60)
    assert result.returncode == 75, result.stderr
    assert machine.commands("scontrol") == [["scontrol", "requeue", variables["SLURM_JOB_ID"]]]
    # The job comes up again.
    result = machine.run("slurm.sbatch", *words, **variables)
    assert result.returncode == 0, result.stderr
    assert_done(folder, epochs=2)


@pytest.mark.slow
def test_tpu_pod(machine: Machine, tmp_path: pathlib.Path, digits_dir: str) -> None:
    folder = tmp_path / "my run"
    words = ["up", "--name", "real", "--zone", "z", "--type", "v5litepod-8", "--poll", "1", "--pause", "1"]
    words += run_words(folder, digits_dir, epochs=1)
    result = machine.run("tpu_pod.sh", *words)
    assert result.returncode == 0, result.stderr
    assert_done(folder, epochs=1)
    log = (machine.folder / "home 1" / "sit_jax" / "state" / "log").read_text()
    assert "process 1 of 2" in log
    assert "Written: " not in log
    assert "Written: " in result.stdout  # What worker 0 says.
