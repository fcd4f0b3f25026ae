"""Whole runs on the digits: results, resuming, and every way in which a run must refuse."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
from typing import Any

import jax
import numpy as np
import pytest
import scipy.special
import tiny

from sit_jax.analysis.summary import draw_curves, summarize
from sit_jax.cli import app as cli
from sit_jax.config import Config, ModelConfig, OptimConfig, TeacherConfig
from sit_jax.config import LossConfig as Loss
from sit_jax.config.config_dict import to_dict
from sit_jax.errors import ConfigError, PreemptedError, RunError
from sit_jax.io import runs as workdir
from sit_jax.io.load import load_run
from sit_jax.io.runs import read_config
from sit_jax.models import build_model
from sit_jax.parallel.distributed import PreemptionMonitor
from sit_jax.parallel.sharding import make_mesh
from sit_jax.training.checkpoint import Checkpoints
from sit_jax.training.evaluate import evaluate, evaluate_model, make_eval_step
from sit_jax.training.init import initial_state
from sit_jax.training.loop import run
from sit_jax.training.metrics import MetricWriter, read_metrics
from sit_jax.training.progress import Progress
from sit_jax.training.step import make_train_spec

EPOCH = 1438 // 128


@pytest.fixture
def config(digits_config: Config) -> Config:
    return digits_config


@pytest.fixture
def finished(digits_run: pathlib.Path) -> pathlib.Path:
    return digits_run


def test_run_writes_everything(finished: pathlib.Path, config: Config) -> None:
    lines = read_metrics(finished)
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == [5, 10, 15, 20, 22]
    assert all(set(line) > {"loss", "token", "logits", "classification", "lr/model", "lr/rtsm"} for line in train)
    scores = [line for line in lines if line["kind"] == "eval"]
    assert [line["step"] for line in scores] == [EPOCH, 2 * EPOCH]
    assert scores[-1]["examples"] == 359
    assert {"top1", "top5", "loss", "ema_top1"} <= set(scores[-1])
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    with Checkpoints(finished) as checkpoints:
        assert checkpoints.latest_step == 2 * EPOCH
    assert workdir.read_config(finished) == config
    assert workdir.read_config(finished / "teacher") == config.teacher_run(config.teacher)  # type: ignore[arg-type]


def test_summary(finished: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = summarize(finished)
    assert summary == json.loads((finished / "summary.json").read_text())
    for name in ("teacher", "student"):
        assert set(summary[name]) == {"top1", "params", "gmac", "images_per_s"}
        folder = finished / "teacher" if name == "teacher" else finished
        assert summary[name]["top1"] == pytest.approx(evaluate_model(load_run(folder))["top1"])
    assert summary["gmac_ratio"] == pytest.approx(summary["teacher"]["gmac"] / summary["student"]["gmac"])
    assert summary["kept_accuracy"] == pytest.approx(summary["student"]["top1"] / summary["teacher"]["top1"])
    assert summary["speedup"] > 0
    for picture in ("curves.png", "slimming.png"):
        assert (finished / picture).read_bytes().startswith(b"\x89PNG")
    assert cli.main(["evaluate", "--workdir", str(finished), "--ema"]) == 0
    assert "over 359 examples" in capsys.readouterr().out


@pytest.mark.parametrize("kinds", [(), ("train",), ("eval",)])
def test_curves_of_runs_that_logged_nothing_of_some_kind(kinds: tuple[str, ...], tmp_path: pathlib.Path) -> None:
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        for kind in kinds:
            writer.write(1, kind, {"loss": 0.0})
            writer.write(2, kind, {"loss": 1.0, "top1": 0.0})
    draw_curves(tmp_path, {"model": tmp_path})  # Warnings are errors.
    assert (tmp_path / "curves.png").exists()


def test_progress_without_a_terminal_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", total=3, start=0, batch_size=8) as progress:
        for step in (1, 2, 3):
            progress.update(step, {"loss": 0.5, "skipped": 1.0})
        progress.note("epoch 1")
    with Progress("quiet", total=3, start=0, batch_size=8, quiet=True) as progress:
        progress.update(1, {"loss": 0.5})
        progress.note("epoch 1")
    text = capsys.readouterr().err
    (last,) = [line for line in text.splitlines() if "3/3" in line]
    assert all(fact in last for fact in ("train", "loss=0.500", "skipped images=3", "images/s="))
    assert "train: epoch 1\n" in text
    assert "?" not in text  # What is left is not known before the second step.
    assert "quiet" not in text
    assert "\r" not in text


def test_evaluation_against_numpy(finished: pathlib.Path) -> None:
    config, variables = read_config(finished), load_run(finished).variables
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 32, 32, 1), np.uint8), rng.integers(0, 10, 40).astype(np.int32)
    mask = (np.arange(40) < 33).astype(np.float32)
    model: Any = build_model(config.model.architecture)
    whole = {"image": images, "label": labels, "mask": mask}
    batches = [{name: values[i : i + 8] for name, values in whole.items()} for i in range(0, 40, 8)]
    mesh = make_mesh(devices=jax.devices()[:1])
    result = evaluate(make_eval_step(model, config.data), variables, batches, mesh)
    normalised = (images[:33] / 255 - np.mean(config.data.mean)) / np.mean(config.data.std)
    logits = np.asarray(jax.jit(model.apply)(variables, normalised.astype(np.float32))[0], np.float64)
    order = np.argsort(-logits, axis=1)
    top1 = (order[:, 0] == labels[:33]).mean()
    top5 = (order[:, :5] == labels[:33, None]).any(axis=1).mean()
    log_probs = scipy.special.log_softmax(logits, axis=1)
    loss = -log_probs[np.arange(33), labels[:33]].mean()
    assert result == pytest.approx({"examples": 33, "top1": top1, "top5": top5, "loss": loss}, rel=1e-5, abs=1e-6)


def whole_state(config: Config, folder: pathlib.Path) -> Any:
    """Everything that a run's newest checkpoint holds."""
    with Checkpoints(folder) as checkpoints:
        return initial_state(make_train_spec(config, EPOCH), checkpoints, make_mesh(config.mesh), {})


