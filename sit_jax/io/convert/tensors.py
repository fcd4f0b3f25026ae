"""Lazily read tensors of a file."""

import contextlib
import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sit_jax.data.formats import START, ZIP, identify
from sit_jax.errors import UserError


class Tensor(NamedTuple):
    """A tensor in a file; `is_float` says whether its elements are floating-point numbers, of any width."""

    shape: tuple[int, ...]
    is_float: bool
    read: Callable[[], np.ndarray]


Tensors = dict[str, Tensor]


class FileError(UserError):
    """A file of weights cannot be read; the message names the file and the reason."""


def unreadable(path: pathlib.Path, reason: str, zipped: bool = False) -> FileError:
    """Returns the error of a file that a reader refuses: what the file is, if its first bytes say so, or `reason`.

    `zipped` says that readable files are zip archives.
    """
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(START)
        if not (zipped and start.startswith(ZIP)):
            reason = identify(start) or reason
    return FileError(f"{path}: {reason}")


# A tensor that every model has once, after the prefixes that wrappers and programs add to every name.
_FIRST_NORM = re.compile(r"((?:.*[./])?)(?:blocks\.0\.norm1\.weight|Transformer/encoderblock(?:_0)?/LayerNorm_0/scale)")
# The first norm of a block in any layout: weights without one are no transformer's.
BLOCK_NORM = re.compile(r"\.(norm1|layernorm_before|layer_norm1|ln_1)\.weight$")
# Parts that wrappers of PyTorch add within names.
_WRAPPERS = re.compile(r"\b_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")
_LONGEST_AXIS = 2**31
# transformers' DINOv3 without registers.
_MAY_BE_EMPTY = "embeddings.register_tokens"
# Weights compress little, and few tensors share memory, but zeros compress a thousandfold and a tensor can be expanded
# to any size: a file that claims a larger ratio is rejected.
_MOST_COMPRESSED = 20
_SMALL = 2**26


def check_axes(path: pathlib.Path, tensors: Tensors) -> None:
    """Raises a FileError if a tensor is empty, or an axis is longer than that of any model.

    The message does not repeat the sizes: they may have thousands of digits, which Python does not print.
    """
    for name, tensor in tensors.items():
        least = 0 if name.endswith(_MAY_BE_EMPTY) else 1
        if not all(least <= size <= _LONGEST_AXIS for size in tensor.shape):
            raise FileError(f"{path}: {name[:200]} claims an axis that is empty or longer than {_LONGEST_AXIS:,}")


def check_total(path: pathlib.Path, total: int) -> None:
    """Raises a FileError if tensors claim more bytes than weights in a file of this size can have."""
    if total > max(_SMALL, _MOST_COMPRESSED * path.stat().st_size):
        raise FileError(f"{path}: claims {total:,} bytes of tensors, which cannot be weights of this file's size")


def strip_prefixes(tensors: Tensors) -> Tensors:
    """Returns the tensors without what wrappers and programs add to their names.

    Raises a UserError if they are those of several models.
    """
    names = [_WRAPPERS.sub("", name) for name in tensors]
    prefixes = sorted({match[1] for name in names if (match := _FIRST_NORM.fullmatch(name))}) or [""]
    stripped = dict(zip((name.removeprefix(prefixes[0]) for name in names), tensors.values(), strict=True))
    if len(prefixes) > 1 or len(stripped) < len(tensors):
        text = ", ".join(prefix[:50] or "no prefix" for prefix in prefixes[:8])
        raise UserError(f"holds several models, with the prefixes {text}; save the state_dict of one alone")
    return stripped
