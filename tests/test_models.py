"""Shapes, counts, options and impossible configurations of the models."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sit_jax.analysis.flops import count_cost
from sit_jax.config import LossConfig, ModelConfig
from sit_jax.errors import ConfigError
from sit_jax.io.convert.load_params import expected_shapes
from sit_jax.models import abstract_variables, build_model, build_rtsm
from sit_jax.models.architecture import Architecture
from sit_jax.models.layers import Block
from sit_jax.models.regnet import RegNetArchitecture
from sit_jax.models.variants import VARIANTS, get_architecture
from sit_jax.training.step import make_train_spec

# name, teacher parameters, student parameters, RTSM parameters, teacher GMAC, student GMAC: measured on the original.
PAPER = [
    ("tiny", 15_689_400, 15_872_934, 14_015_176, 3.457, 0.987),
    ("xsmall", 25_368_704, 25_625_774, 21_782_640, 5.532, 1.482),
    ("small", 25_368_704, 25_625_774, 11_065_760, 5.532, 4.016),
    ("medium", 55_201_296, 55_642_302, 25_318_284, 11.839, 8.019),
    ("large", 147_168_944, 148_168_398, 78_774_876, 55.974, 34.314),
]
DEIT_GMAC = {
    "tiny": (1.25, 1.09, 0.80, 0.59, 0.43),
    "small": (4.60, 4.00, 2.94, 2.19, 1.58),
    "base": (17.56, 15.26, 11.24, 8.36, 6.00),
}

TINY = Architecture(
    image_size=32, patch_size=8, num_classes=5, dim=16, depth=4, num_heads=2, stage_blocks=(1, 3), keep_ratio=0.5
)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(4, 32, 32, 3)), jnp.float32)


def count(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def module_params(arch: Architecture) -> tuple[int, int]:
    """Parameters of the Flax modules themselves: model, reverse modules."""
    shapes = expected_shapes(arch, rtsm=arch.is_slimmed)
    return count(shapes["params"]), count(shapes["rtsm"])


def drawn(model: Any, images: jax.Array = IMAGES) -> tuple[Any, jax.Array, Any]:
    """Random variables of a model, its logits and its outputs."""
    variables = jax.jit(model.init)(jax.random.key(0), images)
    return variables, *jax.jit(model.apply)(variables, images)


@pytest.mark.parametrize(("size", "teacher", "student", "rtsm", "teacher_gmac", "student_gmac"), PAPER)
def test_paper_models(
    size: str, teacher: int, student: int, rtsm: int, teacher_gmac: float, student_gmac: float
) -> None:
    slim, full = VARIANTS[f"sit_{size}"], VARIANTS[f"lvvit_{size}"]
    assert slim.without_slimming() == full
    assert module_params(full) == (teacher, 0)
    assert module_params(slim) == (student, rtsm)
    for arch, params, reverse, gmac in ((full, teacher, 0, teacher_gmac), (slim, student, rtsm, student_gmac)):
        cost = count_cost(arch)
        assert (cost.params, cost.rtsm_params) == (params, reverse)
        assert cost.gmac == pytest.approx(gmac, rel=0.01)


@pytest.mark.parametrize("size", DEIT_GMAC)
def test_deit_models(size: str) -> None:
    names = [f"deit_{size}", *(f"deit_{size}_sit_{ratio}" for ratio in (0.9, 0.7, 0.5, 0.25))]
    for name, gmac in zip(names, DEIT_GMAC[size], strict=True):
        cost = count_cost(VARIANTS[name])
        assert round(cost.gmac, 2) == pytest.approx(gmac, abs=0.011)
    slimmed = count_cost(VARIANTS[names[3]])
    assert module_params(VARIANTS[names[3]]) == (slimmed.params, slimmed.rtsm_params)


def test_regnet_has_torchvisions_parameter_count() -> None:
    assert count(abstract_variables(RegNetArchitecture())["params"]) == 83_590_140


def test_outputs() -> None:
    variables, logits, outputs = drawn(build_model(TINY))
    assert logits.shape == (4, 5)
    assert [x.shape for x in outputs.tokens] == [(4, 8, 16)] * 4
    assert [x.shape for x in outputs.assignments] == [(4, 16, 8)]
    np.testing.assert_allclose(outputs.assignments[0].sum(axis=1), 1.0, atol=1e-6)
    assert outputs.distillation_logits is None
    # The student's parameters without the slimming modules are those of its teacher, from the same layers up to there.
    teacher, params = build_model(TINY.without_slimming()), dict(variables["params"])
    del params["slimming_0"]
    shapes = jax.eval_shape(teacher.init, jax.random.key(1), IMAGES)["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)
    _, full = jax.jit(teacher.apply)({"params": params}, IMAGES)
    expected = np.einsum("bnk,bnc->bkc", outputs.assignments[0], full.tokens[0])
    np.testing.assert_allclose(outputs.tokens[0], expected, atol=1e-5)


def test_options_do_not_change_the_result() -> None:
    # Blocks computed again, attention's derivatives from autodiff, and each reverse module's error by itself.
    arch = dataclasses.replace(TINY, depth=3, stage_blocks=(2, 1), stem="conv4", patch_size=16, kept_tokens=(4, 2))
    plain = build_model(arch, drop_path=0.3)
    other = build_model(arch, drop_path=0.3, remat=True, attention="plain")
    variables, _, outputs = drawn(plain)
    reverse = build_rtsm(arch)
    both = {"model": variables["params"], "rtsm": reverse.init(jax.random.key(1), outputs.tokens)}
    targets = [jnp.broadcast_to(jnp.sin(7.0 * jnp.arange(64).reshape(1, 4, 16) + i), (4, 4, 16)) for i in range(3)]

    def loss(params: Any, model: Any, by_block: bool) -> jax.Array:
        (logits, outputs), _ = model.apply(
            {**variables, "params": params["model"]},
            IMAGES,
            True,
            rngs={"drop_path": jax.random.key(3)},
            mutable=["batch_stats"],
        )
        if by_block:
            errors = reverse.apply(params["rtsm"], outputs.tokens, targets, squared_error, method="errors")
        else:
            recovered = reverse.apply(params["rtsm"], outputs.tokens)
            errors = [squared_error(*pair) for pair in zip(recovered, targets, strict=True)]
        return jnp.square(logits).sum() + sum((1.0 + index) * error for index, error in enumerate(errors))

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2))
    mine, theirs = gradient(both, plain, False), gradient(both, other, True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4), mine, theirs)
    assert max(np.abs(x).max() for x in jax.tree.leaves(theirs[1]["rtsm"])) > 0.1


def squared_error(mine: jax.Array, theirs: jax.Array) -> jax.Array:
    return jnp.square(mine - theirs).sum()


def test_bfloat16_products_float32_logits() -> None:
    variables, exact, _ = drawn(build_model(TINY))
    logits, outputs = jax.jit(build_model(TINY, dtype="bfloat16").apply)(variables, IMAGES)
    assert logits.dtype == jnp.float32
    assert outputs.tokens[0].dtype == jnp.bfloat16
    assert outputs.assignments[0].dtype == jnp.float32
    assert 0 < np.abs(logits - exact).max() < 0.02


def test_evaluation_averages_both_heads() -> None:
    model = build_model(dataclasses.replace(TINY, distillation_token=True))
    variables, logits, outputs = drawn(model)
    trained, _ = jax.jit(model.apply, static_argnums=2)(variables, IMAGES, True)
    np.testing.assert_allclose(logits, (trained + outputs.distillation_logits) / 2, rtol=1e-5, atol=1e-6)
    assert not np.allclose(logits, trained, atol=1e-4)


def test_drop_path_keeps_the_mean() -> None:
    block: Any = Block(TINY, drop_path=0.25)
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, 5, TINY.dim)), (4000, 5, TINY.dim))
    mass = jnp.ones((4000, 4))
    params = block.init(jax.random.key(1), x[:1], mass[:1])["params"]
    # One of the two residual branches alone.
    params["mlp"]["fc2"] = jax.tree.map(jnp.zeros_like, params["mlp"]["fc2"])
    branch = np.asarray(block.apply({"params": params}, x, mass)[0] - x)
    kept, _, _ = block.apply({"params": params}, x, mass, train=True, rngs={"drop_path": jax.random.key(2)})
    dropped = np.asarray(kept - x)
    factors = (dropped * branch).sum(axis=(1, 2)) / np.square(branch).sum(axis=(1, 2))
    np.testing.assert_allclose(dropped, factors[:, None, None] * branch, atol=1e-5)
    assert np.unique(factors.round(3)) == pytest.approx([0.0, 1.333])
    assert factors.mean() == pytest.approx(1.0, abs=0.03)


def test_explicit_token_counts() -> None:
    explicit = dataclasses.replace(TINY, keep_ratio=None, kept_tokens=(16, 3))
    assert explicit.slimming == {0: 3}
    assert explicit.block_input_tokens == (16, 3, 3, 3)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("dim", {"num_heads": 3}),
        ("dim", {"stem": "conv4", "patch_size": 16, "dim": 12}),
        ("stage_blocks", {"stage_blocks": (1, 2)}),
        ("stage_blocks", {"stage_blocks": (0, 4)}),
        ("keep_ratio", {"keep_ratio": 0.05}),
        ("keep_ratio", {"stage_blocks": ()}),
        ("kept_tokens", {"kept_tokens": (16, 0)}),
        ("kept_tokens", {"kept_tokens": (15, 3)}),
        ("kept_tokens", {"kept_tokens": (16, 4, 2)}),
        ("image_size", {"image_size": 36}),
        ("patch_size", {"stem": "conv4"}),
        ("depth", {"depth": 0}),
        ("norm_eps", {"norm_eps": 0.0}),
    ],
)
def test_impossible_architectures_name_the_field(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(TINY, **changes)
    assert caught.value.key == field


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="sit_small"):
        get_architecture("sit_smal")
    with pytest.raises(ConfigError) as caught:
        get_architecture("sit_small", dimm=3)
    assert caught.value.key == "dimm"
    assert get_architecture("sit_small", num_classes=7).num_classes == 7


def test_mix_token_is_cutmix_on_the_patch_grid() -> None:
    # With the patch stem, which sees every patch by itself, moving tokens is moving the pixels of their patches.
    arch = tiny.plain(stem="patch", patch_size=8, in_channels=3)
    variables, plain, _ = drawn(build_model(arch))
    apply: Any = jax.jit(build_model(arch).apply)
    mask = np.random.default_rng(0).random((4, 16)) < 0.4
    pixels = mask.reshape(4, 4, 4).repeat(8, axis=1).repeat(8, axis=2)[..., None]
    mine, outputs = apply(variables, IMAGES, token_mix=jnp.asarray(mask))
    theirs, expected = apply(variables, jnp.where(pixels, IMAGES[::-1], IMAGES))
    np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outputs.tokens[0], expected.tokens[0], rtol=1e-5, atol=1e-5)
    assert not np.allclose(mine, plain, atol=1e-3)


def test_patch_logits_against_numpy() -> None:
    images = IMAGES[..., :1]
    variables, _, outputs = drawn(build_model(tiny.plain(aux_head=True)), images)
    params = jax.tree.map(np.asarray, variables["params"])
    tokens = np.asarray(outputs.tokens[-1], np.float64)
    centred = tokens - tokens.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt(centred.var(axis=-1, keepdims=True) + 1e-6)
    normed = normed * params["norm"]["scale"] + params["norm"]["bias"]
    expected = normed @ params["aux_head"]["kernel"] + params["aux_head"]["bias"]
    np.testing.assert_allclose(outputs.patch_logits, expected, rtol=1e-4, atol=1e-5)
    slimmed = build_model(dataclasses.replace(tiny.STUDENT, aux_head=True))
    assert jax.eval_shape(slimmed.init_with_output, jax.random.key(1), images)[0][1].patch_logits is None


def test_convolutional_patch_logits_average_to_the_logits() -> None:
    _, logits, outputs = drawn(build_model(tiny.CNN), IMAGES[..., :1])
    assert outputs.patch_logits.shape == (4, 16, 10)
    np.testing.assert_allclose(outputs.patch_logits.mean(axis=1), logits, rtol=1e-4, atol=1e-5)
    assert float(outputs.patch_logits.std(axis=1).max()) > 1e-4


def test_classes_left_to_the_data_must_be_settled_first() -> None:
    model = ModelConfig(architecture=tiny.plain(num_classes=0))
    config = tiny.config(model=model, teacher=None, loss=LossConfig())
    with pytest.raises(ConfigError) as caught:
        make_train_spec(config, 1)
    assert caught.value.key == "model.num_classes"
