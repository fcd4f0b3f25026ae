"""Finds and loads config files."""

import difflib
import importlib.util
import pathlib

from ml_collections import ConfigDict

from sit_jax.config.config_dict import with_defaults
from sit_jax.config.moved import old_names
from sit_jax.errors import ConfigError, UserError, one_line


def get_config(path: str) -> ConfigDict:
    """Returns the ConfigDict of a config file's `get_config`, with all defaults filled in, for `sit_jax.train`.

    Args:
        path: A file, or the name of a config of this package, such as `digits`; optionally followed by a colon and an
            argument.

    Raises:
        ConfigError: There is no such config, or its file raises an error.
    """
    file, _, argument = path.rpartition(":") if ":" in path and not path.endswith(".py") else (path, "", "")
    spec = importlib.util.spec_from_file_location("config", _find(file))
    if spec is None or spec.loader is None:
        raise ConfigError("--config", f"{file} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        with old_names():
            spec.loader.exec_module(module)
        config = module.get_config(*([argument] if argument else []))
    except Exception as error:  # A user's Python file may raise any error.
        usual = isinstance(error, UserError | TypeError | ValueError)
        where = path if usual else f"{path} raises {type(error).__name__}"
        raise ConfigError("--config", f"{where}: {one_line(error)}") from None
    if not isinstance(config, ConfigDict):
        raise ConfigError("--config", f"{path}: get_config must return a ConfigDict, not {type(config).__name__}")
    return with_defaults(config)


def _find(config: str) -> pathlib.Path:
    """Returns the file of a config: a path, or the name of a config that is included in the package."""
    if pathlib.Path(config).is_file():
        return pathlib.Path(config)
    package = pathlib.Path(__file__).parents[1]
    # The configs are in the installed package; in a checkout, they are next to it.
    folders = (package / "configs", package.parent / "configs")
    files = {file.stem: file for folder in folders for file in folder.glob("*.py")}
    if config in files:
        return files[config]
    if config.endswith(".py") or pathlib.Path(config).name != config:
        raise ConfigError("--config", f"there is no file {config}")
    close = difflib.get_close_matches(config, files, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(files))}"
    raise ConfigError("--config", f"there is no config {config}; {hint}")
