"""Configurations as `ml_collections.ConfigDict`s, as config files in `configs/` write them, and their validation."""

import dataclasses
import difflib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, config_dict
from pydantic import TypeAdapter, ValidationError

from sit_jax.config import (
    AugmentConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LogConfig,
    LossConfig,
    MeshConfig,
    MixConfig,
    ModelConfig,
    OptimConfig,
    TeacherConfig,
)
from sit_jax.errors import ConfigError
from sit_jax.models.architecture import Architecture
from sit_jax.models.regnet import RegNetArchitecture
from sit_jax.models.variants import get_architecture

_SECTIONS = {
    "data": DataConfig,
    "augment": AugmentConfig,
    "mix": MixConfig,
    "optim": OptimConfig,
    "loss": LossConfig,
    "mesh": MeshConfig,
    "checkpoint": CheckpointConfig,
    "log": LogConfig,
}


def named_model(name: str, **overrides: Any) -> ConfigDict:
    """Returns the `model` section of a ConfigDict for a named variant, with all fields, so that each can be overridden.

    Raises:
        ConfigError: The name or a field is unknown, or the combination is invalid.
    """
    compute = {
        key: overrides.pop(key) for key in ("drop_path", "dtype", "remat", "attention", "scan") if key in overrides
    }
    return model_section(get_architecture(name, **overrides), name=name, **compute)


def model_section(architecture: Architecture | RegNetArchitecture, **compute: Any) -> ConfigDict:
    """Returns the `model` section of a ConfigDict for an architecture."""
    fields = {field.name: field.default for field in dataclasses.fields(ModelConfig) if field.name != "architecture"}
    return ConfigDict({**fields, **dataclasses.asdict(architecture), **compute})


def defaults(section: type) -> ConfigDict:
    """Returns a ConfigDict with a section's defaults, for configs to modify."""
    values = {}
    for field in dataclasses.fields(section):
        if field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
    return ConfigDict(values)


def with_defaults(config: ConfigDict) -> ConfigDict:
    """Returns a configuration with all default values filled in, so that each can be overridden on the command line."""
    filled = ConfigDict(_rename_keys(config.to_dict()))
    for name, section in _SECTIONS.items():
        filled[name] = ConfigDict({**defaults(section).to_dict(), **filled.get(name, ConfigDict()).to_dict()})
    for name in ("teacher", "cnn_teacher"):
        teacher = filled.get(name)
        if teacher is not None:
            optim = {**defaults(OptimConfig).to_dict(), **teacher.get("optim", ConfigDict()).to_dict()}
            filled[name] = ConfigDict({**defaults(TeacherConfig).to_dict(), **teacher.to_dict(), "optim": optim})
    for key, value in defaults(Config).items():
        if key not in filled:
            filled[key] = value
    for holder in (filled, filled.get("teacher"), filled.get("cnn_teacher")):
        model = holder.get("model") if holder is not None else None
        if model is not None and model.get("keep_ratio", 0.0) is None:
            # ml_collections can override a None only if it knows the type.
            model["keep_ratio"] = config_dict.placeholder(float)
    return filled


