"""Weight layouts: maps the tensors of a file to each tensor of the original's layout."""

import functools
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
_BIG_VISION_PREFIXES = (*_GOOGLE_PREFIXES, "pos_embedding", "MAPHead_0/")
# Evaluation as in vit_jax/input_pipeline.py of google-research: the whole image is stretched, pixels are in [-1, 1].
_GOOGLE_PREPROCESSING: JsonObject = {
    **{"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    **{"interpolation": "bilinear", "crop_fraction": 1.0, "resize": "stretch"},
}


class Layout(NamedTuple):
    """Names and layouts of a model's weights.

    `source` maps keys of the original's layout to their sources. If `plain`, the blocks are those of plain ViTs, with
    residual scale 1 and LayerNorm epsilon 1e-6. `prefixes` are the possible first parts of tensor names; empty if any
    name is possible. `preprocessing` is that of all its models; None if it differs between models. `class_position`
    says whether the class token has a position (None if it differs), `fields` has defaults of architecture fields.
    """

    name: str
    source: Callable[[str], Source]
    plain: bool = False
    prefixes: tuple[str, ...] = ()
    preprocessing: JsonObject | None = None
    class_position: bool | None = None
    fields: Mapping[str, object] = {}

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
    for tower in (prefix for prefix in ("visual.", "") if f"{prefix}transformer.resblocks.0.ln_1.weight" in shapes):
        return Layout("OpenCLIP layout", functools.partial(_open_clip, tower), plain=True)
    if any(name.startswith("Transformer/encoderblock") for name in shapes):
        big_vision = "pos_embedding" in shapes
        return Layout(
            f"google-research layout ({'big_vision' if big_vision else 'vision_transformer'})",
            functools.partial(_google, shapes),
            plain=True,
            prefixes=_BIG_VISION_PREFIXES if big_vision else _GOOGLE_PREFIXES,
            preprocessing=_GOOGLE_PREPROCESSING,
            class_position=not big_vision,
            fields={"activation": "gelu_tanh"} if big_vision else {},
        )
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


_OPEN_CLIP = {
    **{"patch_embed.proj": "conv1", "norm_pre": "ln_pre", "norm": "ln_post"},
    **{"norm1": "ln_1", "norm2": "ln_2", "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"},
}


def _open_clip(prefix: str, key: str) -> Source:
    """Returns the source of a tensor in the vision tower of OpenCLIP's and OpenAI's CLIP models."""
    if key.startswith(("tsm.", "reducer.")):
        return Source((key,))
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
    first, rest = (f"{prefix}transformer.resblocks.{block[1]}.", block[2]) if block else (prefix, key)
    if key in ("cls_token", "pos_embed"):
        name = prefix + ("class_embedding" if key == "cls_token" else "positional_embedding")
        return Source((name,), lambda x: x.reshape(1, -1, x.shape[-1]))
    if key == "projection.weight":
        return Source((f"{prefix}proj",), np.transpose)
    if rest.startswith("attn.qkv."):
        return Source((f"{first}attn.in_proj_{rest.removeprefix('attn.qkv.')}",))
    stem, _, suffix = rest.rpartition(".")
    return Source((f"{first}{_OPEN_CLIP.get(stem, stem)}.{suffix}",))


# Other names of tensors of timm's layout: of DeiT, and of the original DINOv2 and DINOv3.
_TIMM_ALTERNATIVES = (
    (r"(blocks\.\d+)\.ls([12])\.gamma", r"\1.gamma_\2"),
    (r"reg_token", "register_tokens"),
    (r"reg_token", "storage_tokens"),
    (r"(blocks\.\d+\.mlp)\.fc1\.(.*)", r"\1.w12.\2"),
    (r"(blocks\.\d+\.mlp)\.fc2\.(.*)", r"\1.w3.\2"),
    (r"norm\.(.*)", r"fc_norm.\1"),
)


def _timm(shapes: Shapes, prefix: int) -> Callable[[str], Source]:
    """Returns timm's sources: the original's names, or the alternative that is there; and those of the positions."""
    class_token, masked = "cls_token" in shapes, any(name.endswith("qkv.bias_mask") for name in shapes)

    def positions(x: np.ndarray) -> np.ndarray:
        return np.delete(x, 1, axis=1) if prefix == 2 else np.concatenate([np.zeros_like(x[:, :1]), x], axis=1)

    def source(key: str) -> Source:
        if key == "pos_embed" and prefix != 1 and class_token:
            return Source((key,), positions)
        if key == "dist_pos_embed":
            return Source(("pos_embed",), lambda x: x[:, 1:2] if prefix == 2 else np.zeros_like(x[:, :1]))
        if bias := masked and re.fullmatch(r"(blocks\.\d+\.attn)\.(qkv\.bias|[qv]_bias)", key):
            if bias[2] == "qkv.bias":
                return Source((f"{bias[1]}.no_key_bias",))
            part = 0 if bias[2] == "q_bias" else 2
            return Source((f"{bias[1]}.qkv.bias",), lambda x: np.split(x, 3)[part])
        if key not in shapes:
            for pattern, other in _TIMM_ALTERNATIVES:
                name = re.sub(f"^{pattern}$", other, key)
                if name in shapes:
                    return Source((name,))
        return Source((key,))

    return source


def _linear(key: str, name: str, kernel: Callable[..., np.ndarray] = np.transpose) -> dict[str, Source]:
    return {f"{key}.weight": Source((f"{name}/kernel",), kernel), f"{key}.bias": Source((f"{name}/bias",))}


def _norm(key: str, name: str) -> dict[str, Source]:
    return {f"{key}.weight": Source((f"{name}/scale",)), f"{key}.bias": Source((f"{name}/bias",))}


def _mlp(key: str, name: str) -> dict[str, Source]:
    return {**_linear(f"{key}.fc1", f"{name}/Dense_0"), **_linear(f"{key}.fc2", f"{name}/Dense_1")}


def _to_heads(key: str, *names: str) -> dict[str, Source]:
    """Returns the sources of one projection from Flax's, with kernels (dim, heads, width) and biases (heads, width)."""

    def kernel(*parts: np.ndarray) -> np.ndarray:
        return np.concatenate([part.reshape(part.shape[0], -1).T for part in parts])

    def bias(*parts: np.ndarray) -> np.ndarray:
        return np.concatenate(parts, axis=None)

    kernels, biases = (tuple(f"{name}/{part}" for name in names) for part in ("kernel", "bias"))
    return {f"{key}.weight": Source(kernels, kernel), f"{key}.bias": Source(biases, bias)}


def _from_heads(key: str, name: str) -> dict[str, Source]:
    return _linear(key, name, lambda x: x.reshape(-1, x.shape[-1]).T)


def _google_block(attention: str, norm: str, mlp: str) -> dict[str, Source]:
    """Returns the sources of a block; Flax numbers its modules by class, or as in `vision_transformer` all together."""
    return {
        **_norm("norm1", "LayerNorm_0"),
        **_to_heads("attn.qkv", *(f"{attention}/{x}" for x in ("query", "key", "value"))),
        **_from_heads("attn.proj", f"{attention}/out"),
        **_norm("norm2", norm),
        **_mlp("mlp", mlp),
    }


_GOOGLE = {
    "cls_token": Source(("cls",)),
    "pos_embed": Source(("Transformer/posembed_input/pos_embedding",)),
    **_linear("patch_embed.proj", "embedding", lambda x: x.transpose(3, 2, 0, 1)),
    **_norm("norm", "Transformer/encoder_norm"),
    **_linear("head", "head"),
}
_GOOGLE_BLOCK = _google_block("MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
_ATTENTION = "MultiHeadDotProductAttention_0"
_BIG_VISION_BLOCK = _google_block(_ATTENTION, "LayerNorm_1", "MlpBlock_0")
_BIG_VISION_POOL = {
    "attn_pool.latent": Source(("MAPHead_0/probe",)),
    **_to_heads("attn_pool.q", f"MAPHead_0/{_ATTENTION}/query"),
    **_to_heads("attn_pool.kv", *(f"MAPHead_0/{_ATTENTION}/{x}" for x in ("key", "value"))),
    **_from_heads("attn_pool.proj", f"MAPHead_0/{_ATTENTION}/out"),
    **_norm("attn_pool.norm", "MAPHead_0/LayerNorm_0"),
    **_mlp("attn_pool.mlp", "MAPHead_0/MlpBlock_0"),
}
# Blocks that `nn.scan` runs: one tensor holds a parameter of all of them, along its first axis.
SCANNED = "Transformer/encoderblock/"


def _google(shapes: Shapes, key: str) -> Source:
    """Returns the source of a tensor; its own name, which no file of this layout has, if the layout lacks it."""
    big_vision = "pos_embedding" in shapes
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
    block = (_BIG_VISION_BLOCK if big_vision else _GOOGLE_BLOCK).get(match[2]) if match else None
    if match and block:
        index = int(match[1])
        if any(name.startswith(SCANNED) for name in shapes):
            names = tuple(SCANNED + name for name in block.names)
            return Source(names, lambda *parts: block.combine(*(part[index] for part in parts)))
        return Source(tuple(f"Transformer/encoderblock_{index}/{name}" for name in block.names), block.combine)
    if big_vision and key == "pos_embed":
        # The class token is concatenated after the positions are added.
        missing = int("cls" in shapes)
        return Source(("pos_embedding",), lambda x: np.pad(x, ((0, 0), (missing, 0), (0, 0))))
    return {**_GOOGLE, **(_BIG_VISION_POOL if big_vision else {})}.get(key, Source((key,)))
