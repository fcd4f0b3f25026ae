"""Weight layouts: maps the tensors of a file to each tensor of the original's layout."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from sit_jax.config import JsonObject

Shapes = Mapping[str, tuple[int, ...]]


class Source(NamedTuple):
    """The source of a tensor of the original's layout: the file's tensors, and the function that combines them."""

    names: tuple[str, ...]
    combine: Callable[..., np.ndarray] = lambda x: x


_GOOGLE_PREFIXES = ("cls", "embedding/", "head/", "Transformer/")
# Evaluation as in vit_jax/input_pipeline.py of google-research: the whole image is stretched, pixels are in [-1, 1].
_GOOGLE_PREPROCESSING: JsonObject = {
    **{"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    **{"interpolation": "bilinear", "crop_fraction": 1.0, "resize": "stretch"},
}


class Layout(NamedTuple):
    """Names and layouts of a model's weights.

    `source` maps keys of the original's layout to their sources. If `plain`, the blocks are those of plain ViTs, with
    residual scale 1 and LayerNorm epsilon 1e-6. `prefixes` are the possible first parts of tensor names; empty if any
    name is possible. `preprocessing` is that of all its models; None if it differs between models.
    """

    name: str
    source: Callable[[str], Source]
    plain: bool = False
    prefixes: tuple[str, ...] = ()
    preprocessing: JsonObject | None = None

    def knows(self, name: str) -> bool:
        """Returns whether a tensor's name may belong to this layout; other names are unknown names."""
        return not self.prefixes or name.startswith(self.prefixes)


ORIGINAL = Layout("SiT original layout", lambda key: Source((key,)))
# DeiT with the original's slimming modules under another name, of https://github.com/JoakimHaurum/TokenReduction.
_TOKEN_REDUCTION = Layout(
    "TokenReduction layout (which has no RTSMs)",
    lambda key: Source((re.sub(r"^tsm\.", "cluster_layers.", key),)),
    plain=True,
)


def find_layout(shapes: Shapes, prefix: int = 1) -> Layout | None:
    """Returns the layout of a file's tensors, or None if it is not a known layout.

    `prefix` is how many of timm's positions belong to class and distillation tokens; see `prefix_positions`.
    """
    if any(name.startswith("Transformer/encoderblock_") for name in shapes):
        name = "google-research layout (vision_transformer)"
        return Layout(name, _google, plain=True, prefixes=_GOOGLE_PREFIXES, preprocessing=_GOOGLE_PREPROCESSING)
    if not any(name.startswith("blocks.0.") for name in shapes):
        return None
    if any(name.startswith(("tsm.", "rtsm.")) for name in shapes):
        return ORIGINAL
    if "cluster_layers.0.weight.3.weight" in shapes:  # Other methods of that repository use the first part as well.
        return _TOKEN_REDUCTION
    if len(shapes.get("patch_embed.conv1.weight", ())) == 4:
        seven = shapes["patch_embed.conv1.weight"][-1] == 7
        return ORIGINAL._replace(name="token-labelling layout (LV-ViT)") if seven else ORIGINAL
    if "aux_head.weight" in shapes or "dist_pos_embed" in shapes:
        return ORIGINAL
    return Layout("timm layout (ViT, DeiT)", _timm(shapes, prefix), plain=True)


def _timm(shapes: Shapes, prefix: int) -> Callable[[str], Source]:
    """Returns timm's sources: the original's names, except for layer scale in DeiT's checkpoints and for positions."""

    def positions(x: np.ndarray) -> np.ndarray:
        return np.delete(x, 1, axis=1) if prefix == 2 else np.concatenate([np.zeros_like(x[:, :1]), x], axis=1)

    def source(key: str) -> Source:
        scale = re.fullmatch(r"(blocks\.\d+)\.ls([12])\.gamma", key)
        if scale and key not in shapes:
            return Source((f"{scale[1]}.gamma_{scale[2]}",))
        if key == "pos_embed" and prefix != 1:
            return Source((key,), positions)
        if key == "dist_pos_embed":
            return Source(("pos_embed",), lambda x: x[:, 1:2] if prefix == 2 else np.zeros_like(x[:, :1]))
        return Source((key,))

    return source


def _heads_kernel(*parts: np.ndarray) -> np.ndarray:
    """Concatenates kernels (dim, heads, width) of query, key and value -> (3 x heads x width, dim)."""
    return np.concatenate([part.reshape(part.shape[0], -1).T for part in parts])


_GOOGLE = {
    "cls_token": Source(("cls",)),
    "pos_embed": Source(("Transformer/posembed_input/pos_embedding",)),
    "patch_embed.proj.weight": Source(("embedding/kernel",), lambda x: x.transpose(3, 2, 0, 1)),
    "patch_embed.proj.bias": Source(("embedding/bias",)),
    "norm.weight": Source(("Transformer/encoder_norm/scale",)),
    "norm.bias": Source(("Transformer/encoder_norm/bias",)),
    "head.weight": Source(("head/kernel",), np.transpose),
    "head.bias": Source(("head/bias",)),
}
_QKV, _ATTENTION = ("query", "key", "value"), "MultiHeadDotProductAttention_1"
_GOOGLE_BLOCK = {
    "norm1.weight": Source(("LayerNorm_0/scale",)),
    "norm1.bias": Source(("LayerNorm_0/bias",)),
    "attn.qkv.weight": Source(tuple(f"{_ATTENTION}/{x}/kernel" for x in _QKV), _heads_kernel),
    "attn.qkv.bias": Source(tuple(f"{_ATTENTION}/{x}/bias" for x in _QKV), lambda *x: np.concatenate(x, axis=None)),
    "attn.proj.weight": Source((f"{_ATTENTION}/out/kernel",), lambda x: x.reshape(-1, x.shape[-1]).T),
    "attn.proj.bias": Source((f"{_ATTENTION}/out/bias",)),
    "norm2.weight": Source(("LayerNorm_2/scale",)),
    "norm2.bias": Source(("LayerNorm_2/bias",)),
    "mlp.fc1.weight": Source(("MlpBlock_3/Dense_0/kernel",), np.transpose),
    "mlp.fc1.bias": Source(("MlpBlock_3/Dense_0/bias",)),
    "mlp.fc2.weight": Source(("MlpBlock_3/Dense_1/kernel",), np.transpose),
    "mlp.fc2.bias": Source(("MlpBlock_3/Dense_1/bias",)),
}


def _google(key: str) -> Source:
    """Returns the source of a tensor; its own name, which no file of this layout has, if the layout lacks it."""
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
    if block and block[2] in _GOOGLE_BLOCK:
        names, combine = _GOOGLE_BLOCK[block[2]]
        return Source(tuple(f"Transformer/encoderblock_{block[1]}/{name}" for name in names), combine)
    return _GOOGLE.get(key, Source((key,)))
