"""Counts multiply-accumulates and parameters of a model from its architecture.

Convolutions, linear layers and the matrix products of attention and slimming are counted; of reducers these are the
product with the assignment, the layers of `slim`, the similarities of `tome`, and class attention. Norms, softmax, GELU
and additions are not, as in the paper and in common counters. The counts are per image, independent of the batch size.
"""

import dataclasses
import math
from collections.abc import Iterator

from sit_jax.config import Config
from sit_jax.errors import ConfigError
from sit_jax.models import reducer_params
from sit_jax.models.architecture import Architecture
from sit_jax.models.cut import cut_architecture
from sit_jax.models.reducers.base import find_reducer
from sit_jax.training.elastic import largest_step


@dataclasses.dataclass(frozen=True)
class Cost:
    """Multiply-accumulates (MAC) per image and parameters, by part.

    Attributes:
        macs: Part (`stem`, `attention`, `mlp`, `slimming`, `head`) -> MAC of one forward pass.
        params: Parameters of the deployed model.
        rtsm_params: Parameters of the training-only reverse modules.
        rtsm_macs: MAC of the reverse modules per image.
    """

    macs: dict[str, int]
    params: int
    rtsm_params: int
    rtsm_macs: int

    @property
    def gmac(self) -> float:
        """Billions of multiply-accumulates (GMAC) of one forward pass."""
        return sum(self.macs.values()) / 1e9


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes to which an array's second-last axis (`rows`) and last axis (`lanes`) are padded; by default, none."""

    rows: int = 1
    lanes: int = 1

    def pad(self, rows: int, lanes: int) -> tuple[int, int]:
        """Returns the padded sizes of the last two axes."""
        return -(-rows // self.rows) * self.rows, -(-lanes // self.lanes) * self.lanes


# A float32 or bfloat16 array on a TPU is stored in tiles of 8 rows by 128 lanes.
TPU_TILES = Tiles(8, 128)


def count_cost(arch: Architecture, tiles: Tiles = Tiles()) -> Cost:
    """Counts a model's cost, with token axes padded to tiles."""
    stem_macs, stem_params = _stem(arch)
    dim, prefix = arch.dim, arch.num_prefix_tokens
    wide, hidden = arch.mlp_hidden
    attention = mlp = 0
    reducer = find_reducer(arch.reducer) if arch.is_slimmed else None
    inside = reducer is not None and reducer.place == "inside_block"
    counts = arch.block_input_tokens
    for patches, later in zip(counts, arch.block_output_tokens if inside else counts, strict=True):
        rows, lanes = tiles.pad(patches + prefix, patches + prefix)
        attention += rows * 4 * dim**2 + 2 * rows * lanes * dim
        mlp += tiles.pad(later + prefix, dim)[0] * dim * (wide + hidden)
    slimming_macs = slimming_params = 0
    if arch.reducer != "slim":
        slimming_params = sum(math.prod(leaf.shape) for leaf in reducer_params(arch).values())
    for block, kept in arch.slimming.items():
        patches = counts[block]
        slimming_macs += _reduction(arch, patches, kept, tiles)
        if reducer is not None and "class_attention" in reducer.needs:
            queries = 1 if arch.class_token else patches + prefix
            attention += math.prod(tiles.pad(queries, patches + prefix)) * dim
        if arch.reducer == "slim":
            slimming_params += 2 * dim + _linear(dim, dim // 2) + _linear(dim // 2, kept) + 1
    block_params = 4 * dim + _linear(dim, 3 * dim, arch.qkv_bias) + _linear(dim, dim)
    block_params -= dim * (arch.qkv_bias and not arch.key_bias)
    block_params += _linear(dim, wide) + _linear(hidden, dim) + 2 * dim * arch.layer_scale
    heads = 1 + arch.distillation_token
    head_macs, head_params = heads * arch.feature_dim * arch.num_classes, _linear(arch.feature_dim, arch.num_classes)
    params = stem_params + arch.depth * block_params + slimming_params
    params += heads * head_params + arch.aux_head * _linear(dim, arch.num_classes)
    if arch.projection:
        head_macs, params = (x + arch.pooled_dim * arch.projection for x in (head_macs, params))
    if arch.pool == "map":
        tokens = arch.token_counts[-1] + prefix
        # The query is the same for every image; keys and values, scores, mixing, projection, MLP.
        head_macs += dim**2 + tokens * (2 * dim**2 + 2 * dim) + dim**2 + 2 * dim * hidden
        params += dim + 4 * _linear(dim, dim) + 2 * dim + _linear(dim, hidden) + _linear(hidden, dim)
    # Prefix tokens, positions, last norm.
    learned = arch.positions == "learned"
    params += (prefix + learned * (arch.class_token + arch.num_patches) + arch.distillation_token) * dim
    params += 2 * dim * (1 + arch.pre_norm)
    macs = {
        "stem": stem_macs,
        "attention": attention,
        "mlp": mlp,
        "slimming": slimming_macs,
        "head": head_macs,
    }
    return Cost(macs, params, *_reverse(arch, tiles))


def count_step_macs(config: Config, tiles: Tiles = Tiles()) -> int:
    """Counts the multiply-accumulates of a train step per image.

    They are those of the student's forward pass and twice that for the backward pass, once more for recomputed parts
    (`remat`), the same for the reverse modules (never recomputed), and the teachers' forward passes.

    Convolutional teachers are not included; see `plan`. With several token schedules, it is the most expensive step.
    """
    arch = config.model.architecture
    if not isinstance(arch, Architecture):
        raise ConfigError("model", "only vision transformers can be counted")
    trained = [cut_architecture(arch, kept) for kept in largest_step(config)] or [arch]
    total = sum(_student_macs(config, each, tiles) for each in trained)
    if config.used_teacher:
        teacher = config.used_teacher.model.architecture
        assert isinstance(teacher, Architecture)
        total += sum(count_cost(teacher, tiles).macs.values())
    return total


def _student_macs(config: Config, arch: Architecture, tiles: Tiles) -> int:
    """Returns the multiply-accumulates of the student and its reverse modules, forward and backward."""
    cost = count_cost(arch, tiles)
    total = 3 * sum(cost.macs.values()) - _first_layer(arch)  # The images need no gradient.
    if config.model.remat:
        total += cost.macs["attention"] + cost.macs["mlp"]
        inside = arch.is_slimmed and find_reducer(arch.reducer).place == "inside_block"
        total += inside * cost.macs["slimming"]
    return total + (3 * cost.rtsm_macs if config.recovered else 0)


def padding(config: Config, tiles: Tiles = TPU_TILES) -> float:
    """Returns the fraction of a train step's products that is padding of token axes, which are padded per image."""
    return 1 - count_step_macs(config) / count_step_macs(config, tiles)


def fuller_token_counts(arch: Architecture, tiles: Tiles = TPU_TILES) -> dict[int, tuple[int, ...]]:
    """Returns kept tokens that do not fill their tiles -> the nearest smaller and larger counts that do.

    A count fills its tiles if, together with the class token and other prefix tokens, it is a multiple of the rows. The
    whole grid, which the image size determines, and counts outside the range of the adjacent stages are excluded.
    """
    counts, prefix, rows = arch.token_counts, arch.num_prefix_tokens, tiles.rows

    def candidates(stage: int) -> Iterator[int]:
        low = (counts[stage] + prefix) // rows * rows - prefix
        least = counts[stage + 1] if stage + 1 < len(counts) else 1
        yield from (count for count in (low, low + rows) if least <= count <= counts[stage - 1])

    stages = range(1, len(counts))
    return {counts[stage]: tuple(candidates(stage)) for stage in stages if (counts[stage] + prefix) % rows}


def _reduction(arch: Architecture, patches: int, kept: int, tiles: Tiles) -> int:
    """Returns the MAC of a reducer: those of the product with the assignment, and those of computing it, if known."""
    dim, (rows, lanes) = arch.dim, tiles.pad(patches, kept)
    macs = rows * lanes * dim
    if arch.reducer == "slim":
        macs += rows * (dim * (dim // 2) + (dim // 2) * lanes)
    while arch.reducer == "tome" and patches > kept:
        # Similarities of the keys of two sets, in rounds; between rounds, the keys are merged.
        size, count = dim // arch.num_heads, max(kept, patches // 2)
        macs += math.prod(tiles.pad(patches - patches // 2, patches // 2)) * size
        macs += math.prod(tiles.pad(patches, count)) * size * (count > kept)
        patches = count
    return macs


def _first_layer(arch: Architecture) -> int:
    if arch.stem == "patch":
        return _stem(arch)[0]
    features, kernel, stride = arch.conv_stem_layers[0]
    return math.prod(side // stride for side in arch.image_shape) * kernel**2 * arch.in_channels * features


def _stem(arch: Architecture) -> tuple[int, int]:
    macs = params = 0
    (height, width), channels = arch.image_shape, arch.in_channels
    for features, kernel, stride in arch.conv_stem_layers:
        height, width = height // stride, width // stride
        weights = kernel**2 * channels * features
        macs += height * width * weights
        params += weights + 2 * features
        channels = features
    if arch.stem_projection:
        weights = arch.stem_projection**2 * channels * arch.dim
        macs += arch.num_patches * weights
        params += weights + arch.dim * arch.patch_bias
    return macs, params


def _reverse(arch: Architecture, tiles: Tiles) -> tuple[int, int]:
    """Returns parameters and MAC of the RTSMs: an MLP over tokens per channel, and one over channels per token."""
    patches, dim = arch.num_patches, arch.dim
    params = macs = 0
    rows, out = tiles.pad(patches, patches)
    _, wide = tiles.pad(patches, 4 * patches)
    for kept in arch.block_output_tokens[arch.first_reversed_block :]:
        params += 4 * dim + _linear(kept, 4 * patches) + _linear(4 * patches, patches)
        params += _linear(dim, 4 * dim) + _linear(4 * dim, dim)
        macs += dim * wide * (tiles.pad(patches, kept)[1] + out) + rows * 8 * dim**2
    return params, macs


def _linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + outputs * bias
