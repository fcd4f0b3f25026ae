"""Resolves hyperparameters that tensor shapes do not determine: heads, residual scale, epsilons, slimming positions."""

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, get_type_hints

from pydantic import TypeAdapter, ValidationError

from sit_jax.config import JsonObject
from sit_jax.errors import ConfigError, UserError
from sit_jax.io.convert.infer_config import Inferred
from sit_jax.models.architecture import Architecture, architecture_from_dict, patch_grid
from sit_jax.models.variants import VARIANTS

# Options for the fields that tensors do not determine; the tensors determine all other fields.
OPTIONS = (
    *("name", "num_heads", "residual_scale", "norm_eps", "stage_blocks", "keep_ratio", "image_size", "activation"),
    "pool",
)

# Fields that tensors do not determine, and their values in plain ViTs.
_OPEN = ("num_heads", "residual_scale", "norm_eps")
_PLAIN: JsonObject = {"residual_scale": 1.0, "norm_eps": 1e-6}
# Fields of a description or of the user that most models leave at their defaults.
_CHOICES = ("activation", "pool", "rope_theta", "registers", "class_token")
_TYPES = get_type_hints(Architecture)
_NUMBERS = ("mlp_ratio", "residual_scale", "norm_eps", "keep_ratio")

_LVVIT: JsonObject = {"stem": "conv7", "mlp_ratio": 3.0, "qkv_bias": False, "norm_eps": 1e-5, "aux_head": True}

# Published models without a configuration here, for the fields that their tensors do not determine.
_PUBLISHED: dict[str, Architecture] = {
    "lvvit_t (token labelling)": Architecture(**_LVVIT, dim=240, depth=12, num_heads=4),
    "lvvit_s (token labelling)": Architecture(**_LVVIT, dim=384, depth=16, num_heads=6, residual_scale=2.0),
    "lvvit_m (token labelling)": Architecture(**_LVVIT, dim=512, depth=20, num_heads=8, residual_scale=2.0),
    "lvvit_l (token labelling)": Architecture(
        **_LVVIT, stem_width=128, dim=768, depth=24, num_heads=12, residual_scale=3.0
    ),
    "deit3_medium": Architecture(dim=512, depth=12, num_heads=8, layer_scale=True),
    "vit_large": Architecture(dim=1024, depth=24, num_heads=16),
    "vit_huge": Architecture(dim=1280, depth=32, num_heads=16),
}

# Fields that must agree for a named model to match the file.
_SHAPE = ("stem", "stem_width", "dim", "depth", "mlp_ratio", "qkv_bias")


class Resolved(NamedTuple):
    """A complete architecture, and the name of the named model that it is, or an empty string."""

    arch: Architecture
    name: str


def resolve(inferred: Inferred, config: Mapping[str, Any], options: Mapping[str, Any]) -> Resolved:
    """Completes an architecture that was inferred from tensors.

    `config` has fields from a `config.json`; `options`, which take precedence, those given by the user, and `name`, a
    named model to take them from. Raises a ConfigError if a field contradicts the tensors or has an impossible value,
    and a UserError, which names the option to set, if one is still undetermined.
    """
    fields = dict(inferred.fields)
    unknown = sorted(set(options) - set(OPTIONS) - set(fields))
    if unknown:
        raise ConfigError(f"model.{unknown[0]}", f"is not an option here; there are {', '.join(OPTIONS)}")
    given = {key: value for key, value in {**config, **options}.items() if key != "name" and value is not None}
    _agree(given, inferred, options)
    given |= {key: float(given[key]) for key in _NUMBERS if key in given}  # The number 2 in JSON is an int.
    if "mlp_ratio" in given:
        fields["mlp_ratio"] = given["mlp_ratio"]
    if inferred.kept and "stage_blocks" not in fields and "stage_blocks" in given:
        fields["stage_blocks"] = tuple(given["stage_blocks"])
    named = _named(inferred, fields, options.get("name"))
    if inferred.kept and "stage_blocks" not in fields:
        fields["stage_blocks"] = _stages(named)
    stages = tuple(fields.get("stage_blocks", ()))
    name = next((name for name, arch in named.items() if arch.stage_blocks == stages), "")
    known = named.get(name) or next(iter(named.values()), None)
    fields |= {key: given[key] for key in _CHOICES if key in given and key not in fields}
    if inferred.layout.plain:
        clip_like = fields.get("pre_norm") or fields.get("positions") == "rope"
        fields = {**_PLAIN, **({"norm_eps": 1e-5} if clip_like else {}), **inferred.layout.fields, **fields}
    if "activation" not in fields and (fields["pre_norm"] or fields.get("pool") == "map"):
        raise UserError(
            "the tensors do not determine the activation: give --model.activation gelu, gelu_tanh or quick_gelu"
        )
    for key in _OPEN:
        if key in given:
            fields[key] = given[key]
        elif key not in fields and known is not None:
            fields[key] = getattr(known, key)
    missing = [key for key in _OPEN if key not in fields]
    if missing:
        words = " ".join(f"--model.{key} VALUE" for key in missing)
        names = " and ".join(missing)
        raise UserError(f"the tensors do not determine {names}, and no named model has this shape: give {words}")
    fields |= _kept(inferred, fields, given, known)
    if known is not None and any(fields[key] != getattr(known, key) for key in _OPEN):
        name = ""  # The shape matches, but it is another model.
    return Resolved(architecture_from_dict(fields, "model."), name)