def test_resumed_run_equals_an_undisturbed_one(finished: pathlib.Path, config: Config, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(finished, folder)
    # Keys that came later do not make it another run.
    values = json.loads((folder / "config.json").read_text())
    del values["model"]["layer_scale"], values["teacher"]["model"]["stem_width"]
    (folder / "config.json").write_text(json.dumps(values))
    with Checkpoints(folder) as checkpoints:
        steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
        assert steps == [EPOCH, 2 * EPOCH]
        assert checkpoints.best_step in steps
    shutil.rmtree(folder / "checkpoints" / str(2 * EPOCH))
    run(config, folder, resume=True)
    # Bit for bit: weights, optimizer, moving average, BatchNorm statistics, step, and every metric on the way.
    mine, theirs = (whole_state(config, place) for place in (folder, finished))
    assert len(jax.tree.leaves(mine.opt_state)) > 2 * len(jax.tree.leaves(mine.params["model"]))
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)
    before, after = ([{k: v for k, v in x.items() if k != "time"} for x in read_metrics(f)] for f in (finished, folder))
    assert after == before


def test_cnn_teacher_through_a_whole_run(config: Config, finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert config.teacher is not None
    cnn = TeacherConfig(model=ModelConfig(architecture=tiny.CNN), batch_size=128)
    given = dataclasses.replace(config.teacher, run=str(finished / "teacher"))
    model = ModelConfig(architecture=dataclasses.replace(tiny.SLIMMED, distillation_token=True))
    changed = dataclasses.replace(config, model=model, loss=Loss(hard=1.0), teacher=given, cnn_teacher=cnn, epochs=1)
    result = run(changed, tmp_path / "run")
    assert result["examples"] == 359
    assert (tmp_path / "run" / "cnn_teacher" / "config.json").exists()
    assert not (tmp_path / "run" / "teacher").exists()


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(config: Config, tmp_path: pathlib.Path) -> None:
    model, optim = ModelConfig(architecture=tiny.plain(stem="patch", depth=1)), OptimConfig(lr=1e-3)
    plain = dataclasses.replace(config, model=model, teacher=None, loss=Loss(), optim=optim, epochs=1)
    run(plain, tmp_path)
    # The same run, continued with a rate that cannot go well.
    wild = dataclasses.replace(plain, epochs=3, optim=OptimConfig(lr=1e30))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(wild)))
    with pytest.raises(RunError, match=rf"^step 1\d: .* step {EPOCH} "):
        run(wild, tmp_path, resume=True)
    variables = load_run(tmp_path).variables
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))


def test_notice_before_the_first_step_counts(finished: pathlib.Path, config: Config, tmp_path: pathlib.Path) -> None:
    # As between a teacher's last step and its student's first.
    assert config.teacher is not None
    given = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, run=str(finished / "teacher")))
    with PreemptionMonitor():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(PreemptedError, match=r"step 1 of 22.*--resume"):
            run(given, tmp_path)
    # It is forgotten with the command that it was for.
    with PreemptionMonitor() as stop:
        assert not stop.requested


def test_refusals(finished: pathlib.Path, config: Config, tmp_path: pathlib.Path, capsys: Any, digits_dir: str) -> None:
    train = ["train", "--config", "configs/digits.py", f"--config.data.data_dir={digits_dir}"]
    fresh, swapped = tmp_path / "fresh", tmp_path / "swapped"
    shutil.copytree(finished / "teacher", swapped)
    shutil.copy(finished / "config.json", swapped / "config.json")
    cases: list[tuple[list[Any], str]] = [
        ([*train, "--workdir", fresh, "--config.optim.lrr=1"], "did you mean"),
        ([*train, "--workdir", fresh, "--config.teacher.model.depth=12"], "teacher.model.depth: must be 14"),
        (["train", "--config", "configs/none.py", "--workdir", fresh], "there is no file configs/none.py"),
        (["train", "--config", "pyproject.toml", "--workdir", fresh], "pyproject.toml"),
        ([*train, "--workdir", "/proc/none"], "/proc/none cannot be written"),
        ([*train, "--workdir", finished], "contains a run of another configuration"),
        (["evaluate", "--workdir", fresh], "fresh"),
        (["evaluate", "--workdir", swapped], "does not hold this model"),
        (["evaluate", "--workdir", finished, "--step", "3"], "checkpoint 3"),
        (["evaluate", "--workdir", finished / "teacher", "--ema"], "optim.ema_decay"),
    ]
    for words, expected in cases:
        assert cli.main([str(word) for word in words]) == 2, words
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert expected in error
        assert not fresh.exists()
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match="--resume"):
        run(config, finished)
    other = dataclasses.replace(tiny.TWO_BLOCKS, num_heads=4)
    teacher = TeacherConfig(model=ModelConfig(architecture=other), run=str(finished / "teacher"))
    with pytest.raises(ConfigError) as caught:
        run(dataclasses.replace(config, teacher=teacher), tmp_path / "other")
    assert caught.value.key == "teacher.run"
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
