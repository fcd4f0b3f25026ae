"""A model prepared for inference computes what its module does, for every kind of model."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_weights
import tiny

import sit_jax
from sit_jax.io.inference import inference_model
from sit_jax.models import build_model
from sit_jax.models.architecture import Architecture
from sit_jax.models.stems import fold_batch_norm

PATCH = Architecture(image_size=32, patch_size=8, in_channels=1, num_classes=5, dim=16, depth=3, num_heads=4)
SLIMMED = dataclasses.replace(PATCH, stage_blocks=(1, 1, 1), keep_ratio=0.5)
CONV = dataclasses.replace(SLIMMED, stem="conv4", patch_size=16, image_size=48, residual_scale=2.0, qkv_bias=False)
SMALL = {"image_size": 32, "patch_size": 8, "in_channels": 1, "num_classes": 5, "dim": 16, "depth": 2, "num_heads": 2}
MODELS = {
    "plain": PATCH,
    "slimmed": SLIMMED,
    "conv4": CONV,
    "conv6": dataclasses.replace(CONV, stem="conv6"),
    "conv7": dataclasses.replace(CONV, stem="conv7", stem_width=4),
    "distilled": dataclasses.replace(SLIMMED, distillation_token=True),
    "layer scale": dataclasses.replace(SLIMMED, layer_scale=True, residual_scale=3.0),
    "auxiliary head": dataclasses.replace(PATCH, aux_head=True),
    "one head": dataclasses.replace(SLIMMED, num_heads=1),
    "odd MLP": dataclasses.replace(SLIMMED, mlp_ratio=2.3),
}


def by_module(arch: Any, variables: dict[str, Any], images: np.ndarray, dtype: str = "float32") -> np.ndarray:
    return np.asarray(jax.jit(build_model(arch, dtype=dtype).apply)(variables, images)[0])


@pytest.mark.parametrize("arch", MODELS.values(), ids=MODELS.keys())
def test_logits_are_the_models(arch: Architecture) -> None:
    variables = random_weights.variables(random_weights.draw(arch))
    # Far from zero: what is folded must not rely on small means.
    images = random_weights.images(arch, 3) + 2
    expected = by_module(arch, variables, images)
    logits = inference_model(arch, variables).jit()(images)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_large_and_small_batches() -> None:
    variables = random_weights.variables(random_weights.draw(SLIMMED))
    images = random_weights.images(SLIMMED, 80)
    run = inference_model(SLIMMED, variables).jit()
    # More than 1,024 rows and fewer: on CPU two programs.
    np.testing.assert_allclose(run(images)[:3], run(images[:3]), atol=1e-5)


def test_bfloat16_is_as_near_as_the_module() -> None:
    arch = dataclasses.replace(PATCH, depth=1)
    variables = random_weights.variables(random_weights.draw(arch))
    images = random_weights.images(arch, 4)
    expected = by_module(arch, variables, images)
    error = np.abs(inference_model(arch, variables, "bfloat16").jit()(images) - expected).max()
    module_error = np.abs(by_module(arch, variables, images, "bfloat16") - expected).max()
    assert 0 < error < 1.5 * module_error


def test_pixels_are_normalised_within() -> None:
    variables = random_weights.variables(random_weights.draw(PATCH))
    pixels = random_weights.pixels(PATCH, 2)
    run = inference_model(PATCH, variables).jit(before=lambda x: (x.astype(jnp.float32) / 255.0 - 0.4) / 0.2)
    expected = by_module(PATCH, variables, ((pixels / 255 - 0.4) / 0.2).astype(np.float32))
    np.testing.assert_allclose(run(pixels), expected, atol=2e-5)


def test_it_can_be_traced() -> None:
    variables = random_weights.variables(random_weights.draw(PATCH))
    images = jnp.asarray(random_weights.images(PATCH, 2))
    run = inference_model(PATCH, variables).jit()
    np.testing.assert_allclose(jax.jit(lambda x: run(x) * 2)(images), 2 * np.asarray(run(images)), atol=1e-5)

    def total(variables: Any) -> jax.Array:
        model = inference_model(PATCH, variables)
        return model.apply(model.weights, images).sum()

    gradient = jax.grad(total)(variables)
    assert float(jnp.abs(gradient["params"]["head"]["kernel"]).sum()) > 0


def test_calls_within_other_functions() -> None:
    """A model as `sit_jax.load` gives it, used first and later within whatever JAX offers."""
    model, images = sit_jax.create_model("deit_tiny", **SMALL), jnp.asarray(random_weights.images(PATCH, 2))
    expected = by_module(model.arch, model.variables, np.asarray(images))
    wrapped = [
        jax.jit(lambda x: model(x))(images),
        model(images),
        jax.jit(lambda scale: model(images) * scale)(1.0),
        jax.lax.scan(lambda carry, x: (carry, model(x)), 0.0, images[None])[1][0],
        jax.jvp(lambda x: model(x), (images,), (images,))[0],
        jax.vmap(lambda x: model(x[None])[0])(images),
    ]
    for logits in wrapped:
        np.testing.assert_allclose(logits, expected, atol=2e-5)

    def total(variables: Any) -> jax.Array:
        return dataclasses.replace(model, variables=variables)(images).sum()

    for gradient in (jax.grad(total), jax.jit(jax.grad(total))):
        assert float(jnp.abs(gradient(model.variables)["params"]["head"]["kernel"]).sum()) > 0


def test_weights_stay_where_they_were_put() -> None:
    device = jax.devices()[1]
    variables = jax.device_put(random_weights.variables(random_weights.draw(PATCH)), device)
    assert inference_model(PATCH, variables).jit()(random_weights.images(PATCH, 2)).devices() == {device}


def test_regnet_runs_as_it_is() -> None:
    arch = tiny.CNN
    model = build_model(arch)
    images = np.random.default_rng(0).standard_normal((2, arch.image_size, arch.image_size, arch.in_channels))
    variables: Any = model.init(jax.random.key(0), jnp.asarray(images, jnp.float32))
    np.testing.assert_allclose(
        inference_model(arch, variables).jit()(images.astype(np.float32)),
        by_module(arch, variables, images.astype(np.float32)),
        atol=1e-5,
    )


def test_batch_norm_is_folded_into_convolutions() -> None:
    weights = random_weights.draw(CONV)
    stem = fold_batch_norm(weights.params, weights.batch_stats)["stem"]
    assert set(stem) == {f"conv{index}" for index in range(1, 5)}
    norm, running = weights.params["stem"]["bn2"], weights.batch_stats["stem"]["bn2"]
    factor = norm["scale"] / np.sqrt(running["var"] + 1e-5)
    np.testing.assert_allclose(stem["conv2"]["kernel"], weights.params["stem"]["conv2"]["kernel"] * factor, rtol=1e-5)
    np.testing.assert_allclose(stem["conv2"]["bias"], norm["bias"] - running["mean"] * factor, rtol=1e-4, atol=1e-6)
    # Weights without BatchNorm stay what they are.
    assert fold_batch_norm(weights.params, {}) is weights.params
