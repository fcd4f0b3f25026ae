"""Slimmed vision transformers in PyTorch; loads model folders (`model.safetensors`, `config.json`); needs only torch.

    model = load('folder').eval()
    logits = model(model.normalize(pixels))  # pixels: uint8 (batch, height, width, channels), of the model's size
    logits, outputs = model(images, return_outputs=True)

Copy this file into your project, or use the copy in the model folder. The keys of its `state_dict` are those of the
PyTorch original. For feature recalibration distillation, see `distillation_loss` and `parameter_groups`.
"""

import json
import math
import pathlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (its customary name)
from torch import Tensor, nn

WEIGHTS, CONFIG = "model.safetensors", "config.json"
# Slimming and reverse modules use PyTorch's default epsilon, independent of the blocks' epsilon.
_SLIMMING_NORM_EPS = 1e-5
# Default normalization if config.json has none.
_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


class Outputs(NamedTuple):
    """Outputs of a forward pass in addition to the logits.

    Attributes:
        tokens: Each block's patch tokens, (batch, tokens, dim), after the block's slimming module.
        assignments: Each slimming module's assignment, (batch, tokens, kept); columns sum to one.
        distillation_logits: Logits of the distillation head, (batch, classes), or None.
    """

    tokens: list[Tensor]
    assignments: list[Tensor]
    distillation_logits: Tensor | None


class Stem(nn.Module):
    """The stem, from an image to a grid of tokens: convolutions with BatchNorm, a patch projection, or both.

    With a projection (LV-ViT), ReLU follows each convolution; without (the paper's models), GELU is between them.
    """

    def __init__(self, channels: int, layers: Sequence[tuple[int, int, int]], dim: int, patch: int) -> None:
        """Creates the convolutions, (features, kernel, stride) each, and a projection of `patch` pixels (0: none)."""
        super().__init__()
        self.count = len(layers)
        for index, (features, kernel, stride) in enumerate(layers, start=1):
            setattr(self, f"conv{index}", nn.Conv2d(channels, features, kernel, stride, kernel // 2, bias=False))
            setattr(self, f"bn{index}", nn.BatchNorm2d(features))
            channels = features
        self.proj = nn.Conv2d(channels, dim, patch, patch) if patch else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, channels, height, width) to (batch, dim, rows, columns)."""
        for index in range(1, self.count + 1):
            x = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(x))
            if self.proj is not None:
                x = F.relu(x)
            elif index < self.count:
                x = F.gelu(x)
        return x if self.proj is None else self.proj(x)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, tokens, dim) to the same shape."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, x.shape[-1] // self.heads))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with exact GELU between them."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., dim) to (..., out)."""
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth: drops residual branches per example in training, and rescales the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, tokens, dim) to the same shape."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(keep) / keep


class LayerScale(nn.Module):
    """A learned scale per channel (CaiT, DeiT-III)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-4))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, tokens, dim) to the same shape."""
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block whose residual branches are divided by the residual scale."""

    def __init__(self, shape: Mapping[str, Any], drop_path: float) -> None:
        super().__init__()
        dim = shape["dim"]
        self.residual_scale = shape["residual_scale"]
        self.norm1 = nn.LayerNorm(dim, shape["norm_eps"])
        self.attn = Attention(dim, shape["num_heads"], shape["qkv_bias"])
        self.norm2 = nn.LayerNorm(dim, shape["norm_eps"])
        self.mlp = Mlp(dim, int(dim * shape["mlp_ratio"]), dim)
        learned = shape.get("layer_scale", False)
        self.ls1, self.ls2 = (LayerScale(dim) if learned else nn.Identity() for _ in range(2))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, tokens, dim) to the same shape."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x)))) / self.residual_scale
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x)))) / self.residual_scale


class TokenSlimming(nn.Module):
    """TSM: softly merges N patch tokens into K; each kept token is a convex combination of the input tokens."""

    def __init__(self, dim: int, kept: int) -> None:
        super().__init__()
        norm = nn.LayerNorm(dim, _SLIMMING_NORM_EPS)
        self.weight = nn.Sequential(norm, nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, kept))
        self.scale = nn.Parameter(torch.ones(1, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (batch, N, dim) to the kept tokens (batch, K, dim) and the assignment (batch, N, K)."""
        assignment = (self.weight(x) * self.scale).softmax(1)
        return assignment.transpose(1, 2) @ x, assignment


