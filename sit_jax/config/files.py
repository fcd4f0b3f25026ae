"""Finds and loads config files."""

import contextlib
import importlib.abc
import importlib.util
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType

from ml_collections import ConfigDict

from sit_jax.config.config_dict import with_defaults
from sit_jax.config.sweep import Sweep
from sit_jax.errors import ConfigError, UserError, did_you_mean, one_line

_MOVED = {"sit_jax.config_dict": "sit_jax.config.config_dict", "sit_jax.recipe": "sit_jax.config.recipe"}


def split_argument(path: str) -> tuple[str, str]:
    """Returns the file or name of a config, and the argument that follows it after a colon; empty without one."""
    file, colon, argument = path.rpartition(":")
    return (file, argument) if colon and not path.endswith(".py") else (path, "")


def get_config(path: str) -> ConfigDict:
    """Returns the ConfigDict of a config file's `get_config`, with all defaults filled in, for `sit_jax.train`.

    Args:
        path: A file, or the name of a config of this package, such as `digits`; optionally followed by a colon and an
            argument.

    Raises:
        ConfigError: There is no such config, or its file raises an error.
    """
    config = _call(path, "get_config")
    if not isinstance(config, ConfigDict):
        raise ConfigError("--config", f"{path}: get_config must return a ConfigDict, not {type(config).__name__}")
    return with_defaults(config)


def get_sweep(path: str) -> Sweep:
    """Returns the `Sweep` of a config file's `get_sweep`; takes the path and raises the errors of `get_config`."""
    sweep = _call(path, "get_sweep")
    if not isinstance(sweep, Sweep):
        raise ConfigError("--config", f"{path}: get_sweep must return a Sweep, not {type(sweep).__name__}")
    return sweep


def _call(path: str, function: str) -> object:
    """Calls a function of a config file with the argument that follows the file."""
    file, argument = split_argument(os.path.expanduser(path))
    spec = importlib.util.spec_from_file_location("config", _find(file))
    if spec is None or spec.loader is None:
        raise ConfigError("--config", f"{file} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        with _old_names():
            spec.loader.exec_module(module)
        if function == "get_sweep" and not hasattr(module, function):
            raise ValueError("has no get_sweep(), which says what to compare; see docs/compare.md")
        return getattr(module, function)(*([argument] if argument else []))
    except Exception as error:  # A user's Python file may raise any error.
        usual = isinstance(error, UserError | TypeError | ValueError)
        where = path if usual else f"{path} raises {type(error).__name__}"
        raise ConfigError("--config", f"{where}: {one_line(error)}") from None


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
    hint = did_you_mean(config, files, f"; there are {', '.join(sorted(files))}")
    raise ConfigError("--config", f"there is no config {config}{hint}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = _MOVED[module.__name__]
        print(f"config: {module.__name__} is now {new}", file=sys.stderr)
        vars(module).update({name: x for name, x in vars(importlib.import_module(new)).items() if name[:2] != "__"})


@contextlib.contextmanager
def _old_names() -> Iterator[None]:
    """Resolves former module names while a config file of a user is loaded, and prints the new ones on stderr."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
