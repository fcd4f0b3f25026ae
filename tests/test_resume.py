"""A run that resumes with another configuration."""

import dataclasses
import json
import math
import pathlib
import re
import shutil
from typing import Any

import pytest
import tiny

from sit_jax.cli import app as cli
from sit_jax.config import Config, DataConfig, LogConfig, LossConfig, ModelConfig, OptimConfig
from sit_jax.config.config_dict import from_config_dict, to_dict
from sit_jax.config.resume import ON_RESUME
from sit_jax.errors import ConfigError
from sit_jax.io import runs
from sit_jax.training.loop import run
from sit_jax.training.metrics import read_metrics

EPOCH = 1438 // 128


def changed(config: Config, key: str, value: Any) -> Config:
    values: dict[str, Any] = to_dict(config)
    *sections, last = key.split(".")
    section = values
    for name in sections:
        section = section[name]
    section[last] = value
    return from_config_dict(values)


@pytest.fixture
def started(tmp_path: pathlib.Path) -> tuple[Config, pathlib.Path]:
    """A run directory with a checkpoint, of which only the name matters here."""
    config, folder = tiny.config(), tmp_path / "run"
    runs.create_or_verify(folder, config, resume=False)
    (folder / "checkpoints" / "11").mkdir(parents=True)
    return config, folder


TAKEN = {
    "log.every_steps": 3,
    "checkpoint.keep": 5,
    "mesh.fsdp": 2,
    "eval_batch_size": 8,
    "eval_every_epochs": 2,
    "data.data_dir": "/moved",
    "data.workers": 2,
    "model.remat": True,
    "epochs": 5,
    "optim.lr": 0.5,
    "optim.ema_decay": 0.9,
    "loss.logits": 1.0,
    "loss.token": 1.0,
    "loss.classification": 0.5,
    "loss.feature": 1.0,
    "augment.flip": 0.5,
    "mix.mixup": 0.2,
    "data.on_decode_error": "skip",
    "model.drop_path": 0.1,
}
REFUSED = {
    "seed": 1,
    "batch_size": 32,
    "init": "random",
    "model.num_heads": 4,
    "teacher.epochs": 2,
    "teacher.run": "other",
    "teacher.model.mlp_ratio": 3.0,
    "loss.token": 0.0,
    "data.name": "synthetic",
    "data.train_split": "train[:50%]",
    "data.val_fraction": 0.2,
}


@pytest.mark.parametrize("key", TAKEN)
def test_keys_that_may_change(started: tuple[Config, pathlib.Path], key: str) -> None:
    config, folder = started
    runs.create_or_verify(folder, changed(config, key, TAKEN[key]), resume=True)


@pytest.mark.parametrize("key", REFUSED)
def test_keys_of_another_run(started: tuple[Config, pathlib.Path], key: str) -> None:
    config, folder = started
    other = changed(config, key, REFUSED[key])
    with pytest.raises(ConfigError) as caught:
        runs.create_or_verify(folder, other, resume=True)
    assert caught.value.key == key
    assert f"--config.init={folder}" in caught.value.problem
    assert runs.read_config(folder) == config
    # A run without a checkpoint has nothing that another configuration could contradict.
    (folder / "checkpoints" / "11").rmdir()
    runs.create_or_verify(folder, other, resume=True)


def test_a_teacher_may_move(started: tuple[Config, pathlib.Path]) -> None:
    config, folder = started
    old = folder.parent / "old"
    runs.write_json(folder / "config.json", to_dict(changed(config, "teacher.run", str(old))))
    moved = changed(config, "teacher.run", "new")
    runs.create_or_verify(folder, moved, resume=True)
    old.mkdir()
    with pytest.raises(ConfigError) as caught:
        runs.create_or_verify(folder, moved, resume=True)
    assert caught.value.key == "teacher.run"


