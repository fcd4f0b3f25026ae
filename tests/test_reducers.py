"""The protocol of token reducers: what they are given, where they are called, and that all else serves any of them."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import own_reducers
import pytest
import tiny

import sit_jax
from sit_jax.analysis.flops import count_cost
from sit_jax.cli import app as cli
from sit_jax.config import ModelConfig, TeacherConfig
from sit_jax.data.config import DataConfig
from sit_jax.errors import ConfigError
from sit_jax.io.export import stablehlo
from sit_jax.models import build_model
from sit_jax.models.architecture import Architecture
from sit_jax.parallel import sharding
from sit_jax.training.loop import run
from sit_jax.training.step import init_state, make_train_spec, make_train_step
from sit_jax.visual.token_maps import apply_watched

IMAGES = jax.random.normal(jax.random.key(1), (3, 32, 32, 1))


def student(reducer: str) -> Architecture:
    return dataclasses.replace(tiny.SLIMMED, reducer=f"own_reducers:{reducer}")


def drawn(arch: Architecture) -> Any:
    return jax.jit(build_model(arch).init)(jax.random.key(0), IMAGES)


def apply(arch: Architecture, variables: Any) -> Any:
    return jax.jit(build_model(arch).apply)(variables, IMAGES)


def test_a_reducer_inside_a_block_comes_before_its_mlp() -> None:
    # An MLP works on each token by itself, so dropping tokens before it or after it leaves the same.
    behind, inside = student("First"), student("FirstInside")
    variables = drawn(behind)
    logits, outputs = apply(behind, variables)
    same, _ = apply(inside, variables)
    np.testing.assert_allclose(logits, same, rtol=1e-5, atol=1e-6)
    # Up to the reducer the model is its un-slimmed teacher.
    _, whole = apply(behind.without_slimming(), variables)
    np.testing.assert_allclose(outputs.tokens[0], whole.tokens[0][:, : behind.token_counts[1]], rtol=1e-5, atol=1e-6)


def test_cues_are_those_of_the_block() -> None:
    arch = student("MostAttended")
    variables = drawn(arch)
    (_, outputs), state = build_model(arch).apply(variables, IMAGES, mutable=["intermediates"])
    (cues,) = state["intermediates"]["slimming_0"]["cues"]
    _, _, attention = apply_watched(build_model(arch.without_slimming()), variables, IMAGES)
    np.testing.assert_allclose(cues.class_attention, attention[0][:, 1:], rtol=1e-5)
    assert cues.keys.shape == (3, 4, arch.dim // arch.num_heads)
    np.testing.assert_array_equal(cues.mass, np.ones((3, 4)))
    picked = np.argsort(-np.asarray(attention[0][:, 1:]), axis=1)[:, :2]
    expected = np.take_along_axis(np.asarray(cues.tokens), picked[..., None], axis=1)
    np.testing.assert_allclose(outputs.tokens[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("reducer", "remat"), [("MostAttended", False), ("Weighted", True)])
def test_own_reducers_are_distilled(reducer: str, remat: bool) -> None:
    arch = student(reducer)
    model = ModelConfig(architecture=arch, remat=remat)
    teacher = TeacherConfig(model=ModelConfig(architecture=arch.without_slimming()))
    spec = make_train_spec(tiny.config(model=model, teacher=teacher), steps_per_epoch=10)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    variables = jax.device_put(drawn(arch.without_slimming()), sharding.replicated(mesh))
    state, step = init_state(spec, mesh, variables), make_train_step(spec, mesh)
    before = jax.tree.map(np.asarray, state.params["model"]["blocks_0"].get("reducer", {}))
    losses = []
    for _ in range(4):
        state, metrics = step(state, tiny.batch(16), {"teacher": variables})
        losses.append(float(metrics["token"]))
    assert losses[-1] < losses[0]
    if reducer == "Weighted":
        score = state.params["model"]["blocks_0"]["reducer"]["score"]
        assert not np.array_equal(before["score"]["kernel"], score["kernel"])


def small_teacher() -> sit_jax.Model:
    return sit_jax.create_model("deit_tiny", num_classes=3, image_size=32, depth=2, dim=16, num_heads=2)


@pytest.mark.parametrize("reducer", ["MostAttended", "Weighted"])
def test_own_reducers_are_saved_opened_and_exported(reducer: str, tmp_path: pathlib.Path) -> None:
    model = sit_jax.slim(small_teacher(), after=(1,), reducer=f"own_reducers:{reducer}")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    logits = np.asarray(model(pixels))
    model.save(tmp_path / "model")
    np.testing.assert_array_equal(sit_jax.load(tmp_path / "model")(pixels), logits)
    exported = tmp_path / "model.stablehlo"
    words = ["export", str(tmp_path / "model"), str(exported), "--format", "stablehlo", "--raw_input"]
    assert cli.main(words) == 0
    np.testing.assert_allclose(stablehlo.load(exported)[0](pixels), logits, rtol=1e-5, atol=1e-5)
    held = sum(leaf.size for leaf in jax.tree.leaves(model.variables["params"]))
    assert count_cost(model.vit).params == held


def test_formats_of_pytorch_refuse_them(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    sit_jax.slim(small_teacher(), after=(1,), reducer="own_reducers:First").save(tmp_path / "model")
    words = ["export", str(tmp_path / "model"), str(tmp_path / "model.safetensors"), "--format", "original"]
    assert cli.main(words) == 2
    assert "own_reducers:First" in capsys.readouterr().err
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    "name", ["sllim", "no_such_module:Reducer", "own_reducers:Missing", "own_reducers:Misplaced", "own_reducers:nn"]
)
def test_reducers_that_are_not_there(name: str) -> None:
    with pytest.raises(ConfigError) as raised:
        build_model(dataclasses.replace(tiny.STUDENT, reducer=name))
    assert raised.value.key == "reducer"


def test_a_module_that_fails_is_one_line(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing.py").write_text("{}['key']")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="KeyError: 'key'"):
        build_model(dataclasses.replace(tiny.STUDENT, reducer="failing:Reducer"))


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("reducer", {"model": ModelConfig(architecture=dataclasses.replace(tiny.STUDENT, reducer="sllim"))}),
        ("loss.extra.entropy", {"loss": dataclasses.replace(tiny.FRD, extra={"entropy": 0.1})}),
    ],
)
def test_what_is_missing_is_found_before_the_teacher_is_trained(
    key: str, changes: Any, tmp_path: pathlib.Path, digits_dir: str
) -> None:
    config = tiny.config(data=DataConfig(data_dir=digits_dir, resize="stretch"), **changes)
    with pytest.raises(ConfigError) as raised:
        run(config, tmp_path / "run")
    assert raised.value.key == key
    assert not (tmp_path / "run").exists()


def test_registered_names() -> None:
    sit_jax.register_reducer("first")(own_reducers.First)
    arch = dataclasses.replace(student("First"), reducer="first")
    variables = drawn(arch)
    np.testing.assert_array_equal(apply(arch, variables)[0], apply(student("First"), variables)[0])