def _agree(given: JsonObject, inferred: Inferred, options: Mapping[str, Any]) -> None:
    """Raises a ConfigError if a given field has an impossible value or contradicts the tensors."""
    for key, value in given.items():
        where = "" if key in options else " in config.json"
        if not _is_possible(key, value):
            raise ConfigError(f"model.{key}", f"{value!r}{where} is not a possible value")
        value = tuple(value) if isinstance(value, list) else value
        if key in inferred.fields and _differs(key, value, inferred.fields):
            problem = f"is given as {value!r}{where}, but the tensors are those of {inferred.fields[key]!r}"
            raise ConfigError(f"model.{key}", problem)
    if not inferred.kept and len(given.get("stage_blocks", ())) > 1:
        raise ConfigError("model.stage_blocks", "is given, but the tensors hold no slimming module")


def _differs(key: str, value: Any, fields: JsonObject) -> bool:
    """Returns whether a value differs from the tensors', which determine only the hidden width of `mlp_ratio`."""
    if key == "mlp_ratio":
        return int(fields["dim"] * value) != int(fields["dim"] * fields[key])
    return bool(value != fields[key])


def _is_possible(key: str, value: Any) -> bool:
    """Returns whether a field has its type, and numbers that are computed with are positive and finite."""
    value = tuple(value) if isinstance(value, list) else value
    try:
        TypeAdapter(_TYPES[key]).validate_python(value, strict=True)
    except ValidationError:
        return False
    if key in ("stage_blocks", "kept_tokens"):
        return all(count > 0 for count in value)
    return key not in ("num_heads", *_NUMBERS) or 0 < value < math.inf


def _named(inferred: Inferred, fields: JsonObject, name: str | None) -> dict[str, Architecture]:
    """Returns the candidate named models: the one that the user names, or those of the same shape."""

    def differing(arch: Architecture) -> list[str]:
        return [key for key in _SHAPE if key in fields and _differs(key, getattr(arch, key), fields)]

    if name is not None:
        if name not in VARIANTS:
            raise ConfigError("model.name", f"there is no model {name!r}; `sit models` lists them")
        wrong = [f"{key} {fields[key]} and not {getattr(VARIANTS[name], key)}" for key in differing(VARIANTS[name])]
        if wrong:
            raise ConfigError("model.name", f"the tensors are not those of {name}: they have {', '.join(wrong)}")
        return {name: VARIANTS[name]}
    same = {name: arch for name, arch in {**VARIANTS, **_PUBLISHED}.items() if not differing(arch)}
    count = {name: len(arch.stage_blocks) - 1 for name, arch in same.items() if arch.is_slimmed}
    slimmed = {
        name: same[name] for name in count if _counts(fields, same[name].keep_ratio, count[name]) == inferred.kept
    }
    return slimmed or {name: arch for name, arch in same.items() if not arch.is_slimmed}


def _patches(fields: JsonObject) -> int:
    return math.prod(patch_grid(fields["image_size"], fields["patch_size"]))


