"""Token maps: known ones by hand, attention against NumPy, pictures pixel by pixel."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from sit_jax.models import build_model
from sit_jax.models.architecture import Architecture
from sit_jax.visual.images import colour_table, heat, regions
from sit_jax.visual.token_maps import (
    cumulative_maps,
    effective_patches,
    hard_assignment,
    overlooked_patches,
    token_maps,
)

THREE = dataclasses.replace(tiny.TEACHER, image_size=64, stage_blocks=(1, 1, 1, 1), kept_tokens=(16, 8, 4, 2))
WIDE = dataclasses.replace(THREE, image_size=(32, 96), kept_tokens=(12, 8, 4, 2), class_token=False, pool="avg")
DISTILLED = dataclasses.replace(THREE, distillation_token=True, qkv_bias=False, in_channels=3, num_heads=4)


def drawn(arch: Architecture, seed: int = 0) -> tuple[Any, dict[str, Any], jax.Array]:
    """A model with weights large enough for clear choices, and pictures."""
    model, rng = build_model(arch), np.random.default_rng(seed)
    images = jax.numpy.asarray(rng.normal(size=(3, *arch.image_shape, arch.in_channels)), np.float32)
    variables = jax.jit(model.init)(jax.random.key(seed), images)
    params = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), variables["params"])
    return model, {**variables, "params": params}, images


def test_by_hand() -> None:
    # Four patches become two tokens, and these one: the first token is half of patch 0 and half of patch 1, the
    # second all of patch 3; the last one takes a quarter of the first and three quarters of the second.
    first = np.array([[[0.5, 0.0], [0.5, 0.0], [0.0, 0.0], [0.0, 1.0]]], np.float32)
    second = np.array([[[0.25], [0.75]]], np.float32)
    one, two = cumulative_maps([first, second])
    np.testing.assert_array_equal(one, [[[0.5, 0.5, 0, 0], [0, 0, 0, 1]]])
    np.testing.assert_array_equal(two, [[[0.125, 0.125, 0, 0.75]]])
    np.testing.assert_array_equal(hard_assignment(one), [[0, 0, 0, 1]])
    np.testing.assert_array_equal(overlooked_patches(one), [[False, False, True, False]])
    # Half an even share is an eighth.
    np.testing.assert_array_equal(overlooked_patches(two), [[False, False, True, False]])
    np.testing.assert_array_equal(overlooked_patches(0.9 * two), [[True, True, True, False]])
    np.testing.assert_allclose(effective_patches(one), [[2, 1]])
    np.testing.assert_allclose(effective_patches(two), [[np.exp(0.25 * np.log(8) - 0.75 * np.log(0.75))]], rtol=1e-6)
    even = np.full((1, 2, 16), 1 / 16, np.float32)
    np.testing.assert_allclose(effective_patches(even), [[16, 16]], rtol=1e-6)
    assert not overlooked_patches(even).any()


def test_the_maps_are_the_models() -> None:
    model, variables, images = drawn(THREE)
    maps = token_maps(model, variables, images)
    logits, outputs = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(maps.logits, logits, atol=1e-5)
    np.testing.assert_allclose(maps.probabilities, jax.nn.softmax(logits), rtol=1e-4)
    assert maps.grid == (4, 4)
    assert [stage.after_block for stage in maps.stages] == [1, 2, 3]
    assert [stage.kept for stage in maps.stages] == [8, 4, 2]
    for stage, assignment in zip(maps.stages, outputs.assignments, strict=True):
        np.testing.assert_allclose(stage.assignment, assignment, atol=1e-6)
        np.testing.assert_allclose(stage.cumulative.astype(np.float64).sum(axis=2), 1, rtol=0, atol=1e-6)
    a, b, c = (np.asarray(x, np.float64)[0] for x in outputs.assignments)
    np.testing.assert_allclose(maps.stages[2].cumulative[0], (a @ b @ c).T, atol=1e-6)


def attention_by_hand(model: Any, variables: Any, images: jax.Array) -> list[np.ndarray]:
    """Attention per block (batch, tokens), in NumPy, from what enters the attention modules.

    It is the class token's, or the mean over all tokens.
    """
    arch, params = model.arch, jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    seen: list[np.ndarray] = []

    def forward(variables: Any, images: jax.Array) -> Any:
        return model.apply(variables, images, capture_intermediates=lambda module, _: module.name == "norm1")[1]

    streams = jax.jit(forward)(variables, images)["intermediates"]
    for block in range(arch.depth):
        stream = np.asarray(streams[f"blocks_{block}"]["norm1"]["__call__"][0], np.float64)
        layer = params[f"blocks_{block}"]["attn"]["qkv"]
        qkv = stream @ layer["kernel"] + layer.get("bias", 0)
        query, key, _ = np.split(qkv, 3, axis=-1)
        width, heads = arch.dim // arch.num_heads, []
        for head in range(arch.num_heads):
            part = slice(head * width, (head + 1) * width)
            asking = query[:, :1, part] if arch.class_token else query[:, :, part]
            weights = np.exp(np.einsum("bqd,bkd->bqk", asking, key[:, :, part]) / np.sqrt(width))
            heads.append((weights / weights.sum(axis=2, keepdims=True)).mean(axis=1))
        seen.append(np.mean(heads, axis=0))
    return seen


@pytest.mark.parametrize("arch", [THREE, DISTILLED, tiny.TEACHER, WIDE], ids=["three", "distilled", "plain", "wide"])
def test_attention(arch: Architecture) -> None:
    model, variables, images = drawn(arch, seed=1)
    maps, expected = token_maps(model, variables, images), attention_by_hand(model, variables, images)
    prefix = arch.class_token + arch.distillation_token
    assert maps.attending == ("the class token" if prefix else "all tokens")
    assert len(maps.attention) == arch.depth == 4
    for block, (found, wanted) in enumerate(zip(maps.attention, expected, strict=True), start=1):
        np.testing.assert_allclose(found, wanted[:, prefix:], atol=1e-5)
        over, on_patches = maps.attention_on_patches(block), found
        if block > 1 and arch.is_slimmed:
            on_patches = np.einsum("bk,bkp->bp", found, maps.stages[block - 2].cumulative)
        np.testing.assert_allclose(over, on_patches, atol=1e-6)
        np.testing.assert_allclose(over.sum(1), wanted[:, prefix:].sum(1), atol=1e-5)
    for stage in range(len(maps.stages)):
        np.testing.assert_array_equal(maps.token_attention(stage), maps.attention[stage + 1])


def test_regions_by_hand() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, :4] = (200, 0, 0)
    image[:4, :4] = (100, 0, 0)
    image[:, 4:] = (0, 50, 10)
    drawn_regions = regions(image, np.array([0, 1, 0, 1]), grid=(2, 2))
    # Left and right halves in their means, 150 and (50, 10), and a line between them.
    assert tuple(drawn_regions[0, 0]) == tuple(drawn_regions[7, 2]) == (150, 0, 0)
    assert tuple(drawn_regions[0, 7]) == tuple(drawn_regions[7, 6]) == (0, 50, 10)
    line = (drawn_regions == 255).all(axis=2)
    assert line[:, 4].all()
    assert line.sum() == 8
    # The lower left patch belongs to nobody: its pixels are in no mean, and shown in grey.
    left_out = regions(image, np.array([0, 1, 0, 1]), (2, 2), overlooked=np.array([False, False, True, False]))
    assert tuple(left_out[0, 0]) == (100, 0, 0)
    assert len(set(left_out[7, 0])) == 1
    assert 0 < left_out[7, 0, 0] < 60


def test_heat_by_hand() -> None:
    image = np.full((6, 6, 1), 128, np.uint8)
    shown = heat(image, np.array([0.0, 0.1, 0.2, 0.4]), grid=(2, 2))
    assert shown.shape == (6, 6, 3)
    for patch, level in enumerate((0, 64, 128, 255)):
        block = shown[3 * (patch // 2) : 3 * (patch // 2) + 3, 3 * (patch % 2) : 3 * (patch % 2) + 3].reshape(9, 3)
        assert (block == block[0]).all()
        ground = 0.25 + 0.7 * 128 / 255
        expected = 255 * (0.2 * ground + 0.8 * colour_table()[level] * (0.6 + 0.4 * ground))
        np.testing.assert_allclose(block[0], expected, atol=0.51)
    # A common scale: half the weight that is at the top gets the colour in the middle.
    halved = heat(image, np.array([0.0, 0.1, 0.2, 0.4]), grid=(2, 2), top=0.8)
    np.testing.assert_array_equal(halved[5, 5], shown[5, 0])
    assert (heat(image, np.zeros(4), grid=(2, 2)) == heat(image, np.zeros(4), grid=(2, 2))[0, 0]).all()
