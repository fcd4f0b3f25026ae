"""The demo as the README promises it: a real training, minutes long."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ENVIRONMENT = {**os.environ, "XLA_FLAGS": ""}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, digits_dir: str) -> pathlib.Path:
    """The run of `make demo`."""
    folder = tmp_path_factory.mktemp("demo") / "digits"
    train("configs/digits.py", folder, [f"--config.data.data_dir={digits_dir}"])
    return folder


def train(config: str, folder: pathlib.Path, overrides: list[str]) -> None:
    words = ["--config", config, "--workdir", str(folder), *overrides]
    subprocess.run([sys.executable, "-m", "sit_jax", "train", *words], check=True, env=ENVIRONMENT)


@pytest.mark.slow
def test_digits_demo(demo: pathlib.Path) -> None:
    summary = json.loads((demo / "summary.json").read_text())
    assert summary["teacher"]["top1"] >= 0.975
    assert summary["kept_accuracy"] >= 0.97
    assert summary["gmac_ratio"] >= 3.0
    assert summary["student"]["params"] < 1.02 * summary["teacher"]["params"]
    for name in ("curves.png", "slimming.png"):
        assert (demo / name).stat().st_size > 10_000
    check_strokes(demo)


@pytest.mark.slow
def test_its_teacher_is_slimmed_without_labels(demo: pathlib.Path, digits_dir: str, tmp_path: pathlib.Path) -> None:
    values = {"data.name": "digits", "data.eval_split": "test", "data.data_dir": digits_dir, "epochs": 4}
    overrides = [f"--config.{key}={value}" for key, value in (values | {"optim.lr": 1e-3}).items()]
    train(f"configs/features.py:{demo / 'teacher'}", tmp_path / "run", overrides)
    command = [sys.executable, "benchmarks/features.py", str(tmp_path / "run")]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT).stdout)
    teacher, student, random = (found[name] for name in ("teacher", "student", "random"))
    assert student["gmac"] < 0.4 * teacher["gmac"]
    assert student["cosine"] >= 0.98
    for measure in ("cosine", "agreement5"):
        assert student[measure] > random[measure]
    assert student["knn"] >= teacher["knn"] - 0.015


def check_strokes(folder: pathlib.Path) -> None:
    """What docs/visualize.md says of where this student looks."""
    command = [sys.executable, "benchmarks/strokes.py", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT)
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
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("has no slimming modules; give a student's run")
