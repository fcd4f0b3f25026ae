"""State dicts under the names of other repositories, with random weights, for `sit convert` to read."""

import argparse
import collections
import datetime
import pathlib
from typing import Any

import golden_files
import numpy as np
import torch

from sit_jax.models.architecture import Architecture


def golden_weights(name: str) -> dict[str, np.ndarray]:
    """A golden file's student in the original's layout, reverse modules included.

    Without BatchNorm's batch counters, which are no weights: PyTorch starts them anew where a file lacks them.
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


def save_npz(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays as google-research's files hold them."""
    values: dict[str, Any] = dict(arrays)
    np.savez(path, **values)


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


def google(arch: Architecture, seed: int = 0) -> dict[str, np.ndarray]:
    """A plain ViT in the layout of google-research's vision_transformer."""
    rng = np.random.default_rng(seed)
    dim, width, hidden = arch.dim, arch.dim // arch.num_heads, int(arch.dim * arch.mlp_ratio)
    shapes: dict[str, tuple[int, ...]] = {
        "cls": (1, 1, dim),
        "Transformer/posembed_input/pos_embedding": (1, 1 + arch.num_patches, dim),
        "embedding/kernel": (arch.patch_size, arch.patch_size, 3, dim),
        "embedding/bias": (dim,),
        "Transformer/encoder_norm/scale": (dim,),
        "Transformer/encoder_norm/bias": (dim,),
        "head/kernel": (dim, arch.num_classes),
        "head/bias": (arch.num_classes,),
    }
    for block in range(arch.depth):
        key = f"Transformer/encoderblock_{block}"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{key}/{norm}/scale": (dim,), f"{key}/{norm}/bias": (dim,)}
        attention = f"{key}/MultiHeadDotProductAttention_1"
        for name in ("query", "key", "value"):
            shapes[f"{attention}/{name}/kernel"] = (dim, arch.num_heads, width)
            shapes[f"{attention}/{name}/bias"] = (arch.num_heads, width)
        shapes |= {f"{attention}/out/kernel": (arch.num_heads, width, dim), f"{attention}/out/bias": (dim,)}
        shapes |= {f"{key}/MlpBlock_3/Dense_0/kernel": (dim, hidden), f"{key}/MlpBlock_3/Dense_0/bias": (hidden,)}
        shapes |= {f"{key}/MlpBlock_3/Dense_1/kernel": (hidden, dim), f"{key}/MlpBlock_3/Dense_1/bias": (dim,)}
    return {name: rng.normal(size=shape).astype(np.float32) * 0.3 for name, shape in shapes.items()}
