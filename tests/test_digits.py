"""The demo as the README promises it: a real training, minutes long."""

import json
import os
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_digits_demo(tmp_path: pathlib.Path, digits_dir: str) -> None:
    folder = tmp_path / "digits"
    words = ["--config", "configs/digits.py", "--workdir", str(folder), f"--config.data.data_dir={digits_dir}"]
    environment = {**os.environ, "XLA_FLAGS": ""}
    subprocess.run([sys.executable, "-m", "sit_jax", "train", *words], check=True, env=environment)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["teacher"]["top1"] >= 0.975
    assert summary["kept_accuracy"] >= 0.97
    assert summary["gmac_ratio"] >= 3.0
    assert summary["student"]["params"] < 1.02 * summary["teacher"]["params"]
    for name in ("curves.png", "slimming.png"):
        assert (folder / name).stat().st_size > 10_000
    check_strokes(folder)


def check_strokes(folder: pathlib.Path) -> None:
    """What docs/visualize.md says of where this student looks."""
    command = [sys.executable, "benchmarks/strokes.py", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": ""})
    found = json.loads(done.stdout)
    area = found["area"]
    assert found["pictures"] == 359
    assert round(area, 3) == 0.315  # Of the data alone, whatever was trained.
    # All tokens together look at everything: distillation asks them to recover every patch.
    assert all(0.9 * area < weight < 1.15 * area for weight in found["weight"])
    # But they share the work, and the class token prefers strokes.
    tokens = found["weight_of_each_first_token"]
    assert max(tokens) > 1.15 * area
    assert min(tokens) < 0.85 * area
    assert found["class_attention"][0] > 1.15 * area
    # The teacher has no slimming modules to ask.
    command[-1] = str(folder / "teacher")
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": ""})
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("has no slimming modules; give a student's run")
