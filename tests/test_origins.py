"""Where first weights and teachers come from, in the documented order."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sit_jax import sharding
from sit_jax.checkpoint import Checkpoints
from sit_jax.config import Config, ModelConfig, OptimConfig, TeacherConfig
from sit_jax.convert.weights import Weights
from sit_jax.errors import UserError
from sit_jax.export.folder import save_folder
from sit_jax.models import build_model
from sit_jax.models.architecture import Architecture
from sit_jax.origins import check_origins, first_state, given_teacher
from sit_jax.train import init_state, make_task


def variables(arch: Architecture, seed: int) -> dict[str, Any]:
    images = jnp.zeros((1, arch.image_size, arch.image_size, arch.in_channels))
    return jax.device_get(build_model(arch).init(jax.random.key(seed), images))


def folder_of(path: pathlib.Path, arch: Architecture, seed: int) -> pathlib.Path:
    weights = variables(arch, seed)
    save_folder(path, Weights(arch, weights["params"], weights["batch_stats"], {}, {}), with_reverse=False)
    return path


def kernel(state: Any) -> np.ndarray:
    return np.asarray(state.params["model"]["blocks_0"]["attn"]["qkv"]["kernel"])


def state_of(config: Config, folder: pathlib.Path, teachers: Any = None) -> Any:
    task, mesh = make_task(config, 10), sharding.make_mesh(devices=jax.devices()[:1])
    with Checkpoints(folder) as checkpoints:
        return first_state(task, checkpoints, mesh, teachers or {})


def test_order(tmp_path: pathlib.Path) -> None:
    given = folder_of(tmp_path / "given", tiny.TEACHER, seed=1)
    teachers = {"teacher": variables(tiny.TEACHER, seed=2)}
    config, task = tiny.config(), make_task(tiny.config(), 10)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    fresh = kernel(init_state(task, mesh))
    expected = {
        "random": fresh,
        "teacher": teachers["teacher"]["params"]["blocks_0"]["attn"]["qkv"]["kernel"],
        str(given): variables(tiny.TEACHER, seed=1)["params"]["blocks_0"]["attn"]["qkv"]["kernel"],
        str(given / "model.safetensors"): variables(tiny.TEACHER, seed=1)["params"]["blocks_0"]["attn"]["qkv"][
            "kernel"
        ],
    }
    for init, weights in expected.items():
        state = state_of(dataclasses.replace(config, init=init), tmp_path / "empty", teachers)
        np.testing.assert_array_equal(kernel(state), weights)
        assert int(state.step) == 0
        # What no teacher has is drawn at random: the same as without one.
        slimming = state.params["model"]["slimming_0"]["fc1"]["kernel"]
        np.testing.assert_array_equal(slimming, init_state(task, mesh).params["model"]["slimming_0"]["fc1"]["kernel"])
    np.testing.assert_array_equal(kernel(state_of(config, tmp_path / "empty")), fresh)
    # The run's own checkpoint comes before all of them.
    own = init_state(task, mesh, variables(tiny.TEACHER, seed=3)).replace(step=jnp.asarray(7, jnp.int32))  # type: ignore[attr-defined]
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(own, {})
    state = state_of(dataclasses.replace(config, init=str(given)), tmp_path / "run", teachers)
    np.testing.assert_array_equal(kernel(state), kernel(own))
    assert int(state.step) == 7


def test_weights_of_other_programs_as_teachers(tmp_path: pathlib.Path) -> None:
    folder = folder_of(tmp_path / "teacher", tiny.TEACHER, seed=1)
    section = TeacherConfig(model=ModelConfig(architecture=tiny.TEACHER), run=str(folder))
    jax.tree.map(np.testing.assert_array_equal, given_teacher(section, "teacher"), variables(tiny.TEACHER, seed=1))
    check_origins(tiny.config(teacher=section), tmp_path / "run")
    deeper = dataclasses.replace(section, model=ModelConfig(architecture=tiny.plain(num_heads=4, depth=6)))
    with pytest.raises(UserError, match=r"^teacher\.run: .*: depth is 4 there and 6 here, num_heads is 2 there"):
        given_teacher(deeper, "teacher")


def test_what_is_not_there(tmp_path: pathlib.Path) -> None:
    absent = str(tmp_path / "absent")
    with pytest.raises(UserError, match=r"^init: there is no .*absent; name a run, a model folder or a file"):
        check_origins(tiny.config(init=absent), tmp_path / "run")
    section = TeacherConfig(model=ModelConfig(architecture=tiny.TEACHER), run=absent)
    with pytest.raises(UserError, match="absent"):
        check_origins(tiny.config(teacher=section), tmp_path / "run")
    wider = folder_of(tmp_path / "wider", tiny.plain(dim=32), seed=1)
    config = tiny.config(init=str(wider), optim=OptimConfig(lr=1e-3))
    message = (
        r"^init: the weights in .*wider do not fit the model: batch_stats/stem/bn1/mean is \(4,\) there and \(2,\) here"
    )
    with pytest.raises(UserError, match=message):
        state_of(config, tmp_path / "empty")
    with pytest.raises(UserError, match=message):  # Before the teacher is trained, too.
        check_origins(config, tmp_path / "run")