def _counts(fields: JsonObject, ratio: float | None, modules: int) -> tuple[int, ...]:
    """Returns the tokens that slimming modules with a keep ratio keep of this file's grid."""
    patches = _patches(fields)
    return tuple(int(patches * (ratio or 1.0) ** stage) for stage in range(1, modules + 1))


def _stages(named: Mapping[str, Architecture]) -> tuple[int, ...]:
    stages = {arch.stage_blocks: name for name, arch in named.items() if arch.is_slimmed}
    if len(stages) == 1:
        return next(iter(stages))
    choices = " or ".join(f"{','.join(map(str, blocks))} ({name})" for blocks, name in stages.items())
    raise UserError(
        "without reverse modules the tensors do not determine after which blocks the slimming modules are: "
        f"give --model.stage_blocks {choices or 'COUNT,COUNT,...'}"
    )


def _kept(inferred: Inferred, fields: JsonObject, given: JsonObject, known: Architecture | None) -> JsonObject:
    """Returns the kept tokens, as a ratio if a known one results in the counts of the tensors."""
    kept, ratio = inferred.kept, given.get("keep_ratio")
    if not kept:
        return {}
    explicit = (_patches(fields), *kept)
    if given.get("kept_tokens"):
        if tuple(given["kept_tokens"]) != explicit:
            raise ConfigError("model.kept_tokens", f"is {given['kept_tokens']}, but the tensors keep {kept}")
        return {"kept_tokens": explicit, "keep_ratio": ratio}
    for candidate in (ratio, known.keep_ratio if known else None):
        counts = _counts(fields, candidate, len(kept))
        if candidate is not None and counts == kept:
            return {"keep_ratio": candidate}
        if candidate is not None and candidate == ratio:
            raise ConfigError("model.keep_ratio", f"{ratio} keeps {counts} tokens, but the tensors keep {kept}")
    return {"kept_tokens": explicit}


def describe(inferred: Inferred, resolved: Resolved, said: Collection[str], configured: Collection[str] = ()) -> str:
    """Describes what was found, in one line.

    `said` are fields given by the user or a `config.json`, `configured` those taken from the model that is loaded.
    """
    arch = resolved.arch
    kind = "student" if arch.is_slimmed else "teacher" if arch.aux_head else "model"
    name = resolved.name or f"{arch.stem} stem, width {arch.dim}, depth {arch.depth}"
    extras = {"RTSMs": inferred.has_rtsm, "distillation head": arch.distillation_token}
    extras |= {"layer scale": arch.layer_scale, "no class position": not inferred.class_position}
    having = " and ".join(extra for extra, has in extras.items() if has)
    numbers = f"{arch.num_heads} heads, residual scale {arch.residual_scale:g}, norm epsilon {arch.norm_eps:g}"
    return (
        f"{inferred.layout.name}, {kind} {name}{f' with {having}' if having else ''}, {arch.num_classes} classes, "
        f"{arch.image_size_text} px, {numbers}{_guesses(inferred, arch, said, configured)}"
    )


def _guesses(inferred: Inferred, arch: Architecture, said: Collection[str], configured: Collection[str]) -> str:
    """Returns the end of a line that lists the fields given neither by the file nor by the user."""
    known = {*inferred.fields, *said, *(_PLAIN if inferred.layout.plain else ())}
    unsaid = [key for key in (*_OPEN, *(["stage_blocks"] if arch.is_slimmed else [])) if key not in known]
    if not unsaid or "name" in said:
        return ""
    if set(unsaid) <= set(configured):
        return f" (the file does not say {' and '.join(unsaid)}: as configured)"
    return f" (a guess from the shape: {' and '.join(unsaid)}; --model.{unsaid[0]} changes it)"


def likely_fields(inferred: Inferred, like: Architecture) -> JsonObject:
    """Returns fields that tensors do not determine, taken from the model that the weights are loaded into.

    Raises a UserError if the weights have another width, and thus another number of heads.
    """
    if inferred.fields["dim"] != like.dim:
        raise UserError(f"is of another model: dim is {inferred.fields['dim']} there and {like.dim} here")
    fields = {key: getattr(like, key) for key in (*_OPEN, "activation", "pool")}
    if inferred.kept and len(like.stage_blocks) == len(inferred.kept) + 1 and inferred.fields["depth"] == like.depth:
        fields["stage_blocks"] = like.stage_blocks
    return {key: value for key, value in fields.items() if key not in inferred.fields}
