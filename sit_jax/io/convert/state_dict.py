"""Selects the weights in a checkpoint."""

import pathlib
from collections.abc import Callable
from typing import Any

from sit_jax.io.convert.pickles import Rebuilt
from sit_jax.io.convert.tensors import FileError, Tensors
from sit_jax.io.convert.torch_files import read_torch

# Keys under which training programs store weights and their moving averages, in search order.
_WEIGHTS = ("state_dict", "model", "model_state_dict", "module")
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
# Prefixes that wrappers add to every name.
_PREFIXES = ("module.", "_orig_mod.", "model.", "opt/target/")


def select_torch(path: pathlib.Path, ema: bool, log: Callable[[str], None]) -> Tensors:
    """Returns the weights in a file of `torch.save`.

    Args:
        path: The file.
        ema: Select the moving average instead of the weights if there are both.
        log: Called with the key under which they were found.

    Raises:
        FileError: The file contains no weights, or cannot be read.
    """
    content = read_torch(path)
    value = content.value
    if not isinstance(value, dict):
        raise FileError(f"{path}: holds no dictionary of weights, but a {type(value).__name__}")
    key = _choose(path, value, ema)
    if key:
        others = [other for other in (*_WEIGHTS, *_AVERAGES) if other != key and _is_weights(value.get(other))]
        log(f"read: the weights under {key!r}" + (f" (there is also {', '.join(map(repr, others))})" if others else ""))
        value = value[key]
    named = ((_text(key), x) for key, x in value.items() if isinstance(x, Rebuilt))
    return {name: content.tensor(name, x) for name, x in named}


def _choose(path: pathlib.Path, value: dict[Any, Any], ema: bool) -> str:
    """Returns the key of the weights; empty if they are at the top level."""
    found = [key for key in (*_WEIGHTS, *_AVERAGES) if _is_weights(value.get(key))]
    averages = [key for key in found if key in _AVERAGES]
    if ema and not averages:
        raise FileError(f"{path}: holds no moving average of the weights; leave out --ema")
    if ema:
        return averages[0]
    if found:
        return found[0]
    if _is_weights(value):
        return ""
    some = ", ".join(_text(key)[:50] for key in list(value)[:8])
    raise FileError(f"{path}: holds no weights; its keys are {some or 'none'}")


def _text(key: Any) -> str:
    """Returns a key as text, shortened for integers of thousands of digits, which Python does not print."""
    return hex(key)[:50] if isinstance(key, int) and key.bit_length() > 64 else str(key)


def _is_weights(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(x, Rebuilt) for x in value.values())


def strip_prefixes(tensors: Tensors) -> Tensors:
    """Returns the tensors without the prefixes that wrappers add to every name."""
    for _ in range(4):
        prefix = next((p for p in _PREFIXES if tensors and all(name.startswith(p) for name in tensors)), "")
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors
