"""Configurations as `ml_collections.ConfigDict`s, as config files in `configs/` write them, and their validation."""

import dataclasses
import itertools
import re
import sys
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict, config_dict
from pydantic import TypeAdapter, ValidationError

from sit_jax.config import Config, JsonObject, ModelConfig, TeacherConfig
from sit_jax.errors import ConfigError, did_you_mean, require
from sit_jax.models.architecture import Architecture
from sit_jax.models.regnet import RegNetArchitecture
from sit_jax.models.variants import get_architecture

_ADAPTER: TypeAdapter[Config] = TypeAdapter(Config)
# (section, key) of renamed keys -> new name.
_RENAMED = {
    ("optim", "faithful"): "decay_like_original",
    ("data", "on_broken"): "on_decode_error",
    ("data", "held_out"): "val_fraction",
}
# Sections that may be None.
_TEACHERS = ("teacher", "cnn_teacher")


def named_model(name: str, **overrides: object) -> ConfigDict:
    """Returns the `model` section of a ConfigDict for a named variant, with all fields, so that each can be overridden.

    Raises:
        ConfigError: The name or a field is unknown, or the combination is invalid.
    """
    own = ("drop_path", "dtype", "remat", "attention", "scan")
    compute = {key: overrides.pop(key) for key in own if key in overrides}
    return model_section(get_architecture(name, **overrides), name=name, **compute)


def model_section(architecture: Architecture | RegNetArchitecture, **compute: object) -> ConfigDict:
    """Returns the `model` section of a ConfigDict for an architecture."""
    return ConfigDict({**defaults(ModelConfig), **dataclasses.asdict(architecture), **compute})


def defaults(section: type, **values: object) -> ConfigDict:
    """Returns a ConfigDict with the defaults of a dataclass, for configs to modify, except for the given values."""
    found = ConfigDict()
    for field in dataclasses.fields(section):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(default):
            found[field.name] = defaults(type(default))
        elif default is not dataclasses.MISSING:
            found[field.name] = default
    return ConfigDict({**found, **values})


def with_defaults(config: ConfigDict) -> ConfigDict:
    """Returns a configuration with all default values filled in, so that each can be overridden on the command line."""
    filled = _fill(defaults(Config).to_dict(), _rename_keys(config.to_dict()))
    for name in (name for name in _TEACHERS if filled[name] is not None):
        filled[name] = _fill(defaults(TeacherConfig).to_dict(), filled[name])
    for holder in (filled, filled["teacher"], filled["cnn_teacher"]):
        model = holder.get("model") if holder is not None else None
        if model is not None and model.get("keep_ratio", 0.0) is None:
            # ml_collections can override a None only if it knows the type.
            model["keep_ratio"] = config_dict.placeholder(float)
    return ConfigDict(filled)


def _fill(known: JsonObject, values: JsonObject) -> JsonObject:
    """Returns the defaults, updated with the values at every level."""
    nested = {key for key, value in values.items() if isinstance(value, dict) and isinstance(known.get(key), dict)}
    return {**known, **values, **{key: _fill(known[key], values[key]) for key in nested}}


def from_config_dict(config: ConfigDict | Mapping[str, object], quiet: bool = False) -> Config:
    """Validates a ConfigDict and converts it to a frozen `Config`.

    Args:
        config: The values.
        quiet: Whether to omit messages about renamed keys, as in the config of an older run.

    Raises:
        ConfigError: A key is unknown, a value has the wrong type or is out of range, or values contradict each other;
            the message begins with the key.
    """
    values = _rename_keys(config.to_dict() if isinstance(config, ConfigDict) else config, quiet)
    for holder in (values, *(values.get(name) for name in _TEACHERS)):
        if isinstance(holder, dict) and isinstance(holder.get("model"), dict):
            holder["model"] = _split_model(holder["model"])
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        key, _, problem = _describe(error).partition(": ")
        raise ConfigError(key, problem) from None


def to_dict(config: Config) -> JsonObject:
    """Returns the configuration as JSON values, with architecture fields in the model sections.

    This is the inverse of `from_config_dict`.
    """
    values: JsonObject = _ADAPTER.dump_python(config, mode="json")
    for holder in (values, values["teacher"], values["cnn_teacher"]):
        if holder is not None:
            holder["model"].update(holder["model"].pop("architecture"))
    return values


