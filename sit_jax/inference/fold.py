"""Weights as inference wants them: whatever is linear is worked out once, when a model is loaded.

The function that the model computes stays the same; only its rounding differs. What is folded:

- BatchNorm into the convolution before it.
- LayerNorm's factors and shifts into the linear layer behind it, so that of the norm only one number per token is left.
  LayerNorm also takes the mean of every token away. Instead everything that is added to the stream is made mean-free
  here: embeddings, the columns of each branch's last layer. Sums and convex combinations of mean-free tokens are
  mean-free, so no mean is left to take away (Ashkboos et al., SliceGPT, section 3, has LayerNorm to RMSNorm this way).
- The residual scale, layer scale, attention's `1/sqrt(d)`, the slimming modules' temperature. Their second bias falls
  out: it is the same for all tokens, over which the softmax goes.

All of it is done in float64, so that folding costs one rounding.
"""

from typing import Any

import numpy as np

from sit_jax.models.architecture import Architecture
from sit_jax.models.layers import BatchNorm

Folded = dict[str, Any]


def fold(arch: Architecture, params: dict[str, Any], batch_stats: dict[str, Any], halves_below: int = 0) -> Folded:
    """The folded weights of a vision transformer, float32 NumPy arrays.

    Args:
        arch: The model's shape.
        params: Its parameters; the reverse modules' and the auxiliary head's play no role.
        batch_stats: Its BatchNorm statistics; empty where it has none.
        halves_below: Blocks with at most this many tokens have their kernels as lists of two halves of the columns,
            for backends that work on both at a time (see `forward`).
    """
    params = _float64(params)
    stem, shift = _fold_stem(arch, params["stem"], _float64(batch_stats.get("stem", {})))
    prefix = params["class_token"] + params["positions"][:, :1]
    if arch.distillation_token:
        second = params["distillation_token"] + params["distillation_position"]
        prefix = np.concatenate([prefix, second], axis=1)
    folded = {
        "stem": stem,
        "prefix": _centred(prefix),
        "positions": _centred(params["positions"][:, 1:] + shift),
        "head": _behind_norm(params["norm"], params["head"]),
    }
    if arch.distillation_token:
        folded["distillation_head"] = _behind_norm(params["norm"], params["distillation_head"])
    for block in range(arch.depth):
        tokens = arch.block_input_tokens[block] + arch.num_prefix_tokens
        layers = _fold_block(arch, params[f"blocks_{block}"])
        folded[f"blocks_{block}"] = _in_halves(layers) if tokens <= halves_below else layers
    for block in arch.slimming:
        module = params[f"slimming_{block}"]
        fc2 = {"kernel": module["fc2"]["kernel"] * module["scale"]}
        folded[f"slimming_{block}"] = {"fc1": _behind_norm(module["norm"], module["fc1"]), "fc2": fc2}
    return _float32(folded)


def _fold_block(arch: Architecture, block: dict[str, Any]) -> Folded:
    """A block's four linear layers."""
    qkv = _behind_norm(block["norm1"], block["attn"]["qkv"])
    factors = np.ones((3, arch.dim))
    factors[0] = (arch.dim // arch.num_heads) ** -0.5
    return {
        "qkv": {name: x * factors.reshape(-1) for name, x in qkv.items()},
        "proj": _ends_branch(arch, block["attn"]["proj"], block.get("layer_scale1")),
        "fc1": _behind_norm(block["norm2"], block["mlp"]["fc1"]),
        "fc2": _ends_branch(arch, block["mlp"]["fc2"], block.get("layer_scale2")),
    }


def _in_halves(layers: Folded) -> Folded:
    """The layers with kernels in two halves of the columns; the smallest kernel, `proj`, gains nothing by it."""

    def halved(name: str, kernel: np.ndarray) -> Any:
        return kernel if name == "proj" or kernel.shape[1] % 2 else np.split(kernel, 2, axis=1)

    return {name: {**layer, "kernel": halved(name, layer["kernel"])} for name, layer in layers.items()}


def _fold_stem(arch: Architecture, stem: dict[str, Any], stats: dict[str, Any]) -> tuple[Folded, np.ndarray]:
    """The convolutions with their biases, and what the last one adds to every patch."""
    layers = []
    for index in range(1, len(arch.conv_stem_layers) + 1):
        norm, running = stem[f"bn{index}"], stats[f"bn{index}"]
        factor = norm["scale"] / np.sqrt(running["var"] + BatchNorm.epsilon)
        bias = norm["bias"] - running["mean"] * factor
        layers.append({"kernel": stem[f"conv{index}"]["kernel"] * factor, "bias": bias})
    if arch.stem_projection:
        layers.append(dict(stem["proj"]))
    shift = layers[-1].pop("bias")
    layers[-1]["kernel"] = _centred(layers[-1]["kernel"])
    return {f"conv{index}": layer for index, layer in enumerate(layers, start=1)}, shift


def _behind_norm(norm: dict[str, Any], layer: dict[str, Any]) -> Folded:
    """A linear layer that takes in the factors and shifts of the LayerNorm before it."""
    kernel = layer["kernel"]
    return {"kernel": norm["scale"][:, None] * kernel, "bias": norm["bias"] @ kernel + layer.get("bias", 0.0)}


def _ends_branch(arch: Architecture, layer: dict[str, Any], layer_scale: np.ndarray | None) -> Folded:
    """A residual branch's last layer, scaled and mean-free."""
    factor = (1.0 if layer_scale is None else layer_scale) / arch.residual_scale
    return {name: _centred(x * factor) for name, x in layer.items()}


def _centred(x: np.ndarray) -> np.ndarray:
    centred: np.ndarray = x - x.mean(axis=-1, keepdims=True)
    return centred


def _float64(tree: Any) -> Any:
    return (
        {name: _float64(x) for name, x in tree.items()}
        if isinstance(tree, dict)
        else np.asarray(tree, dtype=np.float64)
    )


def _float32(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _float32(x) for name, x in tree.items()}
    if isinstance(tree, list):
        return [_float32(x) for x in tree]
    return np.ascontiguousarray(tree, dtype=np.float32)
