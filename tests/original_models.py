"""State dicts under the names of other repositories, with random weights, for `sit convert` to read."""

import argparse
import collections
import datetime
import pathlib
from typing import Any

import golden_files
import jax
import numpy as np
import random_weights
import torch

from sit_jax.io.convert.load_params import expected_shapes
from sit_jax.io.convert.sit_names import to_original
from sit_jax.models.architecture import Architecture


def golden_weights(name: str) -> dict[str, np.ndarray]:
    """A golden file's student in the original's layout, reverse modules included.

    Without BatchNorm's batch counters, which are no weights.
    """
    golden = golden_files.load(name)
    weights = {**golden_files.part(golden.data, "teacher/"), **golden_files.part(golden.data, "student_own/")}
    return {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}


def options(arch: Architecture) -> dict[str, Any]:
    """What tensors do not tell of an architecture."""
    return {"num_heads": arch.num_heads, "residual_scale": arch.residual_scale, "norm_eps": arch.norm_eps}


def save_torch(path: pathlib.Path, value: Any, legacy: bool = False) -> pathlib.Path:
    """Writes a value of NumPy arrays with `torch.save`, arrays becoming tensors."""
    torch.save(as_tensors(value), path, _use_new_zipfile_serialization=not legacy)
    return path


def as_tensors(value: Any) -> Any:
    """The value with tensors for arrays."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value))
    return {key: as_tensors(x) for key, x in value.items()} if isinstance(value, dict) else value


def save_npz(path: pathlib.Path, arrays: dict[str, Any]) -> pathlib.Path:
    """Writes arrays as google-research's files hold them."""
    np.savez(path, **arrays)
    return path


def checkpoint(weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """A checkpoint as training programs write it: weights and their average among other things."""
    averaged = {f"module.{key}": value + 1 for key, value in weights.items()}
    return {
        "epoch": 7,
        "arch": "sit",
        "state_dict": {f"module.{key}": value for key, value in weights.items()},
        "state_dict_ema": averaged,
        "optimizer": {"state": {0: {"step": 3, "exp_avg": np.zeros(4, np.float32)}}, "param_groups": [{"lr": 1e-3}]},
        "args": argparse.Namespace(lr=1e-3, model="sit", path=pathlib.Path("/somewhere")),
        "best": np.float64(0.5),
        "history": collections.defaultdict(list, {"loss": [np.float32(2.5)]}),
        "saved": datetime.datetime(2026, 11, 27),
    }


def state_dict(arch: Architecture, rtsm: bool = False) -> dict[str, np.ndarray]:
    """Random weights under the original's names, which are timm's for a plain ViT."""
    weights = random_weights.draw(arch, rtsm)
    state = to_original({**weights.variables, "rtsm": weights.rtsm}, arch)
    # safetensors' own writer takes the memory of a transposed array as it is.
    return {key: np.ascontiguousarray(value) for key, value in state.items()}


def shapes(arch: Architecture, rtsm: bool = False) -> dict[str, tuple[int, ...]]:
    """The shapes of `state_dict`, without the memory."""
    tree = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), expected_shapes(arch, rtsm))
    return {key: value.shape for key, value in to_original(tree, arch).items()}


def google(arch: Architecture) -> dict[str, np.ndarray]:
    """The weights of `state_dict` in the layout of google-research's vision_transformer, whose heads are axes."""
    state, heads = state_dict(arch), arch.num_heads
    arrays = {
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    norms = {"Transformer/encoder_norm": "norm"}
    for block in range(arch.depth):
        key, prefix = f"Transformer/encoderblock_{block}", f"blocks.{block}"
        norms |= {f"{key}/LayerNorm_0": f"{prefix}.norm1", f"{key}/LayerNorm_2": f"{prefix}.norm2"}
        attention = f"{key}/MultiHeadDotProductAttention_1"
        qkv = (np.split(state[f"{prefix}.attn.qkv.{part}"], 3) for part in ("weight", "bias"))
        for name, weight, bias in zip(("query", "key", "value"), *qkv, strict=True):
            arrays[f"{attention}/{name}/kernel"] = weight.T.reshape(arch.dim, heads, -1)
            arrays[f"{attention}/{name}/bias"] = bias.reshape(heads, -1)
        arrays[f"{attention}/out/kernel"] = state[f"{prefix}.attn.proj.weight"].T.reshape(heads, -1, arch.dim)
        arrays[f"{attention}/out/bias"] = state[f"{prefix}.attn.proj.bias"]
        for index in (0, 1):
            arrays[f"{key}/MlpBlock_3/Dense_{index}/kernel"] = state[f"{prefix}.mlp.fc{index + 1}.weight"].T
            arrays[f"{key}/MlpBlock_3/Dense_{index}/bias"] = state[f"{prefix}.mlp.fc{index + 1}.bias"]
    for theirs, ours in norms.items():
        arrays |= {f"{theirs}/scale": state[f"{ours}.weight"], f"{theirs}/bias": state[f"{ours}.bias"]}
    return arrays
