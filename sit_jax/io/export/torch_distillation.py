"""Feature recalibration distillation in PyTorch, of the models of `torch_model.py`; needs only torch."""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 (its customary name)
from torch import Tensor, nn

if TYPE_CHECKING:
    from sit_jax.io.export.torch_layers import Mlp
else:
    Mlp = importlib.import_module(f"{__package__}.torch_layers" if __package__ else "torch_layers").Mlp

# PyTorch's default, independent of the blocks' epsilon.
_NORM_EPS = 1e-5
_TOKENS = ("cls_token", "pos_embed", "reg_token", "dist_token", "dist_pos_embed")


def distillation_loss(
    student: Any,
    teacher: Any,
    images: Tensor,
    labels: Tensor,
    token: float = 2.0,
    logits: float = 2.0,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Returns the terms of feature recalibration distillation: soft-target cross entropy, token and logits losses.

    Args:
        student: The slimmed model with its reverse modules, in training mode.
        teacher: The un-slimmed model of the same depth and width, in evaluation mode.
        images: Normalized images, (batch, channels, height, width).
        labels: Distributions over classes, (batch, classes).
        token: Weight of the mean squared error of the tokens, at all blocks.
        logits: Weight of the divergence of the logits.
        temperature: Temperature of that divergence.

    Returns:
        The unweighted terms `classification`, `token` and `logits`, and `loss`, the weighted sum to minimize.
    """
    with torch.no_grad():
        teacher_logits, teacher_outputs = teacher(images, return_outputs=True)
    mine, outputs = student(images, return_outputs=True)
    pairs = zip(student.recover(outputs.tokens), teacher_outputs.tokens, strict=True)
    log_mine, log_theirs = (F.log_softmax(x / temperature, -1) for x in (mine, teacher_logits))
    terms = {
        "classification": -(labels * F.log_softmax(mine, -1)).sum(-1).mean(),
        "token": torch.stack([F.mse_loss(recovered, target) for recovered, target in pairs]).mean(),
        "logits": temperature**2 * F.kl_div(log_mine, log_theirs, reduction="batchmean", log_target=True),
    }
    return {**terms, "loss": terms["classification"] + token * terms["token"] + logits * terms["logits"]}


def parameter_groups(model: nn.Module, lr: float, weight_decay: float = 0.05, rtsm_lr_scale: float = 5.0) -> list[Any]:
    """Returns groups for `torch.optim.AdamW`: RTSMs have their own rate; norms, biases, tokens, scales do not decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not name.startswith("aux_head"):
            decays = parameter.ndim > 1 and name not in _TOKENS and not name.endswith(".scale")
            groups.setdefault((name.startswith("rtsm."), decays), []).append(parameter)
    return [
        {"params": members, "lr": lr * (rtsm_lr_scale if reverse else 1), "weight_decay": weight_decay * decays}
        for (reverse, decays), members in groups.items()
    ]


def features(model: Any, images: Tensor, grid: str | None = None) -> dict[str, Tensor]:
    """Returns the features of normalized images, (batch, channels, height, width), after the last norm.

    Args:
        model: The model, in evaluation mode.
        images: Normalized images.
        grid: How the patch tokens of a slimmed model are brought back to the full grid: `rtsm`, by the last block's
            reverse module, or `spread`: a patch gets the mean of the tokens that it was merged into. None leaves them.

    Returns:
        `pooled` (batch, width), `prefix_tokens` (batch, prefix, dim) and `patch_tokens` (batch, tokens, dim).
    """
    outputs = model(images, return_outputs=True)[1]
    patches = outputs.patch_tokens
    if grid == "spread":
        for assignment in reversed(outputs.assignments):
            total = assignment.sum(2, keepdim=True)
            weights = torch.where(total > 0, assignment / total.clamp_min(1e-30), 0)
            patches = weights.to(patches.dtype) @ patches
    elif grid == "rtsm" and outputs.assignments:
        if model.rtsm is None:
            raise ValueError("the model has no reverse modules")
        patches = model.rtsm[-1](outputs.tokens[-1])
        patches = patches if model.norm_after_pool else model.norm(patches)
    return {"pooled": outputs.features, "prefix_tokens": outputs.prefix_tokens, "patch_tokens": patches}


class ReverseTokenSlimming(nn.Module):
    """RTSM: recovers N tokens from K kept ones, with an MLP over tokens, then one over channels; training only."""

    def __init__(self, dim: int, kept: int, patches: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, _NORM_EPS)
        self.mlp1 = Mlp(kept, 4 * patches, patches)
        self.norm2 = nn.LayerNorm(dim, _NORM_EPS)
        self.mlp2 = Mlp(dim, 4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, K, dim) to (batch, N, dim)."""
        x = self.mlp1(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp2(self.norm2(x))


def reverse_modules(dim: int, depth: int, patches: int, kept: Mapping[int, int]) -> nn.ModuleList:
    """Returns the reverse modules of all blocks: an identity for each block before the first slimmed one.

    `kept` maps the blocks with a slimming module after them to the tokens that it keeps of the `patches`.
    """
    counts = [kept.get(block) for block in range(depth)]
    modules: list[nn.Module] = []
    count = patches
    for block, new in enumerate(counts):
        count = count if new is None else new
        modules.append(ReverseTokenSlimming(dim, count, patches) if block >= min(kept) else nn.Identity())
    return nn.ModuleList(modules)
