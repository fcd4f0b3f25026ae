"""Slimmed vision transformers in PyTorch; loads model folders (`model.safetensors`, `config.json`); needs only torch.

    model = load('folder').eval()
    logits = model(model.normalize(pixels))  # pixels: uint8 (batch, height, width, channels), of the model's size
    logits, outputs = model(images, return_outputs=True)
    features = model.features(images)  # `pooled`, `prefix_tokens`, `patch_tokens`

Copy this file into your project, or use the copy in the model folder. The keys of its `state_dict` are those of the
PyTorch original. For feature recalibration distillation, see `torch_distillation.py` beside this file.
"""

import copy
import importlib
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
_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


class Outputs(NamedTuple):
    """Outputs of a forward pass in addition to the logits.

    Attributes:
        tokens: Each block's patch tokens, (batch, tokens, dim), after the block's slimming module.
        assignments: Each slimming module's assignment, (batch, tokens, kept); columns sum to one.
        distillation_logits: Logits of the distillation head, (batch, classes), or None.
        features: Pooled features that the head reads, (batch, width).
        prefix_tokens: Class token, distillation token and registers after the last norm, (batch, prefix, dim).
        patch_tokens: Patch tokens after the last norm, (batch, tokens, dim).
    """

    tokens: list[Tensor]
    assignments: list[Tensor]
    distillation_logits: Tensor | None
    features: Tensor
    prefix_tokens: Tensor
    patch_tokens: Tensor


class Stem(nn.Module):
    """The stem, from an image to a grid of tokens: convolutions with BatchNorm, a patch projection, or both.

    With a projection (LV-ViT), ReLU follows each convolution; without (the paper's models), GELU is between them.
    """

    def __init__(self, shape: Mapping[str, Any]) -> None:
        super().__init__()
        channels, dim, patch, kind = shape["in_channels"], shape["dim"], shape["patch_size"], shape["stem"]
        eighth, width = dim // 8, shape.get("stem_width", 64)
        after_first = [(dim // 4, 3, 2), (dim // 2, 3, 2), (dim, 3, 2)]
        stems = {  # (features, kernel, stride) of each convolution, and the pixels of a projection (0: none).
            "patch": ([], patch),
            "conv4": ([(eighth, 3, 2), *after_first], 0),
            "conv6": ([(eighth, 3, 2), (eighth, 3, 1), (eighth, 3, 1), *after_first], 0),
            "conv7": ([(width, 7, 2), (width, 3, 1), (width, 3, 1)], patch // 2),
        }
        if kind not in stems:
            raise ValueError(f"architecture.stem: {kind!r} is not known here")
        layers, side = stems[kind]
        self.count = len(layers)
        for index, (features, kernel, stride) in enumerate(layers, start=1):
            setattr(self, f"conv{index}", nn.Conv2d(channels, features, kernel, stride, kernel // 2, bias=False))
            setattr(self, f"bn{index}", nn.BatchNorm2d(features))
            channels = features
        self.proj = nn.Conv2d(channels, dim, side, side, bias=shape.get("patch_bias", True)) if side else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, channels, height, width) to (batch, dim, rows, columns)."""
        for index in range(1, self.count + 1):
            x = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(x))
            if self.proj is not None:
                x = F.relu(x)
            elif index < self.count:
                x = F.gelu(x)
        return x if self.proj is None else self.proj(x)


# Cosine and sine, (batch or 1, tokens, head_dim).
Rotation = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Multi-head self-attention, with rotary positions if `forward` gets a rotation."""

    def __init__(self, dim: int, heads: int, bias: bool, key_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias and key_bias)
        if bias and not key_bias:
            self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) for _ in range(2))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Maps (batch, tokens, dim) to the same shape."""
        x = self.qkv(x)
        if hasattr(self, "q_bias"):
            x = x + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        query, key, value = x.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if rotation is not None:
            query, key = _rotate(query, rotation), _rotate(key, rotation)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def _rotate(x: Tensor, rotation: Rotation) -> Tensor:
    cosine, sine = (part[:, None].to(x.dtype) for part in rotation)
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine


_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class Mlp(nn.Module):
    """Two linear layers with an activation between them; `swiglu` gates the second half of the hidden units."""

    def __init__(self, dim: int, hidden: int, out: int, activation: str = "gelu", swiglu: bool = False) -> None:
        super().__init__()
        self.activation, self.swiglu = _ACTIVATIONS[activation], swiglu
        self.fc1 = nn.Linear(dim, 2 * hidden if swiglu else hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., dim) to (..., out)."""
        x = self.fc1(x)
        if self.swiglu:
            gate, x = x.chunk(2, -1)
            return self.fc2(F.silu(gate) * x)
        return self.fc2(self.activation(x))


class AttentionPool(nn.Module):
    """Attention of one learned query to all tokens, then an MLP with residual branch (SigLIP)."""

    def __init__(self, shape: Mapping[str, Any]) -> None:
        super().__init__()
        dim, self.heads = shape["dim"], shape["num_heads"]
        self.latent = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, shape["norm_eps"])
        self.mlp = Mlp(dim, int(dim * shape["mlp_ratio"]), dim, shape.get("activation", "gelu"))

    def forward(self, x: Tensor, mass: Tensor) -> Tensor:
        """Maps (batch, tokens, dim) to (batch, dim); `mass` (batch, tokens) is the patches merged into each token."""
        query = self.q(self.latent).unflatten(2, (self.heads, -1)).transpose(1, 2).expand(x.shape[0], -1, -1, -1)
        key, value = self.kv(x).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, mass.log()[:, None, None].to(x.dtype))
        x = self.proj(mixed.transpose(1, 2).flatten(2))[:, 0]
        return x + self.mlp(self.norm(x))


