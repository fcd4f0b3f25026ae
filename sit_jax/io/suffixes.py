"""Suffixes of files of weights and of exported models."""

import pathlib
from collections.abc import Collection

from sit_jax.errors import UserError, did_you_mean

TORCH = (".pth", ".pt", ".tar", ".bin", ".ckpt")
SAFETENSORS, NPZ, ONNX, STABLEHLO = ".safetensors", ".npz", ".onnx", ".stablehlo"
_KNOWN = (*TORCH, SAFETENSORS, NPZ, ONNX, STABLEHLO)
# Of other programs: neither read nor written, and not part of a folder's name.
_OTHERS = (".h5", ".pkl", ".msgpack", ".gguf", ".tflite", ".pb", ".npy", ".zip", ".json")


def suffix_of(path: pathlib.Path, allowed: Collection[str]) -> str:
    """Returns the suffix of a path in lower case, or "" for a name without one, such as `deit_small_sit_0.7`.

    Only known suffixes and their misspellings are suffixes. Raises a UserError if it is not one of `allowed`.
    """
    suffix = path.suffix.lower()
    hint = did_you_mean(suffix, _KNOWN) if suffix[1:2].isalpha() and suffix not in _KNOWN else ""
    if not hint and suffix not in (*_KNOWN, *_OTHERS):
        suffix = ""
    if suffix not in allowed:
        choices = " or ".join(choice or "a folder without suffix" for choice in allowed)
        raise UserError(f"{path}: has {f'the suffix {suffix}' if suffix else 'no known suffix'}; give {choices}{hint}")
    return suffix
