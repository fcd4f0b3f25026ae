"""ToMe, Top-K and EViT against loops in NumPy, in every place where a slimmed model is used."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reducers
import pytest
import random_weights
import tiny
import torch

import sit_jax
from sit_jax.analysis.flops import count_cost
from sit_jax.cli import app as cli
from sit_jax.config import MeshConfig, ModelConfig, TeacherConfig
from sit_jax.io.export import torch_model
from sit_jax.models import build_model
from sit_jax.models.architecture import Architecture
from sit_jax.models.reducers.base import Cues, find_reducer
from sit_jax.models.variants import VARIANTS
from sit_jax.parallel import sharding
from sit_jax.training.step import init_state, make_train_spec, make_train_step
from sit_jax.visual.token_maps import token_maps

NAMES = ("tome", "topk", "evit")
PLAIN = Architecture(image_size=64, num_classes=5, dim=16, depth=4, num_heads=2, mlp_ratio=2.0)
SLIMMED = dataclasses.replace(PLAIN, stage_blocks=(1, 1, 2), kept_tokens=(16, 11, 5))
WITHOUT_CLASS_TOKEN = {"positions": "rope", "class_token": False, "pool": "avg", "registers": 1}


def cues_of(x: Any, cue: Any, mass: Any) -> Cues:
    return Cues(x, cue, cue, mass)


def drawn(tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, keys, attention and mass of two images."""
    rng = np.random.default_rng(seed)
    x, keys = rng.standard_normal((2, 2, tokens, 6)).astype(np.float32)
    attention = rng.dirichlet(np.ones(tokens + 1), 2)[:, 1:].astype(np.float32)
    return x, keys, attention, rng.integers(1, 9, (2, tokens)).astype(np.float32)


def check(name: str, x: Any, cue: Any, mass: Any, kept: int) -> Any:
    """Asserts that a reducer is its reference, and returns its result."""
    reducer: Any = find_reducer(name)(dtype=jnp.float32, name=name)
    found = jax.jit(lambda *given: reducer.apply({}, cues_of(*given), kept))(x, cue, mass)
    for image in range(len(x)):
        given = (np.asarray(values[image], np.float64) for values in (x, cue, mass))
        expected = numpy_reducers.REDUCERS[name](*given, kept)
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine[image], theirs, rtol=1e-6, atol=1e-6)
    if name != "topk":
        np.testing.assert_array_equal(found.mass.sum(axis=1), mass.sum(axis=1))
    return found


@pytest.mark.parametrize("name", NAMES)
# None removed, a few, half, more than half (rounds of ToMe), an odd number, all but one.
@pytest.mark.parametrize(("tokens", "kept"), [(12, 12), (12, 9), (12, 6), (13, 6), (12, 4), (13, 1), (2, 1), (1, 1)])
def test_reducers_are_those_of_numpy(name: str, tokens: int, kept: int) -> None:
    x, keys, attention, mass = drawn(tokens)
    check(name, x, keys if name == "tome" else attention, mass, kept)


def test_ties_go_to_the_first() -> None:
    x, _, _, mass = drawn(12)
    for keys in (np.ones((2, 12, 4)), np.eye(4)[[[0, 1, 1, 2, 0, 0, 3, 3, 2, 1, 0, 0]] * 2]):
        # Cosines of these keys are exact.
        for kept in (9, 7, 3):
            found = check("tome", x, jnp.asarray(2 * keys, jnp.float32), mass, kept)
            assert np.isfinite(found.tokens).all()
    attention = jnp.asarray([[0.25, 0.5, 0.25, 0.25, 0.5, 0.25] * 2] * 2)
    for name in ("topk", "evit"):
        check(name, x, attention, mass, 6)
    zero = check("tome", x, jnp.ones((2, 12, 4)), mass, 12)
    np.testing.assert_array_equal(zero.tokens, x)


