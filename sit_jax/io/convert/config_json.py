"""Reads the `config.json` of a file of weights, in the format of sit_jax, timm, Hugging Face, a run, or bare fields.

Every key is either used, rejected, or reported to the caller as unused.
"""

import dataclasses
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from sit_jax.config import JsonObject
from sit_jax.errors import ConfigError
from sit_jax.io.convert import hugging_face
from sit_jax.io.convert.tensors import FileError
from sit_jax.io.metadata import IMAGENET
from sit_jax.io.model_folder import FORMAT, read_description
from sit_jax.io.runs import read_object
from sit_jax.models.architecture import Architecture

_LARGEST = 2**24
_FIELDS = {field.name for field in dataclasses.fields(Architecture)} - {"family"}


class Description(NamedTuple):
    """The contents of a `config.json`; `metadata` as in `sit_jax.io.model.Model`.

    `class_position` says whether the class token has a position embedding (None if not specified), `heads` maps widths
    to attention heads if a model is named by its size. If `is_own`, it is of sit_jax, and thus complete.
    `hugging_face` are all values of a file of transformers, whose architecture `sit_jax.io.convert.hugging_face` reads.
    """

    fields: Mapping[str, Any] = {}
    class_position: bool | None = None
    heads: Mapping[int, int] = {}
    metadata: Mapping[str, Any] = {}
    is_own: bool = False
    unused: tuple[str, ...] = ()
    hugging_face: JsonObject | None = None


def read_config_json(path: pathlib.Path) -> Description:
    """Reads a `config.json`; returns an empty description if there is none.

    Raises a UserError if the file is damaged or the model is not supported; the message names the key.
    """
    if not path.is_file():
        return Description()
    if path.stat().st_size > _LARGEST:
        raise FileError(f"{path}: is too large for a description of a model")
    try:
        return _describe(read_object(path), path)
    except ConfigError as error:
        raise ConfigError(str(path), str(error)) from None


def _describe(values: JsonObject, path: pathlib.Path) -> Description:
    if values.get("format") == FORMAT:
        arch, metadata = read_description(values, path)
        return Description({key: getattr(arch, key) for key in _FIELDS}, metadata=metadata, is_own=True)
    if isinstance(values.get("model"), Mapping):  # Of a run.
        data = values["data"] if isinstance(values.get("data"), Mapping) else {}
        preprocessing = {key: data[key] for key in IMAGENET if key in data}
        metadata = {"preprocessing": preprocessing} if preprocessing else {}
        return _bare(values["model"], _COMPUTATION)._replace(metadata=metadata)
    if "model_type" in values and not isinstance(values.get("architecture"), str):
        return _hugging_face(values, path)
    if isinstance(values.get("architecture"), Mapping):
        others = {key: value for key, value in values.items() if key != "architecture"}
        return _bare({**others, **values["architecture"]})
    return _timm(values)


def _bare(section: JsonObject, harmless: Collection[str] = ()) -> Description:
    if section.get("family", "vit") != "vit":
        raise ConfigError("family", f"{section['family']!r} is not a vision transformer")
    unused = set(section) - _FIELDS - {"family", *harmless}
    return Description({key: value for key, value in section.items() if key in _FIELDS}, unused=_sorted(unused))


def _sorted(keys: Collection[str]) -> tuple[str, ...]:
    return tuple(sorted(key[:50] for key in keys))


def _check_supported(key: str, value: object, supported: Collection[object]) -> None:
    """Raises a ConfigError if a value is not one of the supported ones."""
    if value not in supported:
        hint = f"; only {' or '.join(map(repr, supported))} is" if supported else ""
        raise ConfigError(key, f"{str(value)[:50]!r} is not supported{hint}")


# Keys of a run's model section that concern training and computation.
_COMPUTATION = ("name", "drop_path", "dtype", "remat", "scan")

