"""Looking into checkpoints, good ones and damaged ones."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sit_jax.analysis.checkpoints import list_checkpoints, read_contents, verify
from sit_jax.cli import app as cli
from sit_jax.config import Config, LossConfig, MeshConfig, OptimConfig
from sit_jax.config.config_dict import to_dict
from sit_jax.errors import RunError
from sit_jax.io import runs as workdir
from sit_jax.models.architecture import Architecture
from sit_jax.parallel import sharding
from sit_jax.training.checkpoint import Checkpoints
from sit_jax.training.step import abstract_state, init_state, make_train_spec

STUDENT = dataclasses.replace(tiny.STUDENT, depth=2, stage_blocks=(1, 1))


def config_of(arch: Architecture) -> Config:
    return tiny.small(student=arch, teacher=arch.without_slimming(), optim=OptimConfig(ema_decay=0.9))


@pytest.fixture(scope="module")
def config() -> Config:
    return config_of(STUDENT)


@pytest.fixture(scope="module")
def state(config: Config) -> Any:
    """A state on a mesh of eight devices."""
    return init_state(make_train_spec(config, 10), sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))


def write(folder: pathlib.Path, config: Config, states: dict[int, tuple[Any, dict[str, float]]]) -> None:
    workdir.create_or_verify(folder, config, resume=False)
    for step, (state, metrics) in states.items():
        with Checkpoints(folder, keep=2) as checkpoints:
            checkpoints.save(state.replace(step=jnp.asarray(step, jnp.int32)), metrics, {"data": {"next_example": 7}})


@pytest.fixture(scope="module")
def run(config: Config, state: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("inspected") / "run"
    write(folder, config, {2: (state, {"top1": 0.5}), 4: (state, {"top1": 0.25}), 6: (state, {}), 8: (state, {})})
    return folder


def test_list(run: pathlib.Path, capsys: Any) -> None:
    entries = list_checkpoints(run)
    # The best stays, and the newest two; each was written by an opening of its own, as after a resume.
    assert [(e.step, e.best, e.newest) for e in entries] == [(2, True, False), (6, False, False), (8, False, True)]
    assert entries[0].metrics == {"top1": 0.5}
    assert all(e.bytes > 10_000 and e.time.endswith("+00:00") for e in entries)
    assert cli.main(["checkpoint", "list", "--workdir", str(run), "--json"]) == 0
    assert [line["step"] for line in json.loads(capsys.readouterr().out)] == [2, 6, 8]
    assert cli.main(["checkpoint", "list", "--workdir", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[-1] == "best"
    assert lines[3].split()[-1] == "newest"


def test_show_and_verify_a_good_one(run: pathlib.Path, state: Any, capsys: Any) -> None:
    contents = read_contents(run)
    assert (contents.step, contents.metadata) == (8, {"data": {"next_example": 7}})
    arrays = {array.name: array[1:] for array in contents.arrays}
    kernel = ((16, 48), "float32", "2 x 2 x 2, split along tensor")
    assert arrays["model/params/blocks_0/attn/qkv/kernel"] == kernel
    assert arrays["ema/batch_stats/stem/bn1/mean"][0] == (2,)
    assert len(arrays) == len(jax.tree.leaves(state))
    assert cli.main(["checkpoint", "show", "--workdir", str(run), "--step", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("step 2\n")
    assert "metrics: top1 0.5000" in out
    assert cli.main(["checkpoint", "verify", "--workdir", str(run), "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    leaves = jax.tree.leaves(state)
    assert verdict == {"step": 8, "arrays": len(leaves), "bytes": sum(x.nbytes for x in leaves), "problems": []}


def refused(capsys: Any, *words: object) -> str:
    assert cli.main([str(word) for word in words]) == 2
    text: str = capsys.readouterr().err.strip()
    assert len(text.splitlines()) == 1, text
    return text


def test_verify_names_what_the_configuration_has_otherwise(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    other = config_of(dataclasses.replace(STUDENT, num_classes=7, qkv_bias=False))
    workdir.write_json(tmp_path / "config.json", to_dict(other))
    problems = verify(tmp_path).problems
    assert "model/params/head/kernel: is (16, 10), the configuration says (16, 7)" in problems
    assert "model/params/blocks_0/attn/qkv/bias: is not in the configuration's model" in problems


def restore(folder: pathlib.Path, config: Config) -> Any:
    mesh = sharding.make_mesh()
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(sharding.place_abstract(mesh, abstract_state(make_train_spec(config, 10))))


def test_restore_of_another_models(run: pathlib.Path, config: Config) -> None:
    wider = tiny.config(LossConfig(), tiny.plain(dim=32), teacher=None, optim=config.optim)
    with pytest.raises(RunError, match=r"^checkpoint 8 in .* is of another model: "):
        restore(run, wider)


@pytest.mark.parametrize(("damage", "part"), [("gone", "model"), ("overwritten", "training")])
def test_damaged_files(
    damage: str, part: str, run: pathlib.Path, config: Config, tmp_path: pathlib.Path, capsys: Any
) -> None:
    folder = tmp_path / part
    shutil.copytree(run, folder)
    target = max((folder / "checkpoints" / "8" / part).rglob("d/*"), key=lambda path: path.stat().st_size)
    if damage == "gone":
        target.unlink()
    else:
        target.write_bytes(np.random.default_rng(0).bytes(target.stat().st_size))
    assert "checkpoint 8 in" in refused(capsys, "checkpoint", "verify", "--workdir", folder, "--step", "8")
    with pytest.raises(RunError, match=r"^checkpoint 8 in .* is damaged .*; move 8 away to go on from step 6$"):
        restore(folder, config)
    # As a process leaves it that is killed while it removes an old checkpoint: it is not recommended.
    for path in (folder / "checkpoints" / "6").rglob("*METADATA*"):
        path.unlink()
    with pytest.raises(RunError, match=r"; move 8 away to go on from step 2$"):
        restore(folder, config)


def test_a_step_that_was_copied_in_part(run: pathlib.Path, tmp_path: pathlib.Path, capsys: Any) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    (tmp_path / "run" / "checkpoints" / "8").mkdir()
    capsys.readouterr()
    for verb, *more in (("evaluate",), ("export", tmp_path / "out", "--format", "folder")):
        text = refused(capsys, verb, tmp_path / "run", *more)
        assert "checkpoint 8 in" in text
        assert text.endswith("; move 8 away to go on from step 6")


def test_refusals(run: pathlib.Path, tmp_path: pathlib.Path, capsys: Any) -> None:
    for task in ("list", "show", "verify"):
        assert "has no checkpoint" in refused(capsys, "checkpoint", task, "--workdir", tmp_path)
    assert not list(tmp_path.iterdir())
    for task in ("show", "verify"):
        text = refused(capsys, "checkpoint", task, "--workdir", run, "--step", "3")
        assert text.endswith("has no checkpoint 3; there are 2, 6, 8")


def test_damaged_metrics(run: pathlib.Path, tmp_path: pathlib.Path, capsys: Any) -> None:
    shutil.copytree(run, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("*/metrics/*"):
        path.write_text('{"x')
    for task in ("list", "show", "verify"):
        assert "damaged" in refused(capsys, "checkpoint", task, "--workdir", tmp_path / "run")
