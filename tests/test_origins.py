"""Where first weights and teachers come from, in the documented order."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import original_models
import pytest
import random_weights
import safetensors.numpy
import tiny
from test_other_stems import torch_model

from sit_jax.config import Config, LossConfig, ModelConfig, TeacherConfig
from sit_jax.errors import ConfigError, UserError
from sit_jax.io import runs as workdir
from sit_jax.io.convert.read import Options
from sit_jax.io.load import read_weights
from sit_jax.models.architecture import Architecture
from sit_jax.parallel import sharding
from sit_jax.training.checkpoint import Checkpoints
from sit_jax.training.init import check_origins, given_teacher, initial_state
from sit_jax.training.step import init_state, make_train_spec


def folder_of(path: pathlib.Path, arch: Architecture, seed: int) -> pathlib.Path:
    """A model folder, without class names: the classes are those of the data."""
    dataclasses.replace(random_weights.draw(arch, seed=seed), metadata={}).save(path)
    return path


def kernel(state: Any) -> np.ndarray:
    return np.asarray(state.params["model"]["blocks_0"]["attn"]["qkv"]["kernel"])


def state_of(config: Config, folder: pathlib.Path, teachers: Any = None) -> Any:
    task, mesh = make_train_spec(config, 10), sharding.make_mesh(devices=jax.devices()[:1])
    with Checkpoints(folder) as checkpoints:
        return initial_state(task, checkpoints, mesh, teachers or {})


def test_order(tmp_path: pathlib.Path) -> None:
    given = folder_of(tmp_path / "given", tiny.TWO_BLOCKS, seed=1)
    drawn = {seed: random_weights.variables(random_weights.draw(tiny.TWO_BLOCKS, seed=seed)) for seed in (1, 2, 3)}
    kernels = {seed: weights["params"]["blocks_0"]["attn"]["qkv"]["kernel"] for seed, weights in drawn.items()}
    config, teachers = tiny.small(), {"teacher": drawn[2]}
    fresh = state_of(config, tmp_path / "empty")
    cases = {"random": kernel(fresh), "teacher": kernels[2]}
    cases |= dict.fromkeys((str(given), str(given / "model.safetensors")), kernels[1])
    for init, weights in cases.items():
        state = state_of(dataclasses.replace(config, init=init), tmp_path / "empty", teachers)
        np.testing.assert_array_equal(kernel(state), weights)
        assert int(state.step) == 0
        # What no teacher has is randomly initialized: the same as without one.
        mine, theirs = (x.params["model"]["slimming_0"]["fc1"]["kernel"] for x in (state, fresh))
        np.testing.assert_array_equal(mine, theirs)
    # The run's own checkpoint comes before all of them.
    own = state.replace(step=jnp.asarray(7, jnp.int32))
    own.params["model"]["blocks_0"]["attn"]["qkv"]["kernel"] = jnp.asarray(kernels[3])
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(own, {})
    state = state_of(dataclasses.replace(config, init=str(given)), tmp_path / "run", teachers)
    np.testing.assert_array_equal(kernel(state), kernels[3])
    assert int(state.step) == 7


def test_weights_of_other_programs_as_teachers(tmp_path: pathlib.Path) -> None:
    folder = folder_of(tmp_path / "teacher", tiny.TEACHER, seed=1)
    section = TeacherConfig(model=ModelConfig(architecture=tiny.TEACHER), run=str(folder))
    expected = random_weights.variables(random_weights.draw(tiny.TEACHER, seed=1))
    jax.tree.map(np.testing.assert_array_equal, given_teacher(section, "teacher"), expected)
    check_origins(tiny.config(teacher=section), tmp_path / "run")
    deeper = dataclasses.replace(section, model=ModelConfig(architecture=tiny.plain(num_heads=4, depth=6)))
    with pytest.raises(UserError, match=r"^teacher\.run: .*: depth is 4 there and 6 here, num_heads is 2 there"):
        given_teacher(deeper, "teacher")
    with pytest.raises(UserError, match="absent"):
        given_teacher(dataclasses.replace(section, run=str(tmp_path / "absent")), "teacher")
    with pytest.raises(ConfigError, match=r"^init: .*absent"):
        check_origins(tiny.config(init=str(tmp_path / "absent")), tmp_path / "run")


def starting(arch: Any, init: str) -> Config:
    """A run without a teacher."""
    return tiny.config(LossConfig(), model=ModelConfig(architecture=arch), teacher=None, init=init)


def run_of(folder: pathlib.Path, arch: Any, config: Config | None = None) -> pathlib.Path:
    """The folder of a run with one checkpoint."""
    config = config or starting(arch, "random")
    workdir.create_or_verify(folder, config, resume=False)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(init_state(make_train_spec(config, 10), sharding.make_mesh(devices=jax.devices()[:1])), {})
    return folder


# Fields of another model's architecture, the first of which the message compares.
OTHERS: list[dict[str, Any]] = [
    {"depth": 6},
    {"num_heads": 4},
    {"layer_scale": True},
    {"mlp_ratio": 3.0},
    {"stem": "conv6"},
    {"distillation_token": True},
    {"stage_blocks": (2, 2), "keep_ratio": 0.5},
    {"kept_tokens": (4, 1), "stage_blocks": (1, 3)},
]


@contextlib.contextmanager
def refused(source: str, field: str, theirs: object) -> Iterator[None]:
    with pytest.raises(ConfigError) as caught:
        yield
    assert caught.value.key == "init"
    assert source in caught.value.problem
    assert f"{field} is {theirs!r} there" in caught.value.problem


@pytest.mark.parametrize("changes", OTHERS, ids=str)
def test_a_run_of_another_model(changes: dict[str, Any], tmp_path: pathlib.Path) -> None:
    """It is refused before any of its weights is read: there are none."""
    workdir.create_or_verify(tmp_path / "other", starting(tiny.plain(**changes), "random"), resume=False)
    (tmp_path / "other" / "checkpoints").mkdir()
    with refused("other", *next(iter(changes.items()))):
        check_origins(starting(tiny.STUDENT, str(tmp_path / "other")), tmp_path / "run")


def test_weights_of_another_model(tmp_path: pathlib.Path) -> None:
    theirs = tiny.plain(num_heads=4)
    folder = folder_of(tmp_path / "given", theirs, seed=1)
    for init in (folder, folder / "model.safetensors"):
        with refused("given", "num_heads", 4):
            check_origins(starting(tiny.STUDENT, str(init)), tmp_path / "run")
    # A student that starts from its teacher computes the same in every block.
    config = tiny.config(LossConfig(logits=1.0), teacher=TeacherConfig(model=ModelConfig(architecture=theirs)))
    with refused("teacher", "num_heads", 4):
        check_origins(config, tmp_path / "run")
    check_origins(dataclasses.replace(config, init="random"), tmp_path / "run")


def test_a_file_whose_shape_no_named_model_has(tmp_path: pathlib.Path) -> None:
    """What it does not tell is taken from the model that starts; what it tells is compared."""
    arch = Architecture(image_size=32, patch_size=8, num_classes=5, dim=16, depth=2, num_heads=2)
    state = {key: value.numpy() for key, value in torch_model(arch).state_dict().items()}
    safetensors.numpy.save_file(state, tmp_path / "x.safetensors")
    cases: list[dict[str, Any]] = [{"depth": 4}, {"dim": 24, "num_heads": 3}, {"patch_size": 16}]
    for changes in cases:
        config = starting(dataclasses.replace(arch, **changes), str(tmp_path / "x.safetensors"))
        field = next(iter(changes))
        with refused("x.safetensors", field, getattr(arch, field)):
            check_origins(config, tmp_path / "run")
    config = starting(arch, str(tmp_path / "x.safetensors"))
    check_origins(config, tmp_path / "run")
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "vit_x_patch8_32", "model_args": {"num_heads": 4}})
    )
    with refused("x.safetensors", "num_heads", 4):
        check_origins(config, tmp_path / "run")


def test_other_families(tmp_path: pathlib.Path) -> None:
    folder = run_of(tmp_path / "cnn", tiny.CNN)
    with pytest.raises(UserError, match=r"^init: .*cnn"):
        check_origins(starting(tiny.TEACHER, str(folder)), tmp_path / "run")
    deeper = dataclasses.replace(tiny.CNN, depths=(1, 2))
    with refused("cnn", "depths", (1, 1)):
        check_origins(starting(deeper, str(folder)), tmp_path / "run")
    more = dataclasses.replace(tiny.CNN, image_size=64, num_classes=3)
    check_origins(starting(more, str(folder)), tmp_path / "run")


def drawn(config: Config, folder: pathlib.Path, capsys: pytest.CaptureFixture[str], teachers: Any = None) -> set[str]:
    """What a run says that it draws at random."""
    capsys.readouterr()
    state_of(config, folder, teachers)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("init: randomly initialized: ")]
    assert len(lines) <= 1
    return set(lines[0].removeprefix("init: randomly initialized: ").split(", ")) if lines else set()


def test_what_is_drawn_at_random_is_listed(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    teachers = {"teacher": random_weights.variables(random_weights.draw(tiny.TWO_BLOCKS))}
    assert drawn(tiny.small(), tmp_path / "empty", capsys, teachers) == {"slimming_0", "reverse modules"}
    run = run_of(tmp_path / "run", tiny.TWO_BLOCKS)
    more = dataclasses.replace(tiny.TWO_BLOCKS, num_classes=3, distillation_token=True, aux_head=True)
    config = starting(more, str(run))
    tokens = {"distillation_token", "distillation_position"}
    assert drawn(config, tmp_path / "empty", capsys) == {"head", "distillation_head", "aux_head", *tokens}
    student = folder_of(tmp_path / "student", tiny.SLIMMED, seed=1)
    assert drawn(tiny.small(init=str(student)), tmp_path / "empty", capsys) == {"reverse modules"}
    assert drawn(starting(tiny.SLIMMED, str(student)), tmp_path / "empty", capsys) == set()


def test_reverse_modules_of_an_original_checkpoint(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = golden_files.load("lvvit_4c")
    path = original_models.save_torch(tmp_path / "x.pth", original_models.golden_weights("lvvit_4c"))
    config = dataclasses.replace(golden_files.config(golden), init=str(path))
    state = state_of(config, tmp_path / "empty")
    assert set(golden.student["rtsm"]) == {"blocks_1", "blocks_2", "blocks_3", "blocks_4"}
    jax.tree.map(np.testing.assert_array_equal, state.params["rtsm"], golden.student["rtsm"])
    jax.tree.map(np.testing.assert_array_equal, state.params["model"], golden.student["params"])
    assert "init: taken: the model, reverse modules\n" in capsys.readouterr().err
    # Without the token loss, the run has none; at another size, those of the file do not fit.
    alone = dataclasses.replace(config, loss=LossConfig(), teacher=None)
    assert "rtsm" not in state_of(alone, tmp_path / "empty").params
    assert capsys.readouterr().err.count("RTSMs left out") == 1
    tokens = (36, *golden.arch.token_counts[1:])
    larger = dataclasses.replace(golden.arch, image_size=96, keep_ratio=None, kept_tokens=tokens)
    sections = (ModelConfig(architecture=arch) for arch in (larger, larger.without_slimming()))
    other = dataclasses.replace(config, model=next(sections), teacher=TeacherConfig(model=next(sections)))
    assert drawn(other, tmp_path / "empty", capsys) == {"reverse modules"}


@pytest.mark.parametrize("source", ["run", "run/checkpoints/0", "folder", "folder/model.safetensors"])
def test_reverse_modules_of_our_own(source: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    if source.startswith("run"):
        run_of(tmp_path / "run", tiny.SLIMMED, tiny.small(seed=3))
    else:
        random_weights.draw(tiny.SLIMMED, rtsm=True).save(tmp_path / "folder", with_rtsm=True)
    expected = read_weights(tmp_path / source, options=Options(like=tiny.SLIMMED))
    assert expected.rtsm
    config = dataclasses.replace(tiny.small(), init=str(tmp_path / source))
    jax.tree.map(np.testing.assert_array_equal, state_of(config, tmp_path / "empty").params["rtsm"], expected.rtsm)
    alone = dataclasses.replace(config, loss=LossConfig(), teacher=None)
    capsys.readouterr()
    assert "rtsm" not in state_of(alone, tmp_path / "empty").params
    assert capsys.readouterr().err.count("RTSMs left out") == 1
