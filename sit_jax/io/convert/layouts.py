"""Weight layouts: maps the tensors of a file to each tensor of the original's layout."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]


class Source(NamedTuple):
    """The source of a tensor of the original's layout.

    Attributes:
        names: Names of the file's tensors that it is made from.
        combine: Combines them.
    """

    names: tuple[str, ...]
    combine: Callable[..., np.ndarray]


_GOOGLE_PREFIXES = ("cls", "embedding/", "head/", "Transformer/")
# Evaluation as in vit_jax/input_pipeline.py of google-research: the whole image is stretched, pixels are in [-1, 1].
_GOOGLE_PICTURES: dict[str, Any] = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bilinear",
    "crop_fraction": 1.0,
    "resize": "stretch",
}


class Layout(NamedTuple):
    """Names and layouts of a model's weights.

    Attributes:
        name: Common name of the layout.
        source: Key of the original's layout -> its source in this layout.
        plain: Whether all models of the layout are plain ViTs, with residual scale 1 and LayerNorm epsilon 1e-6.
        prefixes: Possible first parts of tensor names; empty if any name is possible.
        preprocessing: Preprocessing of all its models; None if it differs between models.
    """

    name: str
    source: Callable[[str], Source]
    plain: bool = False
    prefixes: tuple[str, ...] = ()
    preprocessing: dict[str, Any] | None = None

    def knows(self, name: str) -> bool:
        """Returns whether a tensor's name may belong to this layout; other names are unknown names."""
        return not self.prefixes or name.startswith(self.prefixes)


def _identity(x: np.ndarray) -> np.ndarray:
    return x


def _same(key: str) -> Source:
    return Source((key,), _identity)


ORIGINAL = Layout("SiT original layout", _same)


def find_layout(shapes: Shapes, prefix: int = 1) -> Layout | None:
    """Returns the layout of a file's tensors, or None if it is not a known layout.

    Args:
        shapes: Name -> shape of the tensors.
        prefix: How many of timm's positions belong to the class and distillation tokens; see
            `infer_config.prefix_positions`.
    """
    if any(name.startswith("Transformer/encoderblock_") for name in shapes):
        name = "google-research layout (vision_transformer)"
        return Layout(name, _google, plain=True, prefixes=_GOOGLE_PREFIXES, preprocessing=_GOOGLE_PICTURES)
    if not any(name.startswith("blocks.0.") for name in shapes):
        return None
    if any(name.startswith(("tsm.", "rtsm.")) for name in shapes):
        return ORIGINAL
    if len(shapes.get("patch_embed.conv1.weight", ())) == 4:
        seven = shapes["patch_embed.conv1.weight"][-1] == 7
        return Layout("token-labelling layout (LV-ViT)", _same) if seven else ORIGINAL
    if "aux_head.weight" in shapes or "dist_pos_embed" in shapes:
        return ORIGINAL
    return Layout("timm layout (ViT, DeiT)", _timm(shapes, prefix), plain=True)


def _timm(shapes: Shapes, prefix: int) -> Callable[[str], Source]:
    """Returns timm's sources: the original's names, except for layer scale in DeiT's checkpoints and for positions."""
    distilled = "dist_token" in shapes

    def positions(x: np.ndarray) -> np.ndarray:
        if prefix == 0:
            return np.concatenate([np.zeros_like(x[:, :1]), x], axis=1)
        return np.delete(x, 1, axis=1) if prefix == 2 else x

    def distillation_position(x: np.ndarray) -> np.ndarray:
        return x[:, 1:2] if prefix == 2 else np.zeros_like(x[:, :1])

    def source(key: str) -> Source:
        scale = re.fullmatch(r"(blocks\.\d+)\.ls([12])\.gamma", key)
        if scale and key not in shapes:
            return Source((f"{scale[1]}.gamma_{scale[2]}",), _identity)
        if key == "pos_embed" and (distilled or prefix == 0):
            return Source((key,), positions)
        if key == "dist_pos_embed":
            return Source(("pos_embed",), distillation_position)
        return Source((key,), _identity)

    return source


def _kernel(x: np.ndarray) -> np.ndarray:
    return x.T


def _heads_kernel(*parts: np.ndarray) -> np.ndarray:
    """Combines kernels (dim, heads, width) of query, key and value -> (3 x heads x width, dim)."""
    return np.concatenate([part.reshape(part.shape[0], -1).T for part in parts])


def _heads_bias(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate([part.reshape(-1) for part in parts])


def _out_kernel(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1]).T


def _stem_kernel(x: np.ndarray) -> np.ndarray:
    return x.transpose(3, 2, 0, 1)


_GOOGLE = {
    "cls_token": Source(("cls",), _identity),
    "pos_embed": Source(("Transformer/posembed_input/pos_embedding",), _identity),
    "patch_embed.proj.weight": Source(("embedding/kernel",), _stem_kernel),
    "patch_embed.proj.bias": Source(("embedding/bias",), _identity),
    "norm.weight": Source(("Transformer/encoder_norm/scale",), _identity),
    "norm.bias": Source(("Transformer/encoder_norm/bias",), _identity),
    "head.weight": Source(("head/kernel",), _kernel),
    "head.bias": Source(("head/bias",), _identity),
}
_QKV = ("query", "key", "value")
_GOOGLE_BLOCK = {
    "norm1.weight": Source(("LayerNorm_0/scale",), _identity),
    "norm1.bias": Source(("LayerNorm_0/bias",), _identity),
    "attn.qkv.weight": Source(tuple(f"MultiHeadDotProductAttention_1/{x}/kernel" for x in _QKV), _heads_kernel),
    "attn.qkv.bias": Source(tuple(f"MultiHeadDotProductAttention_1/{x}/bias" for x in _QKV), _heads_bias),
    "attn.proj.weight": Source(("MultiHeadDotProductAttention_1/out/kernel",), _out_kernel),
    "attn.proj.bias": Source(("MultiHeadDotProductAttention_1/out/bias",), _identity),
    "norm2.weight": Source(("LayerNorm_2/scale",), _identity),
    "norm2.bias": Source(("LayerNorm_2/bias",), _identity),
    "mlp.fc1.weight": Source(("MlpBlock_3/Dense_0/kernel",), _kernel),
    "mlp.fc1.bias": Source(("MlpBlock_3/Dense_0/bias",), _identity),
    "mlp.fc2.weight": Source(("MlpBlock_3/Dense_1/kernel",), _kernel),
    "mlp.fc2.bias": Source(("MlpBlock_3/Dense_1/bias",), _identity),
}


def _google(key: str) -> Source:
    if key in _GOOGLE:
        return _GOOGLE[key]
    _, block, rest = key.split(".", 2)
    names, combine = _GOOGLE_BLOCK[rest]
    return Source(tuple(f"Transformer/encoderblock_{block}/{name}" for name in names), combine)
