"""Weights out of runs of our own."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import original_models
import pytest
import tiny
from test_convert import PLAIN

from sit_jax.cli import app as cli
from sit_jax.config import Config, ModelConfig, OptimConfig
from sit_jax.config import LossConfig as Loss
from sit_jax.errors import UserError
from sit_jax.io import runs as workdir
from sit_jax.io.convert.initial import initial_weights
from sit_jax.io.convert.read import Options
from sit_jax.io.load import read_weights
from sit_jax.parallel.sharding import make_mesh
from sit_jax.training.checkpoint import Checkpoints
from sit_jax.training.state import TrainState
from sit_jax.training.step import init_state, make_train_spec

Run = tuple[pathlib.Path, TrainState]


def write_run(folder: pathlib.Path, config: Config) -> TrainState:
    """The folder of a run that saved its state twice."""
    workdir.create_or_verify(folder, config, resume=False)
    task = make_train_spec(config, steps_per_epoch=1)
    state = init_state(task, make_mesh(devices=jax.devices()[:1]))
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(dataclasses.replace(state, step=state.step + 1), {})
        params = jax.tree.map(lambda x: x + 1, state.params)
        checkpoints.save(dataclasses.replace(state, step=state.step + 2, params=params), {})
    return state


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "student"
    return folder, write_run(folder, tiny.config(optim=OptimConfig(lr=1e-3, ema_decay=0.9)))


def assert_equal(mine: Any, theirs: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b)), mine, theirs)


def test_a_run_and_its_checkpoints(student: Run, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, state = student
    assert cli.main(["convert", str(folder / "checkpoints" / "1"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("found: a run of sit_jax, student with RTSMs, 10 classes, 32 px\n")
    weights = read_weights(tmp_path / "out")
    assert weights.arch == tiny.STUDENT
    assert_equal(weights.params, state.params["model"])
    assert_equal(weights.rtsm, state.params["rtsm"])
    assert_equal(weights.batch_stats, state.batch_stats)
    assert weights.metadata["preprocessing"]["interpolation"] == "bicubic"
    newest = read_weights(folder)
    assert_equal(newest.params, jax.tree.map(lambda x: x + 1, state.params["model"]))
    assert_equal(newest.rtsm, jax.tree.map(lambda x: x + 1, state.params["rtsm"]))
    assert state.ema is not None
    assert_equal(read_weights(folder, options=Options(ema=True, rtsm=False)).params, state.ema["params"])


def test_runs_without_reverse_modules_and_of_other_kinds(tmp_path: pathlib.Path) -> None:
    write_run(tmp_path / "alone", tiny.config(Loss(), teacher=None))
    assert read_weights(tmp_path / "alone").rtsm == {}
    cnn = tiny.config(Loss(), teacher=None, model=ModelConfig(architecture=tiny.CNN))
    workdir.create_or_verify(tmp_path / "cnn", cnn, resume=False)
    (tmp_path / "cnn" / "checkpoints").mkdir()
    with pytest.raises(UserError, match="regnet"):
        read_weights(tmp_path / "cnn")


def test_a_run_takes_no_other_model(student: Run, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", str(student[0]), str(tmp_path / "out"), "--model.num_heads=4"]) == 2
    error = capsys.readouterr().err
    assert str(student[0]) in error
    assert "--model.num_heads" in error
    assert list(tmp_path.iterdir()) == []


def test_starting_from_a_file_of_others(tmp_path: pathlib.Path) -> None:
    """DeiT's weights at one resolution and class count start a student of another."""
    path = original_models.save_torch(tmp_path / "deit.pth", {"model": original_models.state_dict(PLAIN)})
    changes: dict[str, Any] = {"image_size": 48, "num_classes": 3, "stage_blocks": (1, 1), "keep_ratio": 0.5}
    arch = dataclasses.replace(PLAIN, **changes)
    lines: list[str] = []
    weights = initial_weights(path, arch, lines.append)
    assert [line.split(":")[0] for line in lines] == ["read", "found", "changed", "changed"]
    assert weights.params["positions"].shape == (1, 37, 16)
    assert weights.params["head"]["kernel"].shape == (16, 3)
    assert "slimming_0" not in weights.params
