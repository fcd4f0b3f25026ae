"""Meshes: the same steps whatever the shape, memory split as promised, and clear refusals."""

import dataclasses
import math
import pathlib
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec

from sit_jax.cli import app as cli
from sit_jax.config import Config, LossConfig, MeshConfig, ModelConfig, OptimConfig, TeacherConfig
from sit_jax.errors import ConfigError
from sit_jax.models import build_model
from sit_jax.models.architecture import Architecture
from sit_jax.parallel import sharding
from sit_jax.training.step import init_state, make_train_spec, make_train_step

# Wide enough that every kind of layer is split.
WIDE = Architecture(
    image_size=32, in_channels=1, num_classes=10, stem="conv4", dim=64, depth=3, num_heads=4, mlp_ratio=4.0
)
SLIM = dataclasses.replace(WIDE, stage_blocks=(1, 2), keep_ratio=0.5)


def config(**changes: Any) -> Config:
    teacher = TeacherConfig(model=ModelConfig(architecture=WIDE))
    # Some gradients are 0 but for rounding (a bias in front of a softmax): with the usual epsilon Adam would make a
    # step of the full rate of what is left, in either direction.
    optim = OptimConfig(lr=1e-3, ema_decay=0.9, eps=1e-5)
    return tiny.config(arch=SLIM, teacher=teacher, optim=optim, **changes)


def run_steps(shape: tuple[int, int, int], count: int) -> tuple[list[float], Any]:
    """Losses of some steps on a mesh, and the state after them, on the host."""
    mesh = sharding.make_mesh(
        MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]), jax.devices()[: math.prod(shape)]
    )
    task = make_train_spec(config(), steps_per_epoch=10)
    images = jnp.zeros((1, 32, 32, 1))
    teacher = build_model(WIDE).init(jax.random.key(7), images)
    teacher = jax.device_put(teacher, sharding.state_shardings(mesh, teacher))
    state, step = init_state(task, mesh, teacher), make_train_step(task, mesh)
    losses = []
    for index in range(count):
        batch = sharding.put_batch(mesh, tiny.batch(16, seed=index))
        state, metrics = step(state, batch, {"teacher": teacher})
        losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1, "compiled again after the first step"  # type: ignore[attr-defined]
    return losses, jax.device_get({"params": state.params, "stats": state.batch_stats, "ema": state.ema})


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], Any]:
    return run_steps((1, 1, 1), 6)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_every_mesh_trains_the_same(shape: tuple[int, int, int], alone: Any) -> None:
    losses, state = run_steps(shape, 6)
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state, alone[1])


def test_fsdp_holds_an_eighth_of_everything() -> None:
    arch = dataclasses.replace(WIDE, dim=384, num_heads=6, image_size=64)
    slim = dataclasses.replace(arch, stage_blocks=(1, 2), keep_ratio=0.5)
    teacher = TeacherConfig(model=ModelConfig(architecture=arch))
    big = tiny.config(arch=slim, teacher=teacher, optim=OptimConfig(ema_decay=0.9))
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8, tensor=1))
    state = init_state(make_train_spec(big, 10), mesh)
    for tree in (state.params, state.opt_state, state.ema):
        leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "addressable_shards")]
        whole = sum(leaf.nbytes for leaf in leaves)
        for device in range(8):
            held = sum(leaf.addressable_shards[device].data.nbytes for leaf in leaves)
            assert held <= whole / 8 * 1.05
    assert state.step.sharding.is_fully_replicated


def test_rule() -> None:
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    for path, shape, expected in (
        ("params/model/blocks_0/attn/qkv/kernel", (64, 192), PartitionSpec("fsdp", "tensor")),
        ("params/model/blocks_0/attn/proj/kernel", (64, 64), PartitionSpec("tensor", "fsdp")),
        ("params/model/blocks_0/mlp/fc1/kernel", (64, 256), PartitionSpec("fsdp", "tensor")),
        ("params/model/blocks_0/mlp/fc1/bias", (256,), PartitionSpec("tensor")),
        ("params/model/blocks_0/mlp/fc2/bias", (64,), PartitionSpec(None)),
        ("opt/0/mu/rtsm/blocks_1/token_mlp/fc2/kernel", (784, 196), PartitionSpec("tensor", "fsdp")),
        ("params/model/slimming_0/fc2/kernel", (192, 98), PartitionSpec("fsdp", None)),
        ("params/model/slimming_0/scale", (), PartitionSpec()),
        ("params/model/positions", (1, 197, 64), PartitionSpec(None, None, "fsdp")),
        ("params/model/stem/conv4/kernel", (3, 3, 32, 64), PartitionSpec(None, None, None, "fsdp")),
        ("params/model/blocks_0/norm1/scale", (64,), PartitionSpec(None)),
        ("params/model/blocks_0/mlp/fc1/kernel", (63, 255), PartitionSpec(None, None)),
    ):
        assert sharding.partition_spec(mesh, path.split("/"), shape) == expected, path