def test_the_documentation_has_the_same_table() -> None:
    page = pathlib.Path("docs/training.md").read_text()
    rows = re.findall(r"^\| (free|later|other): [^|]*\|([^|]*)\|$", page, re.MULTILINE)
    documented = {key: effect for effect, keys in rows for key in re.findall(r"`([^`]+)`", keys)}
    sections = {field.name for field in dataclasses.fields(Config)}
    assert documented == ON_RESUME | dict.fromkeys(documented.keys() & sections - ON_RESUME.keys(), "other")
    # Every part of a configuration is in the table.
    assert sections - documented.keys() == set()


def plain(digits_dir: str, **changes: Any) -> Config:
    """A run without a teacher."""
    model, data = ModelConfig(architecture=tiny.TWO_BLOCKS), DataConfig(data_dir=digits_dir)
    return tiny.config(loss=LossConfig(), model=model, teacher=None, data=data, batch_size=128, **changes)


def test_more_epochs_for_a_finished_run(
    digits_dir: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    config = plain(digits_dir, epochs=1, optim=OptimConfig(lr=1e-3), log=LogConfig(every_steps=EPOCH))
    run(config, folder)
    runs.write_json(folder / "summary.json", {})
    optim = dataclasses.replace(config.optim, lr=2e-3, ema_decay=0.5)
    # A finished run has no step left that a new value could change.
    run(dataclasses.replace(config, optim=optim), folder, resume=True)
    assert runs.read_config(folder) == config
    assert (folder / "summary.json").exists()
    assert "no effect" in capsys.readouterr().err
    longer = dataclasses.replace(config, epochs=3, optim=optim, eval_batch_size=32)
    result = run(longer, folder, resume=True)
    said = capsys.readouterr().err
    assert f"from step {EPOCH + 1} on: epochs is 3, was 1; optim.ema_decay is 0.5, was 0.0; optim.lr is 0.002" in said
    assert "ema_top1" in result
    assert runs.read_config(folder) == longer
    assert not (folder / "summary.json").exists()  # It was that of one epoch.
    rates = {line["step"]: line["lr/model"] for line in read_metrics(folder) if line["kind"] == "train"}
    assert list(rates) == [EPOCH, 2 * EPOCH, 3 * EPOCH]
    steps = range(EPOCH, 2 * EPOCH)
    cosine = [1e-5 + (2e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi * step / (3 * EPOCH))) for step in steps]
    assert rates[2 * EPOCH] == pytest.approx(sum(cosine) / EPOCH, rel=1e-5)
    assert cli.main(["checkpoint", "show", "--workdir", str(folder)]) == 0
    noted = json.loads(re.findall(r"^changes: (.*)$", capsys.readouterr().out, re.MULTILINE)[0])
    assert [x["key"] for x in noted] == ["epochs", "optim.ema_decay", "optim.lr"]
    assert {x["after_step"] for x in noted} == {EPOCH}
    page = tmp_path / "report.html"
    assert cli.main(["report", str(folder), "--no_model", "--output", str(page)]) == 0
    assert f"changed after step {EPOCH}" in page.read_text()
    with pytest.raises(ConfigError) as caught:
        run(dataclasses.replace(longer, epochs=2), folder, resume=True)
    assert caught.value.key == "epochs"
    assert runs.read_config(folder) == longer


def test_a_metric_that_is_new_since_the_restart(digits_dir: str, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    config = plain(digits_dir, epochs=2, log=LogConfig(every_steps=2 * EPOCH))
    run(config, folder)
    shutil.rmtree(folder / "checkpoints" / str(2 * EPOCH))
    # The checkpoint has the metrics of the steps since the last line, without the number of skipped images.
    skipping = dataclasses.replace(config, data=dataclasses.replace(config.data, on_decode_error="skip"))
    run(skipping, folder, resume=True)
    last = [line for line in read_metrics(folder) if line["kind"] == "train"][-1]
    assert last["step"] == 2 * EPOCH
    assert last["skipped"] == 0
