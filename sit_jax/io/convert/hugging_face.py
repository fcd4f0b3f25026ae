"""Vision transformers of Hugging Face's transformers: the meaning of their `config.json`, and their tensors' names."""

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sit_jax.config import JsonObject
from sit_jax.errors import ConfigError, UserError
from sit_jax.io.convert.infer_config import hidden_ratio, sides
from sit_jax.io.convert.layouts import Layout, Shapes, Source
from sit_jax.models.architecture import Architecture, architecture_from_dict


class _Family(NamedTuple):
    """Models of one kind.

    Attributes:
        names: Names of the original's layout -> names here, both with or without the suffixes `weight` and `bias`.
            `a + b` is a concatenation, `a | b` whichever is there. A `/` begins a name outside of the backbone.
        blocks: The part of the names of a block before its number, or `a | b`.
        block: The same as `names` for the tensors of a block, without their first part.
        anchor: The tensor that tells the prefix of the backbone's names.
        defaults: Values of the keys that a `config.json` may lack.
        fields: Architecture fields of all models.
    """

    names: Mapping[str, str]
    blocks: str
    block: Mapping[str, str]
    anchor: str
    defaults: JsonObject
    fields: JsonObject


_SIZES: JsonObject = {
    **{"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "patch_size": 16},
    **{"num_channels": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True},
}
_VIT = _Family(
    names={
        "cls_token": "embeddings.cls_token",
        "dist_token": "embeddings.distillation_token",
        "reg_token": "embeddings.register_tokens",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection | embeddings.patch_embeddings",
        "norm": "layernorm | norm",
        "head": "/classifier | /cls_classifier",
        "head_dist": "/distillation_classifier",
    },
    blocks="encoder.layer. | layers.",
    block={
        "norm1": "layernorm_before | norm1",
        "norm2": "layernorm_after | norm2",
        "attn.qkv": "attention.attention.query + attention.attention.key + attention.attention.value"
        " | attention.q_proj + attention.k_proj + attention.v_proj",
        "attn.proj": "attention.output.dense | attention.o_proj",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
        "mlp.fc1": "intermediate.dense | mlp.fc1 | mlp.weights_in",
        "mlp.fc2": "output.dense | mlp.fc2 | mlp.weights_out",
    },
    anchor="embeddings.patch_embeddings.projection.weight",
    defaults={**_SIZES, "layer_norm_eps": 1e-12},
    fields={},
)
_DINOV2 = _VIT._replace(defaults={**_SIZES, "patch_size": 14}, fields={"layer_scale": True})
_DINOV3 = _VIT._replace(
    blocks="layer.",
    block={
        **_VIT.block,
        "attn.q_bias": "attention.q_proj.bias",
        "attn.v_bias": "attention.v_proj.bias",
        "mlp.fc1": "mlp.gate_proj + mlp.up_proj | mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
    },
    anchor="embeddings.patch_embeddings.weight",
    defaults={
        **_SIZES,
        **{"hidden_size": 384, "num_attention_heads": 6, "layer_norm_eps": 1e-5, "rope_theta": 100.0},
        "key_bias": False,
    },
    fields={"layer_scale": True, "positions": "rope"},
)
_CLIP = _Family(
    names={
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding.weight",
        "patch_embed.proj": "embeddings.patch_embedding",
        "norm_pre": "pre_layrnorm",
        "norm": "post_layernorm",
        "projection": "/visual_projection",
        "attn_pool.latent": "head.probe",
        "attn_pool.proj": "head.attention.out_proj",
        "attn_pool.norm": "head.layernorm",
        "attn_pool.mlp.fc1": "head.mlp.fc1",
        "attn_pool.mlp.fc2": "head.mlp.fc2",
    },
    blocks="encoder.layers.",
    block={
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "attn.qkv": "self_attn.q_proj + self_attn.k_proj + self_attn.v_proj",
        "attn.proj": "self_attn.out_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
    anchor="embeddings.patch_embedding.weight",
    defaults={**_SIZES, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    fields={"pre_norm": True, "patch_bias": False},
)
_SIGLIP = _CLIP._replace(defaults={**_SIZES, "hidden_act": "gelu_pytorch_tanh"}, fields={"class_token": False})
FAMILIES: dict[str, _Family] = {
    **dict.fromkeys(("vit", "deit", "vit_mae", "vit_msn"), _VIT),
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2._replace(defaults=_SIZES),
    **dict.fromkeys(("clip", "clip_vision_model"), _CLIP),
    **dict.fromkeys(("siglip", "siglip_vision_model"), _SIGLIP),
    "dinov3_vit": _DINOV3,
}
_ACTIVATIONS = {
    **{"gelu": "gelu", "quick_gelu": "quick_gelu"},
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh"),
}
_FIELDS = {
    **{"hidden_size": "dim", "num_hidden_layers": "depth", "num_attention_heads": "num_heads"},
    **{"image_size": "image_size", "patch_size": "patch_size", "num_channels": "in_channels", "qkv_bias": "qkv_bias"},
    **{"layer_norm_eps": "norm_eps", "rope_theta": "rope_theta", "key_bias": "key_bias"},
}
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("layer_norm_eps", "rope_theta"), ((int, float), "a number")),
    **dict.fromkeys(("qkv_bias", "key_bias"), ((bool,), "true or false")),
}
PREPROCESSOR = "preprocessor_config.json"
# Pillow's numbers of filters.
_RESAMPLE = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
# Keys that change what the model computes, and must be true where they are given.
_ALWAYS = ("proj_bias", "mlp_bias", "query_bias", "value_bias")
# Tensors that the features do not need: the other tower, decoders, tokens of the pre-training, unused poolers.
_UNUSED = re.compile(
    r"text_(model|projection)\.|logit_(scale|bias)$|decoder\.|(.*\.)?(mask_token|position_ids|pooler\..*)$"
)


class Found(NamedTuple):
    """A model of transformers: its architecture, the layout of its tensors, and the names that it does not need."""

    arch: Architecture
    layout: Layout
    unused: tuple[str, ...]


def find(values: JsonObject, shapes: Shapes) -> Found:
    """Returns the model that a `config.json` and the tensors' shapes describe.

    Raises:
        ConfigError: A key has a value that is not supported.
        UserError: The tensors are not those of such a model.
    """
    check_model_type(values)
    kind = values["model_type"]
    family = FAMILIES[kind]
    inner = values.get("vision_config", {}) if kind in ("clip", "siglip") else values
    if not isinstance(inner, dict):
        raise ConfigError("vision_config", f"must be an object, got {str(inner)[:50]!r}")
    prefix = next((name.removesuffix(family.anchor) for name in shapes if name.endswith(family.anchor)), None)
    if prefix is None:
        raise UserError(f"is not of the type {kind}: there is no {family.anchor}")
    unused = tuple(name for name, shape in shapes.items() if _UNUSED.match(name) or 0 in shape)
    shapes = {name: shape for name, shape in shapes.items() if name not in unused}
    values = {**family.defaults, **{key: value for key, value in inner.items() if value is not None}}
    described = describe({**values, "model_type": kind})
    blocks = _blocks(family, prefix, shapes)
    if values["num_hidden_layers"] != len(blocks):
        problem = f"is {str(values['num_hidden_layers'])[:50]}, but the tensors are those of {len(blocks)} blocks"
        raise ConfigError("num_hidden_layers", problem)
    table = _table(family, prefix, blocks, shapes)
    layout = Layout(f"Hugging Face layout ({kind})", lambda key: table.get(key, Source((key,))))
    fields = _fields(values, {key: _shape(source, shapes) for key, source in table.items()})
    # The gate of DINOv3 has any activation, that of DINOv2 has SiLU whatever its configuration says.
    gated, silu = fields["mlp"] == "swiglu", values["hidden_act"] == "silu"
    if silu > gated or (family is _DINOV3 and gated > silu):
        raise ConfigError(
            "hidden_act", f"{values['hidden_act']!r} is not supported {'with' if gated else 'without'} a gate"
        )
    return Found(architecture_from_dict({**family.fields, **described, **fields}, "model."), layout, unused)


def describe(values: JsonObject) -> JsonObject:
    """Returns the architecture fields that the keys of a `config.json` determine alone.

    Raises:
        ConfigError: A key has a value that is not supported.
    """
    for key in _ALWAYS:
        if not values.get(key, True):
            raise ConfigError(key, f"{values[key]!r} is not supported; only True is")
    fields = {ours: _checked(key, values[key]) for key, ours in _FIELDS.items() if values.get(key) is not None}
    activation = values.get("hidden_act")
    if activation not in (None, "silu"):
        if not isinstance(activation, str) or activation not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise ConfigError("hidden_act", f"{str(activation)[:50]!r} is not supported; there are {known}")
        fields["activation"] = _ACTIVATIONS[activation]
    hidden, dim = values.get("intermediate_size"), values.get("hidden_size")
    if type(hidden) is int and type(dim) is int and dim > 0:
        fields["mlp_ratio"] = hidden_ratio(hidden, dim)
    return fields


def _checked(key: str, value: object) -> object:
    """Returns the value of a key that becomes a field; raises a ConfigError if it is of another type."""
    if key == "patch_size" and isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if key == "image_size":
        return sides(value, key)
    types, name = _TYPES.get(key, ((int,), "a whole number"))
    if type(value) not in types:
        raise ConfigError(key, f"must be {name}, got {str(value)[:50]!r}")
    return value


def is_known_layout(names: Collection[str]) -> bool:
    """Returns whether names of tensors are those of transformers; its folders may hold files of other layouts."""
    anchors = tuple({family.anchor for family in FAMILIES.values()})
    return any(name.endswith(anchors) for name in names)


def check_model_type(values: JsonObject) -> None:
    """Raises a ConfigError if the type of the model is not supported."""
    kind = values["model_type"]
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ConfigError("model_type", f"{str(kind)[:50]!r} is not supported; there are {', '.join(FAMILIES)}")


def read_preprocessor(values: JsonObject, where: object) -> JsonObject:
    """Returns the `preprocessing` metadata of a `preprocessor_config.json`.

    Raises:
        ConfigError: A value is not supported.
    """
    found: JsonObject = {
        ours: values[key] for key, ours in (("image_mean", "mean"), ("image_std", "std")) if values.get(key) is not None
    }
    if values.get("do_normalize") is False:
        found |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    resample, size, crop = values.get("resample"), values.get("size"), values.get("crop_size")
    if resample is not None:
        if resample not in _RESAMPLE:
            raise ConfigError(f"{where}: resample", f"{str(resample)[:50]!r} is not supported")
        found["interpolation"] = _RESAMPLE[resample]
    if values.get("do_center_crop"):
        shorter, side = (x.get("shortest_edge", x.get("height")) if isinstance(x, dict) else x for x in (size, crop))
        if not isinstance(shorter, int) or not isinstance(side, int) or not 0 < side <= shorter:
            raise ConfigError(f"{where}: crop_size", f"{str(crop)[:50]!r} of {str(size)[:50]!r} is not supported")
        found |= {"resize": "crop", "crop_fraction": side / shorter}
    else:
        found |= {"resize": "stretch", "crop_fraction": 1.0}
    return found


def _fields(values: JsonObject, shapes: Shapes) -> JsonObject:
    """Returns the architecture fields that the tensors tell; `shapes` are by the names of the original's layout."""
    dim, narrow, wide = values["hidden_size"], *(shapes.get(f"blocks.0.mlp.{x}") for x in ("fc2.weight", "fc1.bias"))
    if narrow is None or wide is None or len(narrow) != 2:
        raise UserError("there is no MLP in the first block")
    head = shapes.get("head.weight", (0,))
    fields: JsonObject = {
        "mlp": "plain" if wide[0] == narrow[1] else "swiglu",
        "mlp_ratio": hidden_ratio(narrow[1], dim),
        "registers": shapes.get("reg_token", (0, 0))[-2],
        "distillation_token": "dist_token" in shapes,
        "num_classes": head[0],
        "projection": shapes.get("projection.weight", (0,))[0],
    }
    if head[-1] == 2 * dim:
        fields["pool"] = "token_avg"
    elif "cls_token" not in shapes:
        fields["pool"] = "map" if "attn_pool.latent" in shapes else "avg"
    return fields


def _blocks(family: _Family, prefix: str, shapes: Shapes) -> list[str]:
    """Returns the first parts of the names of the blocks, in order."""
    # transformers 5 leaves the prefix out for some classes.
    starts = [start + blocks for start in (prefix, "") for blocks in family.blocks.split(" | ")]
    numbers = {
        start: {
            int(name.removeprefix(start).split(".")[0])
            for name in shapes
            if re.match(rf"{re.escape(start)}\d{{1,6}}\.", name)
        }
        for start in starts
    }
    start = max(starts, key=lambda start: len(numbers[start]))
    return [f"{start}{number}." for number in range(len(numbers[start]))]


def _table(family: _Family, prefix: str, blocks: Sequence[str], shapes: Shapes) -> dict[str, Source]:
    """Returns the sources of all tensors of the original's layout that are there."""
    templates = {key: (prefix, names) for key, names in family.names.items()}
    for index, first in enumerate(blocks):
        templates |= {f"blocks.{index}.{key}": (first, names) for key, names in family.block.items()}
    table: dict[str, Source] = {}
    for key, (first, text) in templates.items():
        for suffix, alternative in itertools.product(("", ".weight", ".bias"), text.split(" | ")):
            names = tuple(
                (name[1:] if name.startswith("/") else first + name) + suffix for name in alternative.split(" + ")
            )
            if all(name in shapes for name in names):
                table.setdefault(key + suffix, Source(names, _concatenate))
    for name in ("cls_token", "reg_token", "pos_embed"):
        if name in table:
            table[name] = Source(table[name].names, lambda x: x.reshape(1, -1, x.shape[-1]))
    if "dist_token" in table:
        names = table["pos_embed"].names
        table["pos_embed"] = Source(names, lambda x: np.delete(x, 1, axis=1))
        if "head.weight" in table and "head_dist.weight" not in table:
            # A token without a head is a register; registers have no position, so it is added here.
            names = (*table.pop("dist_token").names, *names)
            table["reg_token"] = Source(names, lambda token, x: token + x[:, 1:2])
        else:
            table["dist_pos_embed"] = Source(names, lambda x: x[:, 1:2])
    for suffix in ("weight", "bias"):  # torch's attention: query, key and value in one tensor.
        packed = f"{prefix}head.attention.in_proj_{suffix}"
        if packed in shapes:
            table[f"attn_pool.q.{suffix}"] = Source((packed,), lambda x: x[: len(x) // 3])
            table[f"attn_pool.kv.{suffix}"] = Source((packed,), lambda x: x[len(x) // 3 :])
    return table


def _shape(source: Source, shapes: Shapes) -> tuple[int, ...]:
    """Returns the shape of what a source concatenates."""
    first, *others = (shapes[name] for name in source.names)
    return (first[0] + sum(other[0] for other in others), *first[1:])


def _concatenate(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts) if len(parts) > 1 else parts[0]
