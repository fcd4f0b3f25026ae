"""Slimmed vision transformers in PyTorch; loads model folders (`model.safetensors`, `config.json`); needs only torch.

    model = load('folder').eval()
    logits = model(model.normalize(pixels))  # pixels: uint8 (batch, height, width, channels), of the model's size
    logits, outputs = model(images, return_outputs=True)
    features = model.features(images)  # `pooled`, `prefix_tokens`, `patch_tokens`

Copy this file and `torch_layers.py` into your project, or use the copies in the model folder. The keys of its
`state_dict` are those of the PyTorch original. For feature recalibration distillation, see `torch_distillation.py`
beside this file.
"""

import importlib
import json
import math
import pathlib
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (its customary name)
from torch import Tensor, nn

if TYPE_CHECKING:
    from sit_jax.io.export.torch_layers import REDUCERS, AttentionPool, Block, Reduced, Rotation, Stem
else:
    _layers = importlib.import_module(f"{__package__}.torch_layers" if __package__ else "torch_layers")
    REDUCERS, AttentionPool, Block, Reduced, Rotation, Stem = (
        getattr(_layers, name) for name in ("REDUCERS", "AttentionPool", "Block", "Reduced", "Rotation", "Stem")
    )

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


class Outputs(NamedTuple):
    """Outputs of a forward pass in addition to the logits.

    Attributes:
        tokens: Each block's patch tokens, (batch, tokens, dim), after the block's reducer.
        assignments: Each reducer's assignment, (batch, tokens, kept); TSM's columns sum to one.
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
        reducer = shape.get("reducer", "slim")
        if reducer not in REDUCERS:
            raise ValueError(f"architecture.reducer: {reducer!r} is not known here")
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
            self.tsm = nn.ModuleList(REDUCERS[reducer](dim, count) for count in kept.values())
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
        mass, coordinates = x.new_ones(x.shape[0], x.shape[1] - prefix, dtype=torch.float32), self._coordinates(x)
        tokens: list[Tensor] = []
        assignments: list[Tensor] = []
        distillation_logits = None
        for index, block in enumerate(self.blocks):
            rotation = self._rotation(coordinates) if self.rotary else None
            x, reduced = self._step(index, block, x, rotation, mass, weighs=bool(assignments))
            if reduced is not None:
                mass, assignment = reduced.mass, reduced.assignment
                assignments.append(assignment)
                weights = assignment / assignment.sum(1, keepdim=True).clamp_min(1e-30)
                coordinates = weights.transpose(1, 2).to(x.dtype) @ coordinates
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

    def _step(
        self, index: int, block: nn.Module, x: Tensor, rotation: Rotation | None, mass: Tensor, weighs: bool
    ) -> tuple[Tensor, Reduced | None]:
        """Applies a block and its reducer, if it has one."""
        prefix = self.num_prefix_tokens
        masses = F.pad(mass, (prefix, 0), value=1.0) if weighs and self.tsm[0].weighs_attention else None
        if index not in self.tsm_index:
            return block(x, rotation, masses), None
        reducer: Any = self.tsm[self.tsm_index[index]]
        results: list[Reduced] = []

        def reduce(x: Tensor, cue: Tensor | None) -> Tensor:
            results.append(reducer(x[:, prefix:], mass, None if cue is None else cue[:, prefix:]))
            return torch.cat([x[:, :prefix], results[0].tokens], 1)

        by_all = reducer.needs == "class_attention" and self.cls_token is None
        x = block(x, rotation, masses, "attention" if by_all else reducer.needs, reduce if reducer.inside else None)
        return x if reducer.inside else reduce(x, None), results[0]

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
        mean = ((mass / mass.sum(1, keepdim=True))[:, None].to(patches.dtype) @ patches)[:, 0]
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