# timm's arguments that correspond to fields here.
_TIMM_FIELDS = {
    **{name: name for name in ("patch_size", "num_classes", "depth", "num_heads", "mlp_ratio", "qkv_bias")},
    **{"in_chans": "in_channels", "num_features": "dim", "embed_dim": "dim", "img_size": "image_size"},
    **{"class_token": "class_token", "reg_tokens": "registers", "pre_norm": "pre_norm", "act_layer": "activation"},
}
# timm's arguments that change what a model computes, with the supported values. None is always the default.
_TIMM_SUPPORTED: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("final_norm", "proj_bias"), (True,)),
    **dict.fromkeys(("qk_norm", "scale_attn_norm", "scale_mlp_norm"), (False,)),
    "global_pool": ("token", "avg", "map", ""),
    "fc_norm": (True, False),
    "pos_embed": ("learn",),
    "norm_layer": ("layernorm",),
}
# timm's arguments that have no effect on a trained model at its own resolution.
_TIMM_HARMLESS = {
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
    *("weight_init", "fix_init", "dynamic_img_size", "dynamic_img_pad", "strict_img_size"),
    *("init_values", "no_embed_class"),
}
# timm's keys that are read, or that describe the origin of the weights and other experiments.
_TIMM_KEYS = {
    *("architecture", "architectures", "model_type", "model_args", "pretrained_cfg", "torch_dtype", "dtype"),
    *("transformers_version", "initializer_range", "do_pooling", "problem_type"),
    *("label_names", "label_descriptions", "global_pool", "num_features", "num_classes", "input_size"),
    *("url", "file", "hf_hub_id", "hf_hub_filename", "sha256", "state_dict", "source", "tag", "custom_load"),
    *("origin_url", "paper_name", "paper_ids", "notes", "license", "pool_size", "first_conv", "classifier"),
    *("fixed_input_size", "min_input_size", "test_input_size", "test_crop_pct"),
    *("mean", "std", "interpolation", "crop_pct", "crop_mode"),
}
# The sizes in timm's names: width and heads.
_TIMM_SIZES = {
    **{"tiny": {192: 3}, "small": {384: 6}, "medium": {512: 8}, "base": {768: 12}},
    **{"large": {1024: 16}, "huge": {1280: 16}, "giant": {1408: 16}, "gigantic": {1664: 16}},
}
_TIMM_NAME = re.compile(r"(vit|deit3?|flexivit)_([a-z0-9]+)(_|$)")
# Parts of the names of models that are not plain ViTs, although their tensors may have the same names: rotary and
# relative positions, hybrids with convolutions, other blocks.
_TIMM_OTHERS = re.compile(r"rope|relpos|_r\d+_|resnet|_mci|pwee|dwee|_pe_|_pd_|_rpn|_parallel|_xp|_srelpos|_lambda")
# timm's SigLIPs with the activation that they were trained with; the others have exact GELU there.
_TIMM_TANH = re.compile(r"patch32_siglip|large_patch16_siglip_(gap_)?512|so400m_patch16|giantopt")
# Models whose class position their names do not determine.
_TIMM_OPEN = re.compile(r"reg\d|gap|dinov3")


def _timm(values: JsonObject) -> Description:
    """Describes timm's format, with `pretrained_cfg` or with all keys at the top level; or bare fields."""
    images = _section(values, "pretrained_cfg") if "pretrained_cfg" in values else values
    args: JsonObject = {key: values[key] for key in ("num_classes", "num_features", "global_pool") if key in values}
    args = {key: value for key, value in (args | _section(values, "model_args")).items() if value is not None}
    for key, value in args.items():
        if key not in _TIMM_FIELDS and key not in _TIMM_HARMLESS:
            _check_supported(key, value, _TIMM_SUPPORTED.get(key, ()))
    fields = {**_input_size(images, "img_size" in args), **_translate(values, {key: key for key in _FIELDS})}
    fields |= _translate(args, _TIMM_FIELDS)
    if args.get("global_pool") in ("token", "avg", "map"):
        fields["pool"] = args["global_pool"]
    if "activation" in fields:
        _check_supported("act_layer", fields["activation"], ("gelu", "gelu_tanh", "quick_gelu"))
    if "init_values" in args:
        fields["layer_scale"] = bool(args["init_values"])
    class_position, heads, by_name = _named(values.get("architecture"))
    fields = {**by_name, **fields}
    if "no_embed_class" in args:
        class_position = not args["no_embed_class"]
    unused = _sorted({*values, *images} - _TIMM_KEYS - _FIELDS)
    return Description(fields, class_position, heads, _timm_metadata(values, images), unused=unused)


def _section(values: JsonObject, key: str) -> JsonObject:
    section = values.get(key) or {}
    if not isinstance(section, dict):
        raise ConfigError(key, f"must be an object, got {str(section)[:50]!r}")
    return section


def _input_size(images: JsonObject, channels_only: bool) -> JsonObject:
    """Returns the channels, and the image size unless the model's own argument gives it, of `pretrained_cfg`."""
    size = images.get("input_size")
    if size is None:
        return {}
    if not isinstance(size, list) or len(size) != 3:
        raise ConfigError("input_size", f"must be channels, height and width, got {str(size)[:50]!r}")
    return {"in_channels": size[0], **({} if channels_only else {"image_size": _side("input_size", size[1:])})}