def from_config_dict(config: ConfigDict | Mapping[str, Any], quiet: bool = False) -> Config:
    """Validates a ConfigDict and converts it to a frozen `Config`.

    Args:
        config: The values.
        quiet: Whether to omit messages about renamed keys, as in the config of an older run.

    Raises:
        ConfigError: A key is unknown, a value has the wrong type or is out of range, or values contradict each other;
            the message begins with the key.
    """
    values = _rename_keys(config.to_dict() if isinstance(config, ConfigDict) else config, quiet)
    for section in ("model", "teacher", "cnn_teacher"):
        holder = values if section == "model" else values.get(section)
        if isinstance(holder, dict) and isinstance(holder.get("model"), dict):
            holder["model"] = _split_model(holder["model"])
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        key, _, problem = _describe(error).partition(": ")
        raise ConfigError(key, problem) from None


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the configuration as JSON values, with architecture fields in the model sections.

    This is the inverse of `from_config_dict`.
    """
    values = _ADAPTER.dump_python(config, mode="json")
    for holder in (values, values["teacher"], values["cnn_teacher"]):
        if holder is not None:
            holder["model"].update(holder["model"].pop("architecture"))
    return values


_ADAPTER: TypeAdapter[Config] = TypeAdapter(Config)
# (section, key) of renamed keys -> new name.
_RENAMED = {
    ("optim", "faithful"): "decay_like_original",
    ("data", "on_broken"): "on_decode_error",
    ("data", "held_out"): "val_fraction",
}
# Keys that may be None.
_NULLABLE = ("keep_ratio", "teacher", "cnn_teacher")


def check_keys(known: Any, overrides: Sequence[str]) -> None:
    """Checks that the keys of `--config.KEY=VALUE` arguments exist, with clearer errors than those of ml_collections.

    Raises:
        ConfigError: A key does not exist; the message names it, and the closest key of its section.
    """
    for word in overrides:
        if not word.startswith("--config.") or "[" in word:
            continue
        key = word.removeprefix("--config.").partition("=")[0]
        section: Any = known
        for part in key.split("."):
            if section is None:
                missing = key[: key.index(f".{part}")]
                raise ConfigError(key, f"{missing} is None in this config; add a {missing} section to the file")
            if not isinstance(section, Mapping | ConfigDict) or part not in section:
                close = difflib.get_close_matches(part, list(section), n=1) if isinstance(section, ConfigDict) else []
                raise ConfigError(key, "there is no such key" + (f". Did you mean {close[0]}?" if close else ""))
            section = section[part]


def take_nones(known: ConfigDict, overrides: Sequence[str]) -> list[str]:
    """Sets the keys of `--config.KEY=None` arguments to None if None is a valid value; drops removed keys.

    ml_collections would read these values as text. The other arguments are returned, in order.
    """
    rest = []
    for word in overrides:
        key, equals, value = word.removeprefix("--config.").partition("=")
        key = _new_name(key)
        if key.endswith("model.scan"):
            _log_removed(key)
            continue
        *parents, last = key.split(".")
        section: Any = known
        for part in parents:
            section = section.get(part) if isinstance(section, ConfigDict) else None
        if value == "None" and last in _NULLABLE and isinstance(section, ConfigDict) and last in section:
            # A section cannot be assigned to an existing key, nor None to a number, so the key is deleted first.
            del section[last]
            section[last] = config_dict.placeholder(float) if last == "keep_ratio" else None
        else:
            rest.append(f"--config.{key}{equals}{value}")
    return rest


def _rename_keys(values: Mapping[str, Any], quiet: bool = False, section: str = "") -> dict[str, Any]:
    """Returns the values with renamed keys replaced by their new names."""
    same: dict[str, Any] = {}
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{section}.{key}".lstrip(".")
        new = _new_name(path, quiet).rpartition(".")[2]
        target = same if new == key else renamed
        target[new] = _rename_keys(value, quiet, path) if isinstance(value, Mapping) else value
    # A config file that sets an old key has the new one at its default.
    return same | renamed


def _new_name(key: str, quiet: bool = False) -> str:
    """Returns the current name of a key; prints a line on stderr if the key was renamed."""
    *parents, last = key.split(".")
    new = _RENAMED.get((parents[-1] if parents else "", last))
    if new is None:
        return key
    if not quiet:
        print(f"{key}: is now {new}", file=sys.stderr)
    return ".".join([*parents, new])


def _log_removed(key: str) -> None:
    print(f"{key}: has no effect any more; blocks are compiled one by one", file=sys.stderr)


def _split_model(section: dict[str, Any]) -> dict[str, Any]:
    own = {field.name for field in dataclasses.fields(ModelConfig)} - {"architecture"}
    if section.pop("scan", False):
        _log_removed("model.scan")
    split = {key: value for key, value in section.items() if key in own}
    shape = {key: value for key, value in section.items() if key not in own}
    split["architecture"] = {"family": "vit", **shape}
    return split


def _describe(error: ValidationError) -> str:
    """Returns all problems in one line: `optim.lrr: there is no such key; did you mean lr?`."""
    lines = []
    for problem in error.errors():
        parts = [str(p) for p in problem["loc"] if str(p) not in ("architecture", "vit", "regnet")]
        key = ".".join(parts)
        match problem["type"]:
            case "unexpected_keyword_argument":
                lines.append(f"{key}: there is no such key{_hint(parts)}")
            case "value_error":
                message = str(problem["ctx"]["error"])
                lines.append(f"{key}.{message}" if key else message)
            case _:
                lines.append(f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, is {problem['input']!r}")
    return "; ".join(dict.fromkeys(lines))


def _hint(parts: list[str]) -> str:
    models = (Config, ModelConfig, Architecture, OptimConfig, LossConfig, TeacherConfig)
    others = (DataConfig, AugmentConfig, MixConfig, MeshConfig, CheckpointConfig, LogConfig)
    names = {field.name for section in (*models, *others) for field in dataclasses.fields(section)}
    close = difflib.get_close_matches(parts[-1], names, n=1)
    return f"; did you mean {close[0]}?" if close else ""