def test_keys_of_length_zero_are_finite() -> None:
    x, _, _, mass = drawn(8)
    reducer: Any = find_reducer("tome")(dtype=jnp.float32, name="tome")
    found = jax.jit(lambda *given: reducer.apply({}, cues_of(*given), 5))(x, jnp.zeros((2, 8, 4)), mass)
    assert np.isfinite(found.tokens).all()
    np.testing.assert_array_equal(found.mass.sum(axis=1), mass.sum(axis=1))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_differences(name: str) -> None:
    x, keys, attention, mass = drawn(7)
    cue, direction = (keys if name == "tome" else attention), np.random.default_rng(1).standard_normal((4, 6))
    reducer: Any = find_reducer(name)(dtype=jnp.float32, name=name)

    def scalar(x: Any, cue: Any) -> Any:
        cues = cues_of(x[None], cue[None], jnp.asarray(mass[:1]))
        return (reducer.apply({}, cues, 4).tokens[0] * direction).sum()

    found = jax.jit(jax.grad(scalar, argnums=(0, 1)))(x[0], cue[0])
    given = [np.asarray(values[0], np.float64) for values in (x, cue)]
    for values, gradient in zip(given, found, strict=True):
        expected = np.zeros_like(values)
        for index in np.ndindex(values.shape):
            sides = []
            for step in (1e-6, -1e-6):
                values[index] += step
                sides.append((numpy_reducers.REDUCERS[name](*given, mass[0], 4).tokens * direction).sum())
                values[index] -= step
            expected[index] = (sides[0] - sides[1]) / 2e-6
        np.testing.assert_allclose(gradient, expected, atol=1e-5)
    assert np.any(found[1]) == (name == "evit")


@pytest.mark.parametrize("name", NAMES)
def test_models_are_those_of_numpy(name: str) -> None:
    arch = dataclasses.replace(SLIMMED, reducer=name)
    model = random_weights.draw(arch)
    images = random_weights.images(arch, 2)
    found, outputs = jax.jit(build_model(arch).apply)({"params": model.params}, images)
    assert [tokens.shape[1] for tokens in outputs.tokens] == [11, 5, 5, 5]
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model.params)
    expected = [numpy_reducers.logits(arch, params, np.asarray(image, np.float64)) for image in images]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    # With all tokens kept, it is the plain model.
    whole = dataclasses.replace(arch, kept_tokens=(16, 16, 16))
    same, plain = (jax.jit(build_model(x).apply)({"params": model.params}, images)[0] for x in (whole, PLAIN))
    np.testing.assert_allclose(same, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, WITHOUT_CLASS_TOKEN], ids=["class_token", "rope"])