def _translate(values: JsonObject, names: Mapping[str, str]) -> JsonObject:
    """Returns the fields of an architecture that another program's names are for; null is not given."""
    fields = {ours: values[key] for key, ours in names.items() if values.get(key) is not None}
    return {key: _side(key, x) if key in ("image_size", "patch_size") else x for key, x in fields.items()}


def _side(key: str, value: object) -> int:
    """Returns the side of a square, given once or twice."""
    match value if isinstance(value, list) else [value, value]:
        case [int(height), int(width)] if height == width > 0:
            return height
        case [int(height), int(width)] if height > 0 and width > 0:
            raise ConfigError(key, f"{height}x{width} is not supported; only squares are")
    raise ConfigError(key, f"must be one or two whole numbers above 0, got {str(value)[:50]!r}")


def _named(name: object) -> tuple[bool | None, Mapping[int, int], JsonObject]:
    """Returns what the name of a timm model determines: whether the class token has a position, the heads, fields.

    Raises a ConfigError for the name of another architecture.
    """
    if not isinstance(name, str):
        return None, {}, {}
    match = _TIMM_NAME.match(name)
    if match is None or _TIMM_OTHERS.search(name):
        raise ConfigError("architecture", f"{name[:100]!r} is not supported; only plain ViTs are")
    fields: JsonObject = {}
    if "clip" in name:
        fields["activation"] = "quick_gelu" if "quickgelu" in name else "gelu"
    if "siglip" in name:
        fields["activation"] = "gelu_tanh" if _TIMM_TANH.search(name) else "gelu"
    if "dinov3" in name:
        fields |= {"positions": "rope", "pool": "avg"}  # The default of timm, and not of DINOv3.
    class_position = None if _TIMM_OPEN.search(name) else match[1] in ("vit", "deit")
    return class_position, _TIMM_SIZES.get(match[2], {}), fields


def _timm_metadata(values: JsonObject, images: JsonObject) -> JsonObject:
    metadata: JsonObject = {}
    names = {"mean": "mean", "std": "std", "interpolation": "interpolation", "crop_fraction": "crop_pct"}
    preprocessing = {ours: images[key] for ours, key in names.items() if images.get(key) is not None}
    if preprocessing or images.get("crop_mode") is not None:
        metadata["preprocessing"] = {**preprocessing, "resize": _resize(images)}
    if isinstance(values.get("architecture"), str):
        metadata["provenance"] = {"timm": values["architecture"]}
    if isinstance(images.get("license"), str):
        metadata["licence"] = images["license"]
    labels, texts = (values.get(key, images.get(key)) for key in ("label_names", "label_descriptions"))
    if labels is not None:
        texts = texts if isinstance(texts, dict) else {}
        metadata["class_names"] = [texts.get(label, label) for label in map(str, _listed("label_names", labels))]
    return metadata


def _listed(key: str, names: object) -> list[object]:
    """Returns class names, given as a list or as an object with their indices as keys."""
    if isinstance(names, dict) and set(names) == set(map(str, range(len(names)))):
        return [names[str(index)] for index in range(len(names))]
    if not isinstance(names, list):
        raise ConfigError(key, "must be a list of names, or an object with the keys 0, 1, 2 and so on")
    return names


def _resize(images: JsonObject) -> str:
    """Returns the resize mode; timm squashes images before its crop, so without a crop it stretches them."""
    mode, crop = images.get("crop_mode") or "center", images.get("crop_pct")
    _check_supported("crop_mode", mode, ("center", "squash"))
    if mode == "squash" and crop not in (None, 1):
        raise ConfigError("crop_mode", f"'squash' is supported without a crop only, but crop_pct is {str(crop)[:50]!r}")
    return "stretch" if mode == "squash" else "crop"


def _hugging_face(values: JsonObject, path: pathlib.Path) -> Description:
    hugging_face.check_model_type(values)
    metadata: JsonObject = {}
    fields = hugging_face.describe(values)
    if values.get("id2label") is not None:
        metadata["class_names"] = _listed("id2label", values["id2label"])
        fields["num_classes"] = len(metadata["class_names"])
    images = path.with_name(hugging_face.PREPROCESSOR)
    if images.is_file():
        metadata["preprocessing"] = hugging_face.read_preprocessor(read_object(images), images)
    return Description(fields, metadata=metadata, hugging_face=values)
