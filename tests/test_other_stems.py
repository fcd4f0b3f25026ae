"""LV-ViT's 7x7 stem and layer scale against the same mathematics written in PyTorch."""

import dataclasses
from typing import Any

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_models import module_params

from sit_jax.analysis.flops import count_cost
from sit_jax.errors import ConfigError
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


class TorchStem(torch.nn.Module):
    """7x7 at stride 2, twice 3x3, each with BatchNorm and ReLU; then a projection of 8x8 patches."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.conv2 = torch.nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.conv3 = torch.nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1, self.bn2, self.bn3 = (torch.nn.BatchNorm2d(width) for _ in range(3))
        self.proj = torch.nn.Conv2d(width, dim, 8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = torch.relu(norm(conv(x)))
        return self.proj(x).flatten(2).transpose(1, 2)


class TorchBlock(torch.nn.Module):
    """A pre-norm block with a factor per channel on both branches."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        dim, hidden = arch.dim, int(arch.dim * arch.mlp_ratio)
        self.arch = arch
        self.norm1, self.norm2 = (torch.nn.LayerNorm(dim, eps=arch.norm_eps) for _ in range(2))
        self.attn = torch.nn.ModuleDict(
            {"qkv": torch.nn.Linear(dim, 3 * dim, arch.qkv_bias), "proj": torch.nn.Linear(dim, dim)}
        )
        self.mlp = torch.nn.ModuleDict({"fc1": torch.nn.Linear(dim, hidden), "fc2": torch.nn.Linear(hidden, dim)})
        if arch.layer_scale:
            for name in ("ls1", "ls2"):
                scale = torch.nn.Module()
                scale.gamma = torch.nn.Parameter(torch.randn(dim))
                self.add_module(name, scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.arch.num_heads
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        x = x + self._scaled(self.attn["proj"](mixed), "ls1")
        hidden = torch.nn.functional.gelu(self.mlp["fc1"](self.norm2(x)))
        return x + self._scaled(self.mlp["fc2"](hidden), "ls2")

    def _scaled(self, branch: torch.Tensor, name: str) -> torch.Tensor:
        if self.arch.layer_scale:
            branch = branch * self.get_parameter(f"{name}.gamma")
        return branch / self.arch.residual_scale


class TorchViT(torch.nn.Module):
    """A whole model in PyTorch, under the names of timm and of token labelling."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        dim = arch.dim
        self.cls_token = torch.nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = torch.nn.Parameter(torch.randn(1, 1 + arch.num_patches, dim))
        if arch.stem == "conv7":
            self.patch_embed: torch.nn.Module = TorchStem(arch.stem_width, dim)
        else:
            self.patch_embed = torch.nn.Module()
            self.patch_embed.proj = torch.nn.Conv2d(3, dim, arch.patch_size, arch.patch_size)
        self.blocks = torch.nn.ModuleList(TorchBlock(arch) for _ in range(arch.depth))
        self.norm = torch.nn.LayerNorm(dim, eps=arch.norm_eps)
        self.head = torch.nn.Linear(dim, arch.num_classes)
        if arch.aux_head:
            self.aux_head = torch.nn.Linear(dim, arch.num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        stem = self.patch_embed
        embed = stem if isinstance(stem, TorchStem) else stem.get_submodule("proj")
        patches = embed(images)
        patches = patches if patches.ndim == 3 else patches.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def torch_model(arch: Architecture) -> torch.nn.Module:
    """Random weights, and BatchNorm statistics as training leaves them."""
    torch.manual_seed(0)
    model = TorchViT(arch)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.mark.parametrize("arch", [CONV7, SCALED], ids=["conv7", "layer_scale"])
def test_forward_against_pytorch(arch: Architecture) -> None:
    theirs = torch_model(arch)
    images = np.random.default_rng(1).normal(size=(3, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    variables = golden_files.from_original({key: value.numpy() for key, value in theirs.state_dict().items()}, arch)
    logits, _ = build_model(arch).apply(variables, jnp.asarray(images))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert module_params(arch)[0] == count_cost(arch).params == sum(x.numel() for x in theirs.parameters())


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


@pytest.mark.parametrize(("field", "value"), [("stem_width", 0), ("patch_size", 8)])
def test_impossible_stems(field: str, value: int) -> None:
    changes: dict[str, Any] = {field: value}
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(CONV7, **changes)
    assert caught.value.key == field
