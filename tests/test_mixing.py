"""Mixup, cutmix, random erasing and dense labels, against NumPy and the definitions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sit_jax.data.config import AugmentConfig, DataConfig, InputSpec, MixConfig
from sit_jax.data.mixing import Mix, draw_mix, mix_images, mix_labels
from sit_jax.data.preprocess import normalize, patch_labels, prepare_batch, random_erasing

SIDE = 32


compiled = jax.jit(draw_mix, static_argnums=(1, 2, 3, 4))


def draw(config: MixConfig, batch: int = 4000, seed: int = 0) -> Mix:
    return compiled(jax.random.key(seed), batch, SIDE, SIDE, config)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 2.0])
def test_mixups_weight_is_beta_distributed(alpha: float) -> None:
    weight = np.asarray(draw(MixConfig(mixup=alpha, mode="element"), 20_000).weight, np.float64)
    assert weight.mean() == pytest.approx(0.5, abs=0.01)
    # Variance of Beta(a, a).
    assert weight.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)


def test_cutmix_weight_is_the_area_really_left() -> None:
    mix = draw(MixConfig(cutmix=1.0, mode="element"))
    inside = np.asarray(mix.inside)
    np.testing.assert_allclose(mix.weight, 1 - inside.mean(axis=(1, 2)), rtol=1e-6)
    assert np.asarray(mix.is_cutmix).all()
    for mask in inside[:200]:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert mask.sum() == len(rows) * len(columns)  # A box.
        if len(rows):
            assert rows[-1] - rows[0] + 1 == len(rows)
    # The box before clipping has an area of 1 - lambda, lambda uniform; NumPy plays the same game.
    rng = np.random.default_rng(0)
    half = (SIDE * np.sqrt(1 - rng.uniform(size=200_000))).astype(int) // 2
    centre = rng.integers(0, SIDE, (2, half.size))
    expected = 1 - np.prod(np.clip(centre + half, 0, SIDE) - np.clip(centre - half, 0, SIDE), axis=0) / SIDE**2
    assert np.mean(mix.weight) == pytest.approx(expected.mean(), abs=0.015)
    assert np.var(mix.weight) == pytest.approx(expected.var(), rel=0.05)


def test_images_and_labels_follow_numpy() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(6, SIDE, SIDE, 3)).astype(np.float32)
    labels = np.eye(6, dtype=np.float32)
    for config in (MixConfig(mixup=0.8, mode="element"), MixConfig(cutmix=1.0, mode="pair"), MixConfig(mixup=1.0)):
        mix = draw(config, 6)
        mixed, soft = mix_images(jnp.asarray(images), mix), mix_labels(jnp.asarray(labels), mix)
        weight, inside = np.asarray(mix.weight)[:, None], np.asarray(mix.inside)[..., None]
        own = 1 - inside if config.cutmix else weight[..., None, None]
        np.testing.assert_allclose(mixed, own * images + (1 - own) * images[::-1], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(soft, weight * labels + (1 - weight) * labels[::-1], atol=1e-6)


def test_modes_and_probabilities() -> None:
    both = MixConfig(mixup=0.8, cutmix=1.0, mode="element", switch=0.3, probability=0.6)
    mix = draw(both, 20_000)
    untouched = np.asarray(mix.weight) == 1.0
    # A few cut boxes are empty, so a little more than the 40% that are not mixed stay whole.
    assert untouched.mean() == pytest.approx(0.4, abs=0.02)
    assert np.asarray(mix.is_cutmix).mean() == pytest.approx(0.3, abs=0.015)
    batches = [draw(MixConfig(mixup=0.8, cutmix=1.0), 4, seed) for seed in range(60)]
    assert all(np.unique(batch.weight).size == 1 for batch in batches)
    assert 15 < sum(bool(batch.is_cutmix[0]) for batch in batches) < 45
    weight = np.asarray(draw(MixConfig(mixup=0.8, mode="pair"), 7).weight)
    np.testing.assert_array_equal(weight, weight[::-1])
    assert np.unique(weight).size == 4
    assert (draw(MixConfig(mixup=0.8, probability=0.0), 8).weight == 1).all()


def test_normalize() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for levels, middle, width in ((pixels, mean, std), (pixels[..., :1], mean.mean(), std.mean())):
        normal = normalize(jnp.asarray(levels), DataConfig())
        np.testing.assert_allclose(normal, (levels / 255 - middle) / width, rtol=1e-5, atol=1e-6)


def erased(augment: AugmentConfig, batch: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    images = jnp.full((batch, 48, 40, 3), 7.0)
    result = np.asarray(jax.jit(lambda key: random_erasing(key, images, augment))(jax.random.key(seed)))
    return result, (result != 7.0).any(axis=-1)


def test_random_erasing_follows_the_definition() -> None:
    result, mask = erased(AugmentConfig(erase=0.25), 4000)
    hit = mask.any(axis=(1, 2))
    assert hit.mean() == pytest.approx(0.25, abs=0.025)
    areas = mask[hit].mean(axis=(1, 2))
    assert areas.min() > 0.01
    assert areas.max() < 0.36
    assert areas.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.015)
    for box in mask[hit][:100]:
        assert box.sum() == box.any(axis=1).sum() * box.any(axis=0).sum()
    noise = result[mask]
    assert noise.mean() == pytest.approx(0, abs=0.02)
    assert noise.std() == pytest.approx(1, abs=0.02)
    ratios = [box.any(axis=1).sum() / box.any(axis=0).sum() for box in mask[hit]]
    assert 0.25 < min(ratios) < 0.4
    assert 2.5 < max(ratios) < 4.0


def test_random_erasing_modes_and_count() -> None:
    constant, mask = erased(AugmentConfig(erase=1.0, erase_mode="const"))
    assert set(np.unique(constant)) == {0.0, 7.0}
    assert mask.any(axis=(1, 2)).all()
    for count in (1, 3):
        images, mask = erased(AugmentConfig(erase=1.0, erase_mode="rand", erase_count=count), 300)
        fills = {len(np.unique(image[box], axis=0)) for image, box in zip(images, mask, strict=True)}
        assert fills == set(range(1, count + 1))
    # Several boxes share the area that one would have.
    assert mask.mean() < 0.2


def reference_patch_labels(classes: Any, values: Any, crop: Any, flipped: bool, grid: int, total: int) -> np.ndarray:
    """Reads a densified map bilinearly at two points per patch and axis; plain loops."""
    side = classes.shape[0]
    dense = np.repeat((1 - values.sum(-1, keepdims=True)) / total, total, axis=-1)
    for y, x, k in np.ndindex(classes.shape):
        dense[y, x, classes[y, x, k]] += values[y, x, k]
    left, top, right, bottom = crop
    result = np.zeros((grid, grid, total))
    for i, j, a, b in np.ndindex(grid, grid, 2, 2):
        v, u = (i + (a + 0.5) / 2) / grid, (j + (b + 0.5) / 2) / grid
        u = 1 - u if flipped else u
        places = (top + v * (bottom - top), left + u * (right - left))
        y, x = (min(max(place * side - 0.5, 0), side - 1) for place in places)
        for row, column in np.ndindex(side, side):
            result[i, j] += max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - column)) * dense[row, column] / 4
    return result.reshape(grid * grid, total)


def test_patch_labels_against_loops() -> None:
    rng = np.random.default_rng(0)
    classes = np.stack([[rng.permutation(6)[:2] for _ in range(25)] for _ in range(3)]).reshape(3, 5, 5, 2)
    values = rng.dirichlet([1, 1, 1], (3, 5, 5))[..., :2]
    crop = np.array([[0, 0, 1, 1], [0.1, 0.3, 0.7, 0.9], [0.5, 0.0, 1.0, 0.4]])
    flipped = np.array([False, True, True])
    probabilities, crops = jnp.asarray(values, jnp.float32), jnp.asarray(crop, jnp.float32)
    mine = patch_labels(jnp.asarray(classes, jnp.int32), probabilities, crops, jnp.asarray(flipped), (4, 4), 6)
    assert mine.shape == (3, 16, 6)
    for index, example in enumerate(zip(classes, values, crop, flipped, strict=True)):
        np.testing.assert_allclose(mine[index], reference_patch_labels(*example, 4, 6), atol=1e-5)
    np.testing.assert_allclose(mine.sum(axis=-1), np.ones((3, 16)), rtol=1e-5)


def test_prepared_batches_depend_on_seed_and_step_only() -> None:
    config = tiny.config(
        mix=MixConfig(mixup=0.8, cutmix=1.0, mode="element"), augment=AugmentConfig(erase=0.5, erase_count=2)
    )
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (8, 32, 32, 1), np.uint8), rng.integers(0, 10, 8, np.int32)
    batch = {"image": jnp.asarray(images), "label": jnp.asarray(labels)}
    first, again, later = (prepare_batch(config.inputs, batch, jnp.asarray(step)) for step in (3, 3, 4))
    np.testing.assert_array_equal(first["image"], again["image"])
    assert not np.array_equal(first["image"], later["image"])
    np.testing.assert_allclose(first["label"].sum(axis=1), np.ones(8), rtol=1e-5)
    other = prepare_batch(dataclasses.replace(config, seed=1).inputs, batch, jnp.asarray(3))
    assert not np.array_equal(first["image"], other["image"])
    plain = prepare_batch(tiny.config().inputs, batch, jnp.asarray(0))
    np.testing.assert_allclose(plain["image"], normalize(batch["image"], DataConfig()), rtol=1e-6)


def test_mix_token_moves_patches_and_their_labels_together() -> None:
    size, side = 6, 4
    spec = InputSpec(
        data=DataConfig(), image_size=(32, 32), channels=1, num_classes=10, grid=(8, 8),
        mix=MixConfig(mix_token=1.0), label_smoothing=0.1, patch_labels=True,
    )  # fmt: skip
    maps = jnp.broadcast_to(jnp.arange(size)[:, None, None, None], (size, side, side, 1)).astype(jnp.int32)
    batch = {
        "image": jnp.zeros((size, 32, 32, 1), jnp.uint8),
        "label": jnp.arange(size, dtype=jnp.int32),
        "map_classes": maps,
        "map_values": jnp.ones((size, side, side, 1)),
        "crop": jnp.broadcast_to(jnp.array([0.0, 0.0, 1.0, 1.0]), (size, 4)),
        "flipped": jnp.zeros(size, bool),
    }
    moved = 0
    for step in range(8):
        made = prepare_batch(spec, batch, jnp.asarray(step))
        mask, dense = np.asarray(made["token_mix"]), np.asarray(made["patch_label"])
        owner = np.where(mask, 5 - np.arange(size)[:, None], np.arange(size)[:, None])
        np.testing.assert_array_equal(dense.argmax(axis=-1), owner)
        weight, classes = 1 - mask.mean(axis=1, keepdims=True), np.eye(10)[:size]
        expected = weight * classes + (1 - weight) * classes[::-1]
        np.testing.assert_allclose(made["label"], expected * 0.9 + 0.01, atol=1e-5)
        moved += int(mask.any())
    assert moved >= 5