class Block(nn.Module):
    """A pre-norm transformer block whose residual branches are divided by the residual scale."""

    def __init__(self, shape: Mapping[str, Any], drop_path: float) -> None:
        super().__init__()
        dim = shape["dim"]
        self.residual_scale = shape["residual_scale"]
        self.norm1 = nn.LayerNorm(dim, shape["norm_eps"])
        self.attn = Attention(dim, shape["num_heads"], shape["qkv_bias"], shape.get("key_bias", True))
        self.norm2 = nn.LayerNorm(dim, shape["norm_eps"])
        swiglu = shape.get("mlp", "plain") == "swiglu"
        self.mlp = Mlp(dim, int(dim * shape["mlp_ratio"]), dim, shape.get("activation", "gelu"), swiglu)
        # Layer scale: a learned scale per channel (CaiT, DeiT-III).
        scale = {"gamma": nn.Parameter(torch.full((dim,), 1e-4))} if shape.get("layer_scale") else {}
        self.ls1, self.ls2 = (nn.ParameterDict(copy.deepcopy(scale)) for _ in range(2))
        self.drop_path = drop_path

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Maps (batch, tokens, dim) to the same shape."""
        x = x + self._branch(self.attn(self.norm1(x), rotation), self.ls1)
        return x + self._branch(self.mlp(self.norm2(x)), self.ls2)

    def _branch(self, x: Tensor, scale: nn.ParameterDict) -> Tensor:
        """Scales a residual branch; in training, drops it per example (stochastic depth) and rescales the others."""
        x = (x * scale["gamma"] if scale else x) / self.residual_scale
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(keep) / keep


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


class SiT(nn.Module):
    """A vision transformer, with or without slimming.

    `config` is the contents of `config.json`, `rtsm` the reverse modules, or None.
    """

    def __init__(self, config: Mapping[str, Any], reverse: bool = False, drop_path: float = 0.0) -> None:
        """Builds the model of a `config.json` with random weights, and with reverse modules if `reverse`.

        `drop_path` is the stochastic depth rate of the last block; it grows linearly from 0 in the first block.
        """
        super().__init__()
        self.config = dict(config)
        shape = config["architecture"]
        if shape.get("reducer", "slim") != "slim":
            raise ValueError(f"architecture.reducer: {shape['reducer']!r} is not known here")
        dim, depth, classes = shape["dim"], shape["depth"], shape["num_classes"]
        size = shape["image_size"]
        self.grid = [side // shape["patch_size"] for side in ([size, size] if isinstance(size, int) else size)]
        patches = math.prod(self.grid)
        self.pool, self.norm_after_pool = shape.get("pool", "token"), shape.get("norm_after_pool", False)
        self.rotary = shape.get("positions", "learned") == "rope"
        blocks = shape.get("stage_blocks") or [depth]
        ends = [sum(blocks[: i + 1]) - 1 for i in range(len(blocks) - 1)]
        kept = dict(zip(ends, config.get("kept_tokens", [patches])[1:], strict=True))
        self.tsm_index = {block: index for index, block in enumerate(kept)}
        has_class, distils = shape.get("class_token", True), shape["distillation_token"]
        registers, positions = shape.get("registers", 0), 0 if self.rotary else has_class + patches
        counts = (has_class, positions, registers, distils, distils)
        tokens = (nn.Parameter(0.02 * torch.randn(1, int(count), dim)) if count else None for count in counts)
        self.cls_token, self.pos_embed, self.reg_token, self.dist_token, self.dist_pos_embed = tokens
        self.num_prefix_tokens = has_class + distils + registers
        self.norm_pre = nn.LayerNorm(dim, shape["norm_eps"]) if shape.get("pre_norm") else nn.Identity()
        self.patch_embed = Stem(shape)
        self.blocks = nn.ModuleList(Block(shape, drop_path * i / max(1, depth - 1)) for i in range(depth))
        if kept:
            self.tsm = nn.ModuleList(TokenSlimming(dim, count) for count in kept.values())
        self.norm = nn.LayerNorm(dim, shape["norm_eps"])
        self.attn_pool = AttentionPool(shape) if self.pool == "map" else None
        width, projection = dim * (2 if self.pool == "token_avg" else 1), shape.get("projection", 0)
        self.projection = nn.Linear(width, projection, bias=False) if projection else nn.Identity()
        self.head = nn.Linear(projection or width, classes) if classes else None
        # Trained only by token labelling, but part of all checkpoints.
        self.aux_head = nn.Linear(dim, classes) if shape["aux_head"] and classes else None
        self.head_dist = nn.Linear(dim, classes) if distils and classes else None
        self.rtsm = _distillation().reverse_modules(dim, depth, patches, kept) if reverse and kept else None

    def forward(self, images: Tensor, return_outputs: bool = False) -> Any:
        """Returns the logits (batch, classes) of normalized images (batch, channels, height, width).

        With `return_outputs`, also returns `Outputs`, for distillation and features. With a distillation token, the
        logits are the class head's in training, and the mean of both heads' in evaluation.
        """
        prefix, x = self.num_prefix_tokens, self._embed(images)
        mass, coordinates = x.new_ones(x.shape[0], x.shape[1] - prefix), self._coordinates(x)
        tokens, assignments, distillation_logits = [], [], None
        for index, block in enumerate(self.blocks):
            x = block(x, self._rotation(coordinates) if self.rotary else None)
            if index in self.tsm_index:
                slimmed, assignment = self.tsm[self.tsm_index[index]](x[:, prefix:])
                x = torch.cat([x[:, :prefix], slimmed], 1)
                assignments.append(assignment)
                mass = (assignment * mass[:, :, None]).sum(1)
                coordinates = (assignment / assignment.sum(1, keepdim=True)).transpose(1, 2) @ coordinates
            tokens.append(x[:, prefix:])
        x = x if self.norm_after_pool else self.norm(x)
        features = self._pool(x[:, :prefix], x[:, prefix:], mass)
        features = self.projection(self.norm(features) if self.norm_after_pool else features)
        logits = features[:, :0] if self.head is None else self.head(features)
        if self.head_dist is not None:
            distillation_logits = self.head_dist(x[:, 1])
            logits = logits if self.training else (logits + distillation_logits) / 2
        if not return_outputs:
            return logits
        return logits, Outputs(tokens, assignments, distillation_logits, features, x[:, :prefix], x[:, prefix:])

    def features(self, images: Tensor, grid: str | None = None) -> dict[str, Tensor]:
        """Returns the features by name; see `features` in `torch_distillation.py`."""
        return _distillation().features(self, images, grid)

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
        return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).to(self.norm.weight.dtype)

    def _embed(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        prefix: list[Tensor] = [] if self.cls_token is None else [self.cls_token]
        if self.pos_embed is not None:
            prefix = [token + self.pos_embed[:, :1] for token in prefix]
            patches = patches + self.pos_embed[:, len(prefix) :]
        if self.dist_token is not None and self.dist_pos_embed is not None:
            prefix.append(self.dist_token + self.dist_pos_embed)
        if self.reg_token is not None:
            prefix.append(self.reg_token)
        return self.norm_pre(torch.cat([*(x.expand(images.shape[0], -1, -1) for x in prefix), patches], 1))

    def _pool(self, prefix: Tensor, patches: Tensor, mass: Tensor) -> Tensor:
        """Pools the tokens to one feature vector per image; a token counts as the patches merged into it."""
        if self.pool == "token":
            return prefix[:, 0]
        if self.attn_pool is not None:
            return self.attn_pool(torch.cat([prefix, patches], 1), F.pad(mass, (prefix.shape[1], 0), value=1.0))
        mean = ((mass / mass.sum(1, keepdim=True))[:, None] @ patches)[:, 0]
        return mean if self.pool == "avg" else torch.cat([prefix[:, 0], mean], -1)

    def _coordinates(self, x: Tensor) -> Tensor:
        """Returns row and column of each patch, from -1 to 1 over the image, (1, patches, 2)."""
        sides = [2 * (torch.arange(n, device=x.device, dtype=x.dtype) + 0.5) / n - 1 for n in self.grid]
        return torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).reshape(1, -1, 2)

    def _rotation(self, coordinates: Tensor) -> Rotation:
        """Returns the rotation of DINOv3's rotary positions; prefix tokens are not rotated."""
        shape = self.config["architecture"]
        size = shape["dim"] // shape["num_heads"]
        exponents = torch.arange(0, 1, 4 / size, device=coordinates.device, dtype=coordinates.dtype)
        angles = 2 * math.pi * coordinates[..., None] * shape["rope_theta"] ** -exponents
        angles = F.pad(angles.flatten(2).tile(2), (0, 0, self.num_prefix_tokens, 0))
        return angles.cos(), angles.sin()


def _distillation() -> Any:
    return importlib.import_module(f"{__package__}.torch_distillation" if __package__ else "torch_distillation")


def __getattr__(name: str) -> Any:
    if name in ("distillation_loss", "parameter_groups"):  # Their former place.
        return getattr(_distillation(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(folder: str | pathlib.Path, drop_path: float = 0.0) -> SiT:
    """Loads the model of a folder, in evaluation mode; with reverse modules if the folder contains them.

    Raises FileNotFoundError for a missing file, ValueError for damaged weights, and RuntimeError for those of another
    model.
    """
    folder = pathlib.Path(folder)
    config = json.loads((folder / CONFIG).read_text())
    state = read_safetensors(folder / WEIGHTS)
    model = SiT(config, any(key.startswith("rtsm.") for key in state), drop_path).eval()
    model.load_state_dict(state, strict=True)
    return model


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