class ReverseTokenSlimming(nn.Module):
    """RTSM: recovers N tokens from K kept ones, with an MLP over tokens, then one over channels; training only."""

    def __init__(self, dim: int, kept: int, patches: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, _SLIMMING_NORM_EPS)
        self.mlp1 = Mlp(kept, 4 * patches, patches)
        self.norm2 = nn.LayerNorm(dim, _SLIMMING_NORM_EPS)
        self.mlp2 = Mlp(dim, 4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, K, dim) to (batch, N, dim)."""
        x = self.mlp1(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp2(self.norm2(x))


class SiT(nn.Module):
    """A vision transformer, with or without slimming.

    Attributes:
        config: The contents of `config.json`: `architecture`, `kept_tokens`, `class_names`, `preprocessing`.
        rtsm: The reverse modules, an identity for each block before the first slimmed one; None if they are not used.
    """

    def __init__(self, config: Mapping[str, Any], reverse: bool = False, drop_path: float = 0.0) -> None:
        """Builds the model with random weights.

        Args:
            config: Contents of `config.json`; `architecture` is required, and `kept_tokens` for a slimmed model.
            reverse: Whether to create the reverse modules, for distillation.
            drop_path: Stochastic depth rate of the last block in training; it grows linearly from 0 in the first block.
        """
        super().__init__()
        self.config = dict(config)
        shape = config["architecture"]
        if shape.get("reducer", "slim") != "slim":
            raise ValueError(f"architecture.reducer: {shape['reducer']!r} is not known here")
        dim, depth, classes = shape["dim"], shape["depth"], shape["num_classes"]
        patches = (shape["image_size"] // shape["patch_size"]) ** 2
        blocks = shape.get("stage_blocks") or [depth]
        ends = [sum(blocks[: i + 1]) - 1 for i in range(len(blocks) - 1)]
        kept = dict(zip(ends, config.get("kept_tokens", [patches])[1:], strict=True))
        self.tsm_index = {block: index for index, block in enumerate(kept)}
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + patches, dim))
        self.patch_embed = _stem(shape)
        self.blocks = nn.ModuleList(Block(shape, drop_path * i / max(1, depth - 1)) for i in range(depth))
        if kept:
            self.tsm = nn.ModuleList(TokenSlimming(dim, count) for count in kept.values())
        self.norm = nn.LayerNorm(dim, shape["norm_eps"])
        self.head = nn.Linear(dim, classes)
        # Trained only by token labelling, but part of all checkpoints.
        self.aux_head = nn.Linear(dim, classes) if shape["aux_head"] else None
        self.head_dist = None
        if shape["distillation_token"]:
            self.dist_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
            self.dist_pos_embed = nn.Parameter(0.02 * torch.randn(1, 1, dim))
            self.head_dist = nn.Linear(dim, classes)
        self.rtsm = nn.ModuleList(_reverse_modules(dim, depth, patches, kept)) if reverse and kept else None

    def forward(self, images: Tensor, return_outputs: bool = False) -> Any:
        """Runs the model.

        Args:
            images: Normalized images, (batch, channels, height, width).
            return_outputs: Whether to also return `Outputs`, for distillation and visualization of the tokens.

        Returns:
            Logits (batch, classes), or logits and `Outputs`. With a distillation token the logits are the class head's
            in training and the mean of both heads' in evaluation.
        """
        prefix = 1 if self.head_dist is None else 2
        x = self._embed(images)
        tokens, assignments = [], []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.tsm_index:
                slimmed, assignment = self.tsm[self.tsm_index[index]](x[:, prefix:])
                x = torch.cat([x[:, :prefix], slimmed], 1)
                assignments.append(assignment)
            tokens.append(x[:, prefix:])
        x = self.norm(x[:, :prefix])
        logits, distillation_logits = self.head(x[:, 0]), None
        if self.head_dist is not None:
            distillation_logits = self.head_dist(x[:, 1])
            logits = logits if self.training else (logits + distillation_logits) / 2
        if not return_outputs:
            return logits
        return logits, Outputs(tokens, assignments, distillation_logits)

    def recover(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """Recovers each block's patch tokens to the whole grid, (batch, patches, dim), with the reverse modules."""
        if self.rtsm is None:
            return list(tokens)
        return [module(x) for module, x in zip(self.rtsm, tokens, strict=True)]

    def normalize(self, pixels: Tensor) -> Tensor:
        """Converts uint8 images, (batch, height, width, channels) of the model's size, to (batch, channels, ...)."""
        values = {**_IMAGENET, **self.config.get("preprocessing", {})}
        mean, std = (torch.tensor(values[name], device=pixels.device) for name in ("mean", "std"))
        if pixels.shape[-1] == 1:
            mean, std = mean.mean(), std.mean()
        return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).to(self.pos_embed.dtype)

    def _embed(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        prefix = self.cls_token + self.pos_embed[:, :1]
        if self.head_dist is not None:
            prefix = torch.cat([prefix, self.dist_token + self.dist_pos_embed], 1)
        return torch.cat([prefix.expand(images.shape[0], -1, -1), patches], 1)


_TOKENS = ("cls_token", "pos_embed", "dist_token", "dist_pos_embed")


def load(folder: str | pathlib.Path, drop_path: float = 0.0) -> SiT:
    """Loads the model of a folder, in evaluation mode; with reverse modules if the folder contains them.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The weights file is damaged.
        RuntimeError: A tensor is missing, unexpected or has another shape (raised by `load_state_dict`).
    """
    folder = pathlib.Path(folder)
    config = json.loads((folder / CONFIG).read_text())
    state = read_safetensors(folder / WEIGHTS)
    model = SiT(config, any(key.startswith("rtsm.") for key in state), drop_path)
    model.load_state_dict(state, strict=True)
    return model.eval()


def read_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file.

    Raises:
        ValueError: The file is truncated, or is not a safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else size
        if length > size - 8:
            raise ValueError(f"{path}: truncated, or no safetensors file")
        header = json.loads(file.read(length))
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype, (start, end) = _DTYPES[entry["dtype"]], entry["data_offsets"]
            if not 0 <= start <= end <= size - 8 - length or end - start != math.prod(entry["shape"]) * dtype.itemsize:
                raise ValueError(f"{path}: {name} lies outside of the file, or is of another size than its shape")
            data = bytearray(end - start)
            file.seek(8 + length + start)
            file.readinto(data)
            tensors[name] = torch.frombuffer(data, dtype=dtype).reshape(entry["shape"])
    return tensors


def fold_batch_norm(model: SiT) -> SiT:
    """Folds each BatchNorm of the stem into the convolution before it, in place; for evaluation only."""
    stem = model.patch_embed
    for index in range(1, stem.count + 1):
        conv, norm = getattr(stem, f"conv{index}"), getattr(stem, f"bn{index}")
        setattr(stem, f"conv{index}", nn.utils.fusion.fuse_conv_bn_eval(conv, norm))
        setattr(stem, f"bn{index}", nn.Identity())
    return model


def distillation_loss(
    student: SiT,
    teacher: SiT,
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


def parameter_groups(model: SiT, lr: float, weight_decay: float = 0.05, rtsm_lr_scale: float = 5.0) -> list[Any]:
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


def _stem(shape: Mapping[str, Any]) -> Stem:
    channels, dim, patch, kind = shape["in_channels"], shape["dim"], shape["patch_size"], shape["stem"]
    eighth, width = dim // 8, shape.get("stem_width", 64)
    after_first = [(dim // 4, 3, 2), (dim // 2, 3, 2), (dim, 3, 2)]
    stems = {
        "patch": ([], patch),
        "conv4": ([(eighth, 3, 2), *after_first], 0),
        "conv6": ([(eighth, 3, 2), (eighth, 3, 1), (eighth, 3, 1), *after_first], 0),
        "conv7": ([(width, 7, 2), (width, 3, 1), (width, 3, 1)], patch // 2),
    }
    if kind not in stems:
        raise ValueError(f"architecture.stem: {kind!r} is not known here")
    return Stem(channels, stems[kind][0], dim, stems[kind][1])


def _reverse_modules(dim: int, depth: int, patches: int, kept: Mapping[int, int]) -> list[nn.Module]:
    modules: list[nn.Module] = []
    count = patches
    for block in range(depth):
        count = kept.get(block, count)
        modules.append(ReverseTokenSlimming(dim, count, patches) if block >= min(kept) else nn.Identity())
    return modules
