"""Maps the `state_dict` keys and layouts of the PyTorch original to parameter paths.

One table is used in both directions. Linear kernels are transposed, convolutions are converted from OIHW to HWIO, and
the slimming scale loses its three unit axes; all other arrays are unchanged.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from sit_jax.errors import UserError
from sit_jax.models import reducer_params
from sit_jax.models.architecture import Architecture
from sit_jax.models.trees import Variables

Path = tuple[str, ...]
Convert = Callable[[np.ndarray], np.ndarray]


class Entry(NamedTuple):
    """One tensor in both layouts: its `state_dict` key in the original, and its path in this package.

    The first part of the path is the collection: `params`, `batch_stats` or `rtsm`. `to_flax` returns a view in this
    package's layout of an array in the original's; `to_torch` is the inverse.
    """

    key: str
    path: Path
    to_flax: Convert = lambda x: x
    to_torch: Convert = lambda x: x


_LINEAR: tuple[Convert, Convert] = (np.transpose, np.transpose)
_CONV: tuple[Convert, Convert] = (lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
_SCALE: tuple[Convert, Convert] = (lambda x: x.reshape(()), lambda x: x.reshape(1, 1, 1))


def _linear(key: str, path: Path, bias: bool = True) -> Iterator[Entry]:
    yield Entry(f"{key}.weight", (*path, "kernel"), *_LINEAR)
    if bias:
        yield Entry(f"{key}.bias", (*path, "bias"))


def _norm(key: str, path: Path) -> Iterator[Entry]:
    yield Entry(f"{key}.weight", (*path, "scale"))
    yield Entry(f"{key}.bias", (*path, "bias"))


def _stem(arch: Architecture) -> Iterator[Entry]:
    path = ("params", "stem")
    if arch.stem_projection:
        yield Entry("patch_embed.proj.weight", (*path, "proj", "kernel"), *_CONV)
        if arch.patch_bias:
            yield Entry("patch_embed.proj.bias", (*path, "proj", "bias"))
    for index in range(1, len(arch.conv_stem_layers) + 1):
        yield Entry(f"patch_embed.conv{index}.weight", (*path, f"conv{index}", "kernel"), *_CONV)
        yield from _norm(f"patch_embed.bn{index}", (*path, f"bn{index}"))
        for name in ("mean", "var"):
            yield Entry(f"patch_embed.bn{index}.running_{name}", ("batch_stats", "stem", f"bn{index}", name))


def _blocks(arch: Architecture) -> Iterator[Entry]:
    for index in range(arch.depth):
        key, path = f"blocks.{index}", ("params", f"blocks_{index}")
        yield from _norm(f"{key}.norm1", (*path, "norm1"))
        yield from _linear(f"{key}.attn.qkv", (*path, "attn", "qkv"), arch.qkv_bias and arch.key_bias)
        if arch.qkv_bias and not arch.key_bias:
            yield Entry(f"{key}.attn.q_bias", (*path, "attn", "query_bias"))
            yield Entry(f"{key}.attn.v_bias", (*path, "attn", "value_bias"))
        yield from _linear(f"{key}.attn.proj", (*path, "attn", "proj"))
        yield from _norm(f"{key}.norm2", (*path, "norm2"))
        yield from _linear(f"{key}.mlp.fc1", (*path, "mlp", "fc1"))
        yield from _linear(f"{key}.mlp.fc2", (*path, "mlp", "fc2"))
        if arch.layer_scale:
            for branch in (1, 2):
                yield Entry(f"{key}.ls{branch}.gamma", (*path, f"layer_scale{branch}"))


def _slimming(arch: Architecture) -> Iterator[Entry]:
    if arch.reducer != "slim":
        # The original has no such modules, so they keep the names of this package.
        for path in reducer_params(arch):
            yield Entry(".".join(("reducer", *path)), ("params", *path))
        return
    for index, block in enumerate(arch.slimming):
        key, path = f"tsm.{index}", ("params", f"slimming_{block}")
        yield Entry(f"{key}.scale", (*path, "scale"), *_SCALE)
        yield from _norm(f"{key}.weight.0", (*path, "norm"))
        yield from _linear(f"{key}.weight.1", (*path, "fc1"))
        yield from _linear(f"{key}.weight.3", (*path, "fc2"))


def _reverse(arch: Architecture) -> Iterator[Entry]:
    for block in range(arch.first_reversed_block, arch.depth):
        key, path = f"rtsm.{block}", ("rtsm", f"blocks_{block}")
        for part, name in ((1, "token_mlp"), (2, "channel_mlp")):
            yield from _norm(f"{key}.norm{part}", (*path, f"norm{part}"))
            yield from _linear(f"{key}.mlp{part}.fc1", (*path, name, "fc1"))
            yield from _linear(f"{key}.mlp{part}.fc2", (*path, name, "fc2"))


def _tokens(arch: Architecture) -> Iterator[Entry]:
    names = {"cls_token": "class_token"} if arch.class_token else {}
    names |= {"pos_embed": "positions"} if arch.positions == "learned" else {}
    names |= {"reg_token": "registers"} if arch.registers else {}
    if arch.distillation_token:
        names |= {"dist_token": "distillation_token", "dist_pos_embed": "distillation_position"}
    yield from (Entry(key, ("params", name)) for key, name in names.items())


def _attention_pool() -> Iterator[Entry]:
    key, path = "attn_pool", ("params", "pool", "map")
    yield Entry(f"{key}.latent", (*path, "latent"))
    for name in ("q", "kv", "proj"):
        yield from _linear(f"{key}.{name}", (*path, name))
    yield from _norm(f"{key}.norm", (*path, "norm"))
    for name in ("fc1", "fc2"):
        yield from _linear(f"{key}.mlp.{name}", (*path, "mlp", name))


def name_table(arch: Architecture, rtsm: bool = True) -> list[Entry]:
    """Returns an entry for every tensor of the original's checkpoint, including reverse modules by default."""
    entries = [*_tokens(arch), *_stem(arch), *_blocks(arch), *_slimming(arch), *_norm("norm", ("params", "norm"))]
    if arch.pre_norm:
        entries += _norm("norm_pre", ("params", "pre_norm"))
    if arch.pool == "map":
        entries += _attention_pool()
    if arch.projection:
        entries += _linear("projection", ("params", "projection"), bias=False)
    if arch.num_classes:
        entries += _linear("head", ("params", "head"))
    if arch.aux_head:
        entries += _linear("aux_head", ("params", "aux_head"))
    if arch.distillation_token and arch.num_classes:
        entries += _linear("head_dist", ("params", "distillation_head"))
    if rtsm:
        entries += _reverse(arch)
    return entries


def to_original(tree: Variables, arch: Architecture) -> dict[str, np.ndarray]:
    """Returns `state_dict(tree, arch)`; raises a UserError if the model's reducer is not the original's."""
    if arch.reducer != "slim":
        raise UserError(f"PyTorch does not support the reducer {arch.reducer}; StableHLO and model folders take any")
    return state_dict(tree, arch)


def state_dict(tree: Variables, arch: Architecture) -> dict[str, np.ndarray]:
    """Returns views of `params`, `batch_stats` and, if they are there, `rtsm` under the original's names.

    BatchNorm's batch counters are left out.
    """
    arrays = flatten_dict(tree)
    table = name_table(arch, rtsm=bool(tree.get("rtsm")))
    return {entry.key: entry.to_torch(np.asarray(arrays[entry.path])) for entry in table}
