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

PATCH = Architecture(image_size=32, patch_size=8, in_channels=1, num_classes=5, dim=16, depth=2, num_heads=4)
SLIMMED = dataclasses.replace(PATCH, stage_blocks=(1, 1), keep_ratio=0.5)
CONV = dataclasses.replace(SLIMMED, stem="conv4", patch_size=16, image_size=48, residual_scale=2.0, qkv_bias=False)
MODELS = {
    "plain": PATCH,
    "slimmed": SLIMMED,
    "conv4": CONV,
    "conv6": dataclasses.replace(CONV, stem="conv6"),
    "conv7": dataclasses.replace(CONV, stem="conv7", stem_width=4),
    "distilled": dataclasses.replace(SLIMMED, distillation_token=True, layer_scale=True, mlp_ratio=2.3),
    "RegNet": tiny.CNN,
}


def drawn(arch: Any) -> dict[str, Any]:
    if isinstance(arch, Architecture):
        return random_weights.variables(random_weights.draw(arch))
    images = jnp.zeros((1, arch.image_size, arch.image_size, arch.in_channels))
    return dict(build_model(arch).init(jax.random.key(0), images))


def by_module(arch: Any, variables: dict[str, Any], images: Any, dtype: str = "float32") -> np.ndarray:
    return np.asarray(jax.jit(build_model(arch, dtype=dtype).apply)(variables, images)[0])


@pytest.mark.parametrize("arch", MODELS.values(), ids=MODELS.keys())
def test_logits_are_the_models(arch: Architecture) -> None:
    variables = drawn(arch)
    # Far from zero: what is folded must not rely on small means.
    images = random_weights.images(arch, 3) + 2
    expected = by_module(arch, variables, images)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(inference_model(arch, variables).jit()(images), expected, atol=2e-5)


def test_large_and_small_batches() -> None:
    images = random_weights.images(SLIMMED, 80)
    run = inference_model(SLIMMED, drawn(SLIMMED)).jit()
    # More than 1,024 rows and fewer: on CPU two programs.
    np.testing.assert_allclose(run(images)[:3], run(images[:3]), atol=1e-5)


def test_bfloat16_is_as_near_as_the_module() -> None:
    arch = dataclasses.replace(PATCH, depth=1)
    variables, images = drawn(arch), random_weights.images(arch, 4)
    expected = by_module(arch, variables, images)
    error = np.abs(inference_model(arch, variables, "bfloat16").jit()(images) - expected).max()
    assert 0 < error < 1.5 * np.abs(by_module(arch, variables, images, "bfloat16") - expected).max()


def test_calls_within_other_functions() -> None:
    """A model as `sit_jax.load` gives it, used first and later within whatever JAX offers."""
    arch = dataclasses.replace(PATCH, depth=1)
    model = sit_jax.Model(arch, jax.tree.map(jnp.asarray, drawn(arch)))
    images = jnp.asarray(random_weights.images(arch, 2))
    expected = by_module(arch, model.variables, images)
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
    variables = jax.device_put(drawn(PATCH), device)
    assert inference_model(PATCH, variables).jit()(random_weights.images(PATCH, 2)).devices() == {device}
