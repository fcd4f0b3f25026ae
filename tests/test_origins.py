"""Where first weights and teachers come from, in the documented order."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
from test_other_stems import torch_model

from sit_jax.config import Config, LossConfig, ModelConfig, OptimConfig, TeacherConfig
from sit_jax.errors import UserError
from sit_jax.io import runs as workdir
from sit_jax.io.model import Model
from sit_jax.models import build_model
from sit_jax.models.architecture import Architecture
from sit_jax.parallel import sharding
from sit_jax.training.checkpoint import Checkpoints
from sit_jax.training.init import check_origins, given_teacher, initial_state
from sit_jax.training.step import init_state, make_train_spec


def variables(arch: Architecture, seed: int) -> dict[str, Any]:
    images = jnp.zeros((1, arch.image_size, arch.image_size, arch.in_channels))
    return jax.device_get(build_model(arch).init(jax.random.key(seed), images))


def folder_of(path: pathlib.Path, arch: Architecture, seed: int) -> pathlib.Path:
    Model(arch, variables(arch, seed)).save(path)
    return path


def kernel(state: Any) -> np.ndarray:
    return np.asarray(state.params["model"]["blocks_0"]["attn"]["qkv"]["kernel"])


def state_of(config: Config, folder: pathlib.Path, teachers: Any = None) -> Any:
    task, mesh = make_train_spec(config, 10), sharding.make_mesh(devices=jax.devices()[:1])
    with Checkpoints(folder) as checkpoints:
        return initial_state(task, checkpoints, mesh, teachers or {})


def test_order(tmp_path: pathlib.Path) -> None:
    given = folder_of(tmp_path / "given", tiny.TEACHER, seed=1)
    teachers = {"teacher": variables(tiny.TEACHER, seed=2)}
    config, task = tiny.config(), make_train_spec(tiny.config(), 10)
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
    message = r"^init: .*wider.*dim is 32 there and 16 here"
    with pytest.raises(UserError, match=message):
        state_of(config, tmp_path / "empty")
    with pytest.raises(UserError, match=message):  # Before the teacher is trained, too.
        check_origins(config, tmp_path / "run")


def starting(arch: Any, init: str) -> Config:
    """A run without a teacher."""
    return tiny.config(LossConfig(), model=ModelConfig(architecture=arch), teacher=None, init=init)


def run_of(folder: pathlib.Path, arch: Any) -> pathlib.Path:
    """The folder of a run with one checkpoint."""
    config = starting(arch, "random")
    workdir.create_or_verify(folder, config, resume=False)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(init_state(make_train_spec(config, 10), sharding.make_mesh(devices=jax.devices()[:1])), {})
    return folder


OTHERS = [
    (tiny.plain(depth=2), "depth is 2 there and 4 here"),
    (tiny.plain(depth=6), "depth is 6 there and 4 here"),
    (tiny.plain(num_heads=4), "num_heads is 4 there and 2 here"),
    (tiny.plain(residual_scale=2.0), "residual_scale is 2.0 there"),
    (tiny.plain(norm_eps=1e-5), "norm_eps is 1e-05 there"),
    (tiny.plain(layer_scale=True), "layer_scale is True there"),
    (tiny.plain(mlp_ratio=3.0), "mlp_ratio is 3.0 there"),
    (tiny.plain(qkv_bias=False), "qkv_bias is False there"),
    (tiny.plain(stem="conv6"), "stem is 'conv6' there"),
    (tiny.plain(in_channels=3), "in_channels is 3 there"),
    (tiny.plain(distillation_token=True), "distillation_token is True there"),
    (tiny.plain(stage_blocks=(2, 2), keep_ratio=0.5), r"stage_blocks is \(2, 2\) there"),
    (tiny.plain(stage_blocks=(1, 3), kept_tokens=(4, 1)), r"kept_tokens is \(4, 1\) there"),
]


@pytest.mark.parametrize(("theirs", "message"), OTHERS)
def test_weights_of_another_model(theirs: Architecture, message: str, tmp_path: pathlib.Path) -> None:
    folder = folder_of(tmp_path / "given", theirs, seed=1)
    for init in (folder, folder / "model.safetensors"):
        with pytest.raises(UserError, match=f"^init: .*given.*{message}"):
            check_origins(tiny.config(init=str(init), teacher=None, loss=LossConfig()), tmp_path / "run")
    # The same of a run, before any of its weights is read.
    workdir.create_or_verify(tmp_path / "other", tiny.config(LossConfig(), theirs, teacher=None), resume=False)
    (tmp_path / "other" / "checkpoints").mkdir()
    config = tiny.config(init=str(tmp_path / "other"), teacher=None, loss=LossConfig())
    with pytest.raises(UserError, match=f"^init: .*other.*{message}"):
        check_origins(config, tmp_path / "run")
    with pytest.raises(UserError, match=f"^init: .*other.*{message}"):
        state_of(config, tmp_path / "empty")


@pytest.mark.parametrize(("theirs", "message"), [other for other in OTHERS if not other[0].stage_blocks][2:8])
def test_the_teacher_as_another_model(theirs: Architecture, message: str, tmp_path: pathlib.Path) -> None:
    """A student that starts from its teacher computes the same in every block."""
    section = TeacherConfig(model=ModelConfig(architecture=theirs))
    config = tiny.config(LossConfig(logits=1.0), teacher=section)
    with pytest.raises(UserError, match=f"^init: .*teacher.*{message}"):
        check_origins(config, tmp_path / "run")
    with pytest.raises(UserError, match=f"^init: .*teacher.*{message}"):
        state_of(config, tmp_path / "empty", {"teacher": variables(theirs, seed=1)})
    check_origins(dataclasses.replace(config, init="random"), tmp_path / "run")


def test_less_slimming_than_the_weights_have(tmp_path: pathlib.Path) -> None:
    folder = folder_of(tmp_path / "student", tiny.STUDENT, seed=1)
    with pytest.raises(UserError, match=r"^init: .*stage_blocks is \(1, 3\) there and \(\) here"):
        check_origins(starting(tiny.TEACHER, str(folder)), tmp_path / "run")


def test_a_file_whose_shape_no_named_model_has(tmp_path: pathlib.Path) -> None:
    """What it does not tell is taken from the model that starts; what it tells is compared."""
    arch = Architecture(image_size=32, patch_size=8, num_classes=5, dim=16, depth=2, num_heads=2)
    state = {key: value.numpy() for key, value in torch_model(arch).state_dict().items()}
    safetensors.numpy.save_file(state, tmp_path / "x.safetensors")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"depth": 4}, "depth is 2 there and 4 here"),
        ({"dim": 24, "num_heads": 3}, "dim is 16 there and 24 here"),
        ({"patch_size": 16}, "patch_size is 8 there"),
    ]
    for changes, message in cases:
        mine = dataclasses.replace(arch, **changes)
        config = starting(mine, str(tmp_path / "x.safetensors"))
        with pytest.raises(UserError, match=f"^init: .*{message}"):
            check_origins(config, tmp_path / "run")
    config = starting(arch, str(tmp_path / "x.safetensors"))
    check_origins(config, tmp_path / "run")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "x", "model_args": {"num_heads": 4}}))
    with pytest.raises(UserError, match=r"^init: .*num_heads is 4 there and 2 here"):
        check_origins(config, tmp_path / "run")


def test_other_families(tmp_path: pathlib.Path) -> None:
    folder = run_of(tmp_path / "cnn", tiny.CNN)
    with pytest.raises(UserError, match=r"^init: .*cnn"):
        check_origins(starting(tiny.TEACHER, str(folder)), tmp_path / "run")
    deeper = dataclasses.replace(tiny.CNN, depths=(1, 2))
    with pytest.raises(UserError, match=r"^init: .*depths is \(1, 1\) there and \(1, 2\) here"):
        check_origins(starting(deeper, str(folder)), tmp_path / "run")
    more = dataclasses.replace(tiny.CNN, image_size=64, num_classes=3)
    check_origins(starting(more, str(folder)), tmp_path / "run")


def drawn(config: Config, folder: pathlib.Path, capsys: pytest.CaptureFixture[str], teachers: Any = None) -> set[str]:
    """What a run says that it draws at random."""
    capsys.readouterr()
    state_of(config, folder, teachers)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("init: drawn at random: ")]
    assert len(lines) <= 1
    return set(lines[0].removeprefix("init: drawn at random: ").split(", ")) if lines else set()


def test_what_is_drawn_at_random_is_listed(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = folder_of(tmp_path / "given", tiny.TEACHER, seed=1)
    same = starting(tiny.TEACHER, str(given))
    assert drawn(same, tmp_path / "empty", capsys) == set()
    assert drawn(tiny.config(init=str(given)), tmp_path / "empty", capsys) == {"slimming_0", "reverse modules"}
    teachers = {"teacher": variables(tiny.TEACHER, seed=2)}
    assert drawn(tiny.config(), tmp_path / "empty", capsys, teachers) == {"slimming_0", "reverse modules"}
    run = run_of(tmp_path / "run", tiny.TEACHER)
    more = tiny.plain(num_classes=3, distillation_token=True, aux_head=True)
    config = starting(more, str(run))
    tokens = {"distillation_token", "distillation_position"}
    assert drawn(config, tmp_path / "empty", capsys) == {"head", "distillation_head", "aux_head", *tokens}
    student = folder_of(tmp_path / "student", tiny.STUDENT, seed=1)
    assert drawn(tiny.config(init=str(student)), tmp_path / "empty", capsys) == {"reverse modules"}
