"""Selects the weights in a checkpoint of PyTorch."""

import functools
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from sit_jax.errors import one_line
from sit_jax.io.convert.tensors import FileError, Tensor, Tensors, check_total
from sit_jax.io.convert.torch_file import read_torch

if TYPE_CHECKING:
    import torch

# Keys under which training programs store weights and their moving averages, in search order.
_WEIGHTS = ("state_dict", "model", "model_state_dict", "module")
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
# Prefixes that wrappers add to every name.
_PREFIXES = ("module.", "_orig_mod.", "model.", "opt/target/")


def select_torch(path: pathlib.Path, ema: bool, log: Callable[[str], None]) -> Tensors:
    """Returns the weights in a file of `torch.save`, or their moving average.

    Raises a UserError if the file contains no weights or cannot be read, or PyTorch is not installed.
    """
    value = read_torch(path)
    if not isinstance(value, dict):
        raise FileError(f"{path}: does not contain a dictionary of weights, but a {type(value).__name__}")
    found = {key: _tensors(value.get(key)) for key in (*_WEIGHTS, *_AVERAGES)}
    found = {key: tensors for key, tensors in found.items() if tensors}
    key = next((key for key in found if key in _AVERAGES or not ema), "")
    if ema and not key:
        raise FileError(f"{path}: contains no moving average of the weights; leave out --ema")
    if key:
        others = ", ".join(repr(other) for other in found if other != key)
        log(f"read: the weights under {key!r}" + (f" (there is also {others})" if others else ""))
    tensors = found[key] if key else _tensors(value)
    if not tensors:
        some = ", ".join(str(key)[:50] for key in list(value)[:8])
        raise FileError(f"{path}: contains no weights; its keys are {some or 'none'}")
    check_total(path, sum(x.numel() * x.element_size() for x in tensors.values()))
    return {name: _lazy(path, name, x) for name, x in tensors.items()}


def _tensors(value: object) -> "dict[str, torch.Tensor]":
    """Returns the tensors in a dictionary; empty for another value."""
    import torch

    items = value.items() if isinstance(value, dict) else ()
    return {str(key): x for key, x in items if isinstance(x, torch.Tensor)}


def _lazy(path: pathlib.Path, name: str, tensor: "torch.Tensor") -> Tensor:
    import torch

    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.device.type != "cpu":
        raise FileError(
            f"{path}: {name[:200]} is sparse, nested, quantized or without data; only dense tensors are read"
        )
    return Tensor(tuple(tensor.shape), tensor.is_floating_point(), functools.partial(_read, path, name, tensor))


def _read(path: pathlib.Path, name: str, tensor: "torch.Tensor") -> np.ndarray:
    """Returns a copy in float32, from bfloat16 and the float8 types as well, which NumPy does not have."""
    import torch

    try:
        copy = tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    except RuntimeError as error:
        raise FileError(f"{path}: {name[:200]} cannot be read: {one_line(error, 200)}") from None
    return copy.numpy()


def strip_prefixes(tensors: Tensors) -> Tensors:
    """Returns the tensors without the prefixes that wrappers add to every name."""
    for _ in range(4):
        prefix = next((p for p in _PREFIXES if tensors and all(name.startswith(p) for name in tensors)), "")
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors
