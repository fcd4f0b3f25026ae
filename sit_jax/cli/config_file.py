"""Reads a config file and the `--config.KEY=VALUE` arguments over it."""

import argparse
import difflib
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sit_jax.errors import ConfigError, UserError, one_line

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from sit_jax.config import Config


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds `--config`, and says how its values are overridden."""
    text = (
        "name of a config of this package, such as digits or imagenet_sit_small, or a Python file with a get_config() "
        "that returns a ConfigDict; CONFIG:ARGUMENT hands it an argument"
    )
    parser.add_argument("--config", required=True, help=text)
    parser.epilog = "Any value of the configuration: --config.KEY=VALUE, such as --config.optim.lr=1e-3"


def load_config(path: str, overrides: Sequence[str] = ()) -> "Config":
    """Reads a config file and the `--config.KEY=VALUE` arguments, and checks the result.

    Args:
        path: A file, or the name of a config of this package; behind a colon an argument for its `get_config`.
        overrides: The arguments.

    Raises:
        ConfigError: No such file, an error in it, an unknown key or an impossible value.
    """
    from absl import flags
    from ml_collections import config_flags

    from sit_jax.config.config_dict import check_keys, from_config_dict, take_nones, with_defaults

    known = with_defaults(_get_config(path))
    overrides = take_nones(known, overrides)
    check_keys(known, overrides)
    words = ["sit", *overrides]
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", known, flag_values=values, sys_argv=words)
        values(words)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise _override_error(error) from None
    return from_config_dict(values.config)


def _get_config(path: str) -> "ConfigDict":
    """What a config file's `get_config` returns."""
    from sit_jax.config.moved import old_names

    file, _, argument = path.rpartition(":") if ":" in path and not path.endswith(".py") else (path, "", "")
    spec = importlib.util.spec_from_file_location("config", _find(file))
    if spec is None or spec.loader is None:
        raise ConfigError("--config", f"{file} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        with old_names():
            spec.loader.exec_module(module)
        config: ConfigDict = module.get_config(*([argument] if argument else []))
    except Exception as error:  # Whatever a user's own Python file does.
        if isinstance(error, UserError | TypeError | ValueError):
            raise ConfigError("--config", f"{path}: {one_line(error)}") from None
        raise ConfigError("--config", f"{path} raises {type(error).__name__}: {one_line(error)}") from None
    return config


def _find(config: str) -> pathlib.Path:
    """The file of a config: a path, or the name of one that the package brings along."""
    if pathlib.Path(config).is_file():
        return pathlib.Path(config)
    package = pathlib.Path(__file__).parents[1]
    # Installed, the configs are in the package; in a checkout they are beside it.
    folders = (package / "configs", package.parent / "configs")
    files = {file.stem: file for folder in folders for file in folder.glob("*.py")}
    if config in files:
        return files[config]
    if config.endswith(".py") or pathlib.Path(config).name != config:
        raise ConfigError("--config", f"there is no file {config}")
    close = difflib.get_close_matches(config, files, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(files))}"
    raise ConfigError("--config", f"there is no config {config}; {hint}")


def _override_error(error: Exception) -> ConfigError:
    text = str(error.args[0]) if error.args else str(error)
    # ml_collections nests one KeyError's text, quoted and escaped, in another's.
    text = text.replace("\\n", " ").replace("\\'", "").replace("'", "")
    key, colon, rest = " ".join(text.split())[:400].partition(": ")
    return ConfigError(key, rest) if colon else ConfigError("--config", key)
