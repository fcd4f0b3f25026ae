"""LV-ViT's 7x7 stem and layer scale against the PyTorch module, which test_torch_model.py compares with formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import original_models
import pytest
import random_weights
import torch
from test_models import module_params

from sit_jax.analysis.flops import count_cost
from sit_jax.io.export.torch_model import SiT
from sit_jax.io.model_folder import describe
from sit_jax.models import build_model
from sit_jax.models.architecture import Architecture

CONV7 = Architecture(
    image_size=32,
    num_classes=5,
    stem="conv7",
    stem_width=8,
    dim=12,
    depth=2,
    num_heads=2,
    mlp_ratio=3.0,
    qkv_bias=False,
    residual_scale=2.0,
    norm_eps=1e-5,
    aux_head=True,
)
SCALED = Architecture(image_size=32, patch_size=8, num_classes=5, dim=16, depth=2, num_heads=2, layer_scale=True)


def torch_model(arch: Architecture) -> SiT:
    """The PyTorch module with random weights, and BatchNorm statistics as training leaves them."""
    state = original_models.state_dict(arch)
    model = SiT(describe(arch, {})).eval()
    model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()}, strict=True)
    return model


@pytest.mark.parametrize("arch", [CONV7, SCALED], ids=["conv7", "layer_scale"])
def test_forward_against_pytorch(arch: Architecture) -> None:
    weights, images = random_weights.draw(arch), random_weights.images(arch)
    with torch.no_grad():
        expected = torch_model(arch)(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    logits, _ = build_model(arch).apply(random_weights.variables(weights), jnp.asarray(images))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert module_params(arch)[0] == count_cost(arch).params


def test_costs_of_the_published_lvvit() -> None:
    # LV-ViT-S: 26.2 million parameters and 6.6 GMAC in its paper, which counts the auxiliary head on every patch.
    arch = Architecture(
        stem="conv7", dim=384, depth=16, num_heads=6, mlp_ratio=3.0, qkv_bias=False, residual_scale=2.0, aux_head=True
    )
    cost = count_cost(arch)
    assert cost.params / 1e6 == pytest.approx(26.2, abs=0.06)
    assert round(cost.gmac + 196 * 384 * 1000 / 1e9, 1) == 6.6


def test_layer_scale_starts_small() -> None:
    variables = build_model(SCALED).init(jax.random.key(0), jnp.zeros((2, 32, 32, 3)))
    np.testing.assert_array_equal(variables["params"]["blocks_1"]["layer_scale2"], np.full(16, 1e-4, np.float32))