def test_mesh_shapes() -> None:
    assert sharding.mesh_shape(MeshConfig(), 8) == (8, 1, 1)
    assert sharding.mesh_shape(MeshConfig(data=2, fsdp=-1, tensor=2), 16) == (2, 4, 2)
    for wrong in (MeshConfig(data=3), MeshConfig(data=-1, tensor=3)):
        with pytest.raises(ConfigError) as caught:
            sharding.mesh_shape(wrong, 8)
        assert caught.value.key == "mesh"
    for sizes in ({"data": 0}, {"fsdp": -2}, {"data": -1, "fsdp": -1}):
        with pytest.raises(ValueError, match=r"-1 for the rest|can be -1"):
            MeshConfig(**sizes)


def test_what_does_not_divide_is_told_before_anything_is_compiled() -> None:
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sharding.check_mesh(mesh, config(batch_size=16))
    odd = ModelConfig(architecture=dataclasses.replace(WIDE, dim=48, num_heads=3))
    for key, wrong in (
        ("batch_size", config(batch_size=18)),
        ("batch_size", tiny.config(batch_size=12, optim=OptimConfig(accumulate_steps=2))),
        ("model.num_heads", tiny.config(model=odd, teacher=None, loss=LossConfig())),
    ):
        with pytest.raises(ConfigError) as caught:
            sharding.check_mesh(mesh, wrong)
        assert caught.value.key == key


def test_evaluation_is_in_batches_of_a_multiple_of_the_devices() -> None:
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sharding.check_mesh(mesh, config(batch_size=16, eval_batch_size=30))
    assert [sharding.eval_batch_size(mesh, size) for size in (1, 28, 30)] == [4, 28, 32]


def test_devices_that_share_examples_are_one_hosts() -> None:
    # As the torus of a v5e:4x4 lays them: eight devices a host, but in columns of two.
    def mesh(owners: list[int]) -> Any:
        devices = np.array([types.SimpleNamespace(process_index=owner) for owner in owners]).reshape(1, 2, 4)
        return types.SimpleNamespace(shape={"data": 1, "fsdp": 2, "tensor": 4}, devices=devices)

    sharding.check_mesh(mesh([0, 0, 0, 0, 1, 1, 1, 1]), config())
    with pytest.raises(ConfigError) as caught:
        sharding.check_mesh(mesh([0, 0, 1, 1, 0, 0, 1, 1]), config())
    assert caught.value.key == "mesh.tensor"


def test_the_command_prints_every_arrays_place(tmp_path: pathlib.Path, digits_dir: str, capsys: Any) -> None:
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=4", "--config.mesh.tensor=1"]
    words = ["train", "--config", "configs/digits.py", "--workdir", str(tmp_path / "run"), "--print_sharding"]
    wide = ["--config.model.dim=96", "--config.teacher.model.dim=96", "--config.optim.ema_decay=0.9"]
    assert cli.main([*words, *mesh, *wide, f"--config.data.data_dir={digits_dir}"]) == 0
    rows = [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    kernels = {row[0]: row[1:] for row in rows if row[0].endswith("blocks_0/attn/qkv/kernel")}
    # Of 96 x 288 values of 4 bytes each device holds a quarter; so of the moments, the average and the teacher.
    assert {name.split("/")[0] for name in kernels} == {"state", "teachers"}
    assert len(kernels) >= 5
    for name, cells in kernels.items():
        assert cells == ["96 x 288", "- x fsdp", f"{96 * 288 * 4 / 4 / 2**20:.3f}"], name
    assert not (tmp_path / "run").exists()
