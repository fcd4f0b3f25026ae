"""Shapes, counts, options and impossible configurations of the models."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sit_jax.analysis.flops import count_cost
from sit_jax.errors import ConfigError
from sit_jax.models import build_model, build_rtsm
from sit_jax.models.architecture import Architecture
from sit_jax.models.layers import Block
from sit_jax.models.regnet import RegNetArchitecture
from sit_jax.models.stems import BatchNorm
from sit_jax.models.variants import VARIANTS, get_architecture

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
    model = build_model(arch)
    images = jnp.zeros((1, arch.image_size, arch.image_size, arch.in_channels))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    if not arch.is_slimmed:
        return count(variables["params"]), 0
    _, outputs = jax.eval_shape(model.apply, variables, images)
    reverse = jax.eval_shape(build_rtsm(arch).init, jax.random.key(0), outputs.tokens)
    return count(variables["params"]), count(reverse["params"])


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
    arch = RegNetArchitecture()
    variables = jax.eval_shape(build_model(arch).init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    assert count(variables["params"]) == 83_590_140


def test_outputs() -> None:
    model = build_model(TINY)
    variables = model.init(jax.random.key(0), IMAGES)
    logits, outputs = model.bind(variables)(IMAGES)
    assert logits.shape == (4, 5)
    assert [x.shape for x in outputs.tokens] == [(4, 8, 16)] * 4
    assert [x.shape for x in outputs.assignments] == [(4, 16, 8)]
    np.testing.assert_allclose(outputs.assignments[0].sum(axis=1), 1.0, atol=1e-6)
    assert outputs.distillation_logits is None
    # The student's parameters without the slimming modules are those of its teacher, from the same layers up to there.
    teacher, params = build_model(TINY.without_slimming()), dict(variables["params"])
    del params["slimming_0"]
    shapes = jax.tree.map(jnp.shape, (teacher.init(jax.random.key(1), IMAGES), {"params": params}))
    assert shapes[0] == shapes[1]
    _, full = teacher.bind({"params": params})(IMAGES)
    expected = np.einsum("bnk,bnc->bkc", outputs.assignments[0], full.tokens[0])
    np.testing.assert_allclose(outputs.tokens[0], expected, atol=1e-5)


@pytest.mark.parametrize("option", [{"remat": True}, {"attention": "plain"}])
def test_options_do_not_change_the_result(option: dict[str, Any]) -> None:
    arch = dataclasses.replace(TINY, stage_blocks=(2, 2), stem="conv4", patch_size=16, dim=16, kept_tokens=(4, 2))
    plain, other = build_model(arch, drop_path=0.3), build_model(arch, drop_path=0.3, **option)
    variables = plain.init(jax.random.key(0), IMAGES)
    reverse = build_rtsm(arch)
    outputs = plain.bind(variables)(IMAGES)[1]
    rtsm_params = reverse.init(jax.random.key(1), outputs.tokens)
    targets = [jnp.sin(7.0 * jnp.arange(4 * 16).reshape(1, 4, 16) + index) for index in range(4)]
    targets = [jnp.broadcast_to(target, (IMAGES.shape[0], 4, 16)) for target in targets]

    def loss(params: Any, model: Any, by_block: bool) -> jax.Array:
        rest = {**variables, "params": params["model"]}
        (logits, outputs), _ = model.apply(
            rest, IMAGES, True, rngs={"drop_path": jax.random.key(3)}, mutable=["batch_stats"]
        )
        if by_block:
            errors = reverse.apply(params["rtsm"], outputs.tokens, targets, squared_error, method="errors")
        else:
            recovered = build_rtsm(arch).apply(params["rtsm"], outputs.tokens)
            errors = [squared_error(*pair) for pair in zip(recovered, targets, strict=True)]
        return jnp.square(logits).sum() + sum((1.0 + index) * error for index, error in enumerate(errors))

    both = {"model": variables["params"], "rtsm": rtsm_params}
    mine = jax.value_and_grad(loss)(both, plain, False)
    theirs = jax.value_and_grad(loss)(both, other, True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4), mine, theirs)
    assert max(np.abs(x).max() for x in jax.tree.leaves(theirs[1]["rtsm"])) > 0.1


def squared_error(mine: jax.Array, theirs: jax.Array) -> jax.Array:
    return jnp.square(mine - theirs).sum()


def test_bfloat16_products_float32_logits() -> None:
    model, half = build_model(TINY), build_model(TINY, dtype="bfloat16")
    variables = model.init(jax.random.key(0), IMAGES)
    exact, _ = model.apply(variables, IMAGES)
    logits, outputs = half.bind(variables)(IMAGES)
    assert logits.dtype == jnp.float32
    assert outputs.tokens[0].dtype == jnp.bfloat16
    assert outputs.assignments[0].dtype == jnp.float32
    assert 0 < np.abs(logits - exact).max() < 0.02


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


def test_batch_norm_keeps_the_unbiased_variance() -> None:
    norm = BatchNorm()
    x = np.random.default_rng(0).normal(3, 2, size=(2, 2, 2, 3)).astype(np.float32)
    variables = norm.init(jax.random.key(0), jnp.asarray(x), True)
    result, updated = norm.apply(variables, jnp.asarray(x), True, mutable=["batch_stats"])
    flat = x.reshape(-1, 3)
    np.testing.assert_allclose(updated["batch_stats"]["var"], 0.9 + 0.1 * flat.var(axis=0, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.1 * flat.mean(axis=0), rtol=1e-5)
    expected = (flat - flat.mean(axis=0)[None]) / np.sqrt(flat.var(axis=0) + 1e-5)[None]
    np.testing.assert_allclose(np.asarray(result).reshape(-1, 3), expected, atol=1e-5)


def test_token_counts() -> None:
    assert VARIANTS["sit_tiny"].token_counts == (196, 98, 49, 24)
    assert VARIANTS["sit_large"].token_counts == (324, 162, 81, 40)
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
        ("keep_ratio", {"keep_ratio": 1.5}),
        ("keep_ratio", {"keep_ratio": None}),
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
    model = build_model(arch)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 32, 32, 3)).astype(np.float32)
    mask = rng.random((4, 16)) < 0.4
    variables = model.init(jax.random.key(0), jnp.asarray(images))
    pixels = mask.reshape(4, 4, 4).repeat(8, axis=1).repeat(8, axis=2)[..., None]
    moved = np.where(pixels, images[::-1], images)
    mine, outputs = model.bind(variables)(jnp.asarray(images), token_mix=jnp.asarray(mask))
    theirs, expected = model.bind(variables)(jnp.asarray(moved))
    np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outputs.tokens[0], expected.tokens[0], rtol=1e-5, atol=1e-5)
    plain, _ = model.apply(variables, jnp.asarray(images))
    assert not np.allclose(mine, plain, atol=1e-3)


def test_patch_logits_against_numpy() -> None:
    model = build_model(tiny.plain(aux_head=True))
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 1)), jnp.float32)
    variables = model.init(jax.random.key(1), images)
    _, outputs = model.bind(variables)(images)
    params = jax.tree.map(np.asarray, variables["params"])
    tokens = np.asarray(outputs.tokens[-1], np.float64)
    centred = tokens - tokens.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt(centred.var(axis=-1, keepdims=True) + 1e-6)
    normed = normed * params["norm"]["scale"] + params["norm"]["bias"]
    expected = normed @ params["aux_head"]["kernel"] + params["aux_head"]["bias"]
    np.testing.assert_allclose(outputs.patch_logits, expected, rtol=1e-4, atol=1e-5)
    slimmed = build_model(dataclasses.replace(tiny.STUDENT, aux_head=True))
    assert slimmed.bind(slimmed.init(jax.random.key(1), images))(images)[1].patch_logits is None


def test_convolutional_patch_logits_average_to_the_logits() -> None:
    model = build_model(tiny.CNN)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 1)), jnp.float32)
    logits, outputs = model.bind(model.init(jax.random.key(1), images))(images)
    assert outputs.patch_logits.shape == (2, 16, 10)
    np.testing.assert_allclose(outputs.patch_logits.mean(axis=1), logits, rtol=1e-4, atol=1e-5)
    assert float(outputs.patch_logits.std(axis=1).max()) > 1e-4


def test_classes_left_to_the_data_must_be_settled_first() -> None:
    with pytest.raises(ConfigError) as caught:
        build_model(tiny.plain(num_classes=0))
    assert caught.value.key == "num_classes"
