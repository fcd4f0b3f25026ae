"""Lets config files of users import modules under their former names."""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType

_MOVED = {"sit_jax.config_dict": "sit_jax.config.config_dict", "sit_jax.recipe": "sit_jax.config.recipe"}


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
def old_names() -> Iterator[None]:
    """Resolves former module names while a config file is loaded, and prints the new ones on stderr."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