def check_overrides(known: ConfigDict, overrides: Sequence[str]) -> list[str]:
    """Checks the keys of `--config.KEY=VALUE` arguments, with clearer errors than those of ml_collections.

    `--config.KEY=None` is applied to `known` if None is a valid value, as ml_collections would read it as text. The
    other arguments are returned, in order, with a value, with the current names of renamed keys, and without removed
    keys. `--config.KEY` and `--noconfig.KEY` set a boolean.

    Raises:
        ConfigError: A key does not exist, in which case the message names the closest key of its section, or its value
            is missing.
    """
    rest = []
    for arg in overrides:
        option, equals, value = arg.partition("=")
        start, _, key = option.partition(".")
        key = _new_name(key)
        last = key.rpartition(".")[2]
        if key.endswith("model.scan"):
            _log_removed(key)
        elif value == "None" and last in ("keep_ratio", *_TEACHERS):
            section = _section_of(known, key)
            # A section cannot be assigned to an existing key, nor None to a number, so the key is deleted first.
            del section[last]
            section[last] = config_dict.placeholder(float) if last == "keep_ratio" else None
        elif equals and last == "image_size" and (sides := re.fullmatch(r"\(?(\d+) *[x,] *(\d+)\)?", value)):
            # One number or two: ml_collections accepts only the type that is there.
            section = _section_of(known, key)
            del section[last]
            section[last] = tuple(map(int, sides.groups()))
        elif equals and start == "--config":
            rest.append((key, value, False))
        else:
            require(not equals, key, f"{start}.KEY has no value, got {value!r}")
            rest.append((key, str(start == "--config").lower(), True))
    for key, _, is_flag in rest:  # After all None values: their sections have no keys.
        current = None if "[" in key else _section_of(known, key)[key.rpartition(".")[2]]
        require(isinstance(current, bool) or not is_flag, key, f"has no value; write --config.{key}=VALUE")
    return [f"--config.{key}={value}" for key, value, _ in rest]


def _section_of(known: ConfigDict, key: str) -> ConfigDict:
    """Returns the section that has a key."""
    section = value = known
    names = key.split(".")
    for depth, name in enumerate(names):
        section = value
        missing = ".".join(names[:depth])
        require(section is not None, key, f"{missing} is None in this config; add a {missing} section to the file")
        if not isinstance(section, ConfigDict) or name not in section:
            known = section if isinstance(section, ConfigDict) else []
            raise ConfigError(key or "--config.", f"there is no such key{did_you_mean(name, known)}")
        value = section[name]
    return section


def _rename_keys(values: Mapping[str, object], quiet: bool = False, section: str = "") -> JsonObject:
    """Returns the values with renamed keys replaced by their new names."""
    same: JsonObject = {}
    renamed: JsonObject = {}
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


def _split_model(section: JsonObject) -> JsonObject:
    """Returns the fields of a `ModelConfig`; those of the architecture are in the section itself."""
    if section.pop("scan", False):
        _log_removed("model.scan")
    own = {field.name: section.pop(field.name) for field in dataclasses.fields(ModelConfig) if field.name in section}
    return {**own, "architecture": {"family": "vit", **section}}


def _describe(error: ValidationError) -> str:
    """Returns all problems in one line: `optim.lrr: there is no such key; did you mean lr?`."""
    lines = []
    for problem in error.errors():
        parts = [str(p) for p in problem["loc"] if str(p) not in ("architecture", "vit", "regnet")]
        key = ".".join(parts)
        match problem["type"]:
            case "unexpected_keyword_argument":
                lines.append(f"{key}: there is no such key{did_you_mean(parts[-1], _all_keys())}")
            case "value_error":
                message = str(problem["ctx"]["error"])
                lines.append(f"{key}.{message}" if key else message)
            case _:
                message = problem["msg"].replace("Input should ", "must ")
                lines.append(f"{key}: {message[0].lower()}{message[1:]}, got {problem['input']!r}")
    return "; ".join(dict.fromkeys(lines))


def _all_keys() -> list[str]:
    sections = [x for x in defaults(Config).values() if isinstance(x, ConfigDict)]
    classes = (Config, ModelConfig, Architecture, TeacherConfig)
    return sorted({*itertools.chain(*sections), *(x.name for section in classes for x in dataclasses.fields(section))})