@pytest.mark.parametrize("name", NAMES)
def test_the_pytorch_module_is_the_same(name: str, changes: dict[str, Any], tmp_path: pathlib.Path) -> None:
    arch = dataclasses.replace(SLIMMED, reducer=name, kept_tokens=(16, 11, 3), **changes)
    model = random_weights.draw(arch)
    model.save(tmp_path / "model")
    images = random_weights.images(arch, 3)
    expected, outputs = jax.jit(build_model(arch).apply)({"params": model.params}, images)
    assert np.isfinite(expected).all()
    module = torch_model.load(tmp_path / "model")
    nchw = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        logits, found = module(nchw, return_outputs=True)
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)(nchw)
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(compiled.numpy(), expected, atol=1e-4)
    for mine, theirs in zip(found.assignments, outputs.assignments, strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_exported_files_are_the_same(name: str, tmp_path: pathlib.Path) -> None:
    arch = dataclasses.replace(SLIMMED, reducer=name, depth=3, stage_blocks=(1, 1, 1), kept_tokens=(16, 7, 3))
    model = random_weights.draw(arch)
    model.save(tmp_path / "model")
    pixels = random_weights.pixels(arch, 3)
    expected = sit_jax.load(tmp_path / "model").logits(pixels)
    for kind in ("onnx", "stablehlo"):
        file = tmp_path / f"model.{kind}"
        assert cli.main(["export", str(tmp_path / "model"), str(file), "--format", kind]) == 0
        for count in (1, 3):
            np.testing.assert_allclose(sit_jax.load(file).logits(pixels[:count]), expected[:count], atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_token_maps(name: str) -> None:
    arch = dataclasses.replace(SLIMMED, reducer=name)
    model = random_weights.draw(arch)
    maps = token_maps(model.module, {"params": model.params}, random_weights.images(arch, 2))
    for stage in maps.stages:
        np.testing.assert_allclose(stage.cumulative.sum(axis=2), 1, rtol=1e-5)
        # Only Top-K drops patches.
        assert (stage.cumulative > 0).any(axis=1).all() == (name != "topk")


def steps(name: str, mesh: tuple[int, int, int], dtype: Any = "float32") -> list[dict[str, float]]:
    """Metrics of three steps of distillation with reverse modules."""
    wide = dataclasses.replace(tiny.TWO_BLOCKS, patch_size=8, num_heads=4)
    arch = dataclasses.replace(wide, stage_blocks=(1, 1), keep_ratio=0.5, reducer=name)
    teacher = TeacherConfig(model=ModelConfig(architecture=wide, dtype=dtype))
    config = tiny.config(model=ModelConfig(architecture=arch, dtype=dtype), teacher=teacher)
    sizes = MeshConfig(data=mesh[0], fsdp=mesh[1], tensor=mesh[2])
    spec, devices = make_train_spec(config, steps_per_epoch=10), sharding.make_mesh(sizes)
    variables = build_model(wide).init(jax.random.key(7), jnp.zeros((1, 32, 32, 1)))
    variables = jax.device_put(variables, sharding.state_shardings(devices, variables))
    state, step = init_state(spec, devices, variables), make_train_step(spec, devices)
    found = []
    for _ in range(3):
        state, metrics = step(state, sharding.put_batch(devices, tiny.batch(16)), {"teacher": variables})
        found.append({key: float(metrics[key]) for key in ("loss", "token")})
    return found


@pytest.mark.parametrize("name", NAMES)
def test_distillation_is_the_same_on_every_mesh(name: str) -> None:
    data, split = (steps(name, sizes) for sizes in ((8, 1, 1), (2, 2, 2)))
    for mine, theirs in zip(data, split, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert data[-1]["token"] < data[0]["token"]


@pytest.mark.parametrize("name", NAMES)
def test_distillation_in_bfloat16(name: str) -> None:
    found = steps(name, (8, 1, 1), "bfloat16")
    assert found[-1]["token"] < found[0]["token"]


def test_costs_are_the_published_ones() -> None:
    plain = VARIANTS["deit_small"]
    # EViT reduces in blocks 4, 7 and 10; ToMe in all.
    for name, ratio, published in (("topk", 0.7, 3.0), ("evit", 0.7, 3.0), ("topk", 0.5, 2.3), ("evit", 0.5, 2.3)):
        arch = dataclasses.replace(plain, stage_blocks=(4, 3, 3, 2), keep_ratio=ratio, reducer=name)
        assert count_cost(arch).gmac == pytest.approx(published, abs=0.05)
    kept = tuple(196 - 13 * block for block in range(12))
    cost = count_cost(dataclasses.replace(plain, stage_blocks=(1,) * 12, kept_tokens=kept, reducer="tome"))
    # The paper merges in the last block, too, and does not count the matching and the merging.
    last = 13 * 8 * 384**2
    assert cost.gmac - (cost.macs["slimming"] + last) / 1e9 == pytest.approx(2.70, abs=0.005)
    assert cost.gmac == pytest.approx(2.79, abs=0.005)
    assert cost.params == count_cost(plain).params
    # Without a class token, the attention of all tokens to all is averaged.
    arch = dataclasses.replace(SLIMMED, class_token=False, pool="avg")
    attention = {name: count_cost(dataclasses.replace(arch, reducer=name)).macs["attention"] for name in NAMES}
    assert attention["topk"] - attention["tome"] == (16**2 + 11**2) * arch.dim


def test_the_command_slims_any_model(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    sit_jax.create_model("deit_tiny", depth=4, dim=16, num_heads=2, num_classes=3, image_size=64).save(tmp_path / "vit")

    def slim(name: str, *words: str) -> Any:
        code = cli.main(["slim", str(tmp_path / "vit"), str(tmp_path / name), "--reducer", *words])
        assert code == 0
        return sit_jax.load(tmp_path / name).vit

    assert slim("a", "tome", "--keep_ratio", "0.7").token_counts == (16, 11, 7, 5)
    assert slim("b", "tome", "--r", "3").token_counts == (16, 13, 10, 7)
    assert slim("c", "tome", "--r", "12", "--after", "1,2").token_counts == (16, 8, 4)
    assert "random" not in capsys.readouterr().out
    arch = slim("d", "slim", "--kept_tokens", "16,9,4", "--after", "1,3")
    assert (arch.stage_blocks, arch.token_counts) == ((1, 2, 1), (16, 9, 4))
    assert "random until the model is distilled" in capsys.readouterr().out
    teacher = sit_jax.load(tmp_path / "vit")
    pixels = random_weights.pixels(teacher.vit, 2)
    same = sit_jax.slim(teacher, kept_tokens=(16, 16), after=(2,), reducer="tome")
    np.testing.assert_allclose(same.logits(pixels), teacher.logits(pixels), atol=1e-6)
    for words, named in (
        (["--kept_tokens", "16,9"], "kept_tokens"),
        (["--after", "4"], "after"),
        (["--keep_ratio", "1.5"], "keep_ratio"),
    ):
        assert cli.main(["slim", str(tmp_path / "vit"), str(tmp_path / "e"), "--reducer", "tome", *words]) == 2
        assert capsys.readouterr().err.startswith(f"sit slim: {named}")
    assert cli.main(["slim", str(tmp_path / "a"), str(tmp_path / "e"), "--reducer", "tome"]) == 2
    assert "is slimmed already" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()
