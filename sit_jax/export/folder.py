"""Model folders: `model.safetensors` in the PyTorch original's names and layouts, and `config.json`."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np

from sit_jax.convert.original import name_table
from sit_jax.convert.weights import Weights


def save_folder(path: pathlib.Path, weights: Weights, with_reverse: bool = False) -> None:
    """Writes a model folder; it must not be there yet."""
    path.mkdir()
    write_weights(path / "model.safetensors", weights, with_reverse)
    values = {
        "format": "sit_jax",
        "format_version": 1,
        "architecture": dataclasses.asdict(weights.arch),
        "kept_tokens": list(weights.arch.token_counts),
        **weights.about,
    }
    (path / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def write_weights(path: pathlib.Path, weights: Weights, with_reverse: bool) -> None:
    """Writes the weights' file in the original's layout, tensor by tensor."""
    tree: dict[str, Any] = {"params": weights.params, "batch_stats": weights.batch_stats, "reverse": weights.reverse}
    entries = []
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in name_table(weights.arch, with_reverse):
        node: Any = tree
        for part in entry.path:
            node = node[part]
        # The layout's function applied to an array of one value that only looks large.
        shape = entry.to_torch(np.broadcast_to(np.float32(0), np.shape(node))).shape
        start, end = end, end + 4 * math.prod(shape)
        header[entry.key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
        entries.append((entry, node))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry, node in entries:
            file.write(np.ascontiguousarray(entry.to_torch(np.asarray(node)), "<f4").data)
