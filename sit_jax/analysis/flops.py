"""Multiply-accumulates and parameters of a model, counted from its shape alone.

Counted are the products: convolutions, linear layers, attention's two products, slimming's two. Norms, softmax, GELU
and additions are not, as in the paper and in the usual counters. One image, batch size plays no role.
"""

import dataclasses

from sit_jax.config import Config
from sit_jax.errors import ConfigError
from sit_jax.models.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Cost:
    """Multiply-accumulates (MAC) per image and parameters, by part.

    Attributes:
        macs: Part (`stem`, `attention`, `mlp`, `slimming`, `head`) -> MAC of one forward pass.
        params: Parameters of the model as it is deployed.
        reverse_params: Parameters of the training-only reverse modules.
        reverse_macs: MAC of the reverse modules per image.
    """

    macs: dict[str, int]
    params: int
    reverse_params: int
    reverse_macs: int

    @property
    def gmac(self) -> float:
        """Billions of multiply-accumulates of one forward pass."""
        return sum(self.macs.values()) / 1e9


def count_cost(arch: Architecture) -> Cost:
    """Counts a model's cost."""
    stem_macs, stem_params = _stem(arch)
    dim, hidden, prefix = arch.dim, int(arch.dim * arch.mlp_ratio), arch.num_prefix_tokens
    attention = mlp = 0
    for patches in arch.block_input_tokens:
        tokens = patches + prefix
        attention += tokens * 4 * dim**2 + 2 * tokens**2 * dim
        mlp += tokens * 2 * dim * hidden
    slimming_macs = slimming_params = 0
    for block, kept in arch.slimming.items():
        patches = arch.block_input_tokens[block]
        slimming_macs += patches * (dim * (dim // 2) + (dim // 2) * kept) + patches * kept * dim
        slimming_params += 2 * dim + _linear(dim, dim // 2) + _linear(dim // 2, kept) + 1
    block_params = 4 * dim + _linear(dim, 3 * dim, arch.qkv_bias) + _linear(dim, dim)
    block_params += _linear(dim, hidden) + _linear(hidden, dim) + 2 * dim * arch.layer_scale
    head = _linear(dim, arch.num_classes)
    heads = 1 + arch.distillation_token + arch.aux_head
    positions = (arch.num_patches + prefix) * dim
    tokens_params = prefix * dim
    params = (
        stem_params + arch.depth * block_params + slimming_params + 2 * dim + heads * head + positions + tokens_params
    )
    used_heads = 1 + arch.distillation_token
    macs = {
        "stem": stem_macs,
        "attention": attention,
        "mlp": mlp,
        "slimming": slimming_macs,
        "head": used_heads * dim * arch.num_classes,
    }
    return Cost(macs, params, *_reverse(arch))


def count_step_macs(config: Config) -> int:
    """Multiply-accumulates of a train step per image: the student's forward pass and twice that backward, once more
    what is recomputed (`remat`), the reverse modules (never recomputed) likewise, and the teachers' forward passes.

    Convolutional teachers are not counted here, see `plan`.
    """
    arch = config.model.architecture
    if not isinstance(arch, Architecture):
        raise ConfigError("model: only vision transformers can be counted")
    cost = count_cost(arch)
    total = 3 * sum(cost.macs.values()) - _first_layer(arch)  # The pictures need no gradient.
    if config.model.remat:
        total += cost.macs["attention"] + cost.macs["mlp"]
    if config.loss.token > 0:
        total += 3 * cost.reverse_macs
    if config.teacher is not None and config.loss.needs_teacher:
        teacher = config.teacher.model.architecture
        assert isinstance(teacher, Architecture)
        total += sum(count_cost(teacher).macs.values())
    return total


def _first_layer(arch: Architecture) -> int:
    if arch.stem == "patch":
        return _stem(arch)[0]
    features, kernel, stride = arch.conv_stem_layers[0]
    return (arch.image_size // stride) ** 2 * kernel**2 * arch.in_channels * features


def _stem(arch: Architecture) -> tuple[int, int]:
    macs = params = 0
    side, channels = arch.image_size, arch.in_channels
    for features, kernel, stride in arch.conv_stem_layers:
        side //= stride
        weights = kernel**2 * channels * features
        macs += side**2 * weights
        params += weights + 2 * features
        channels = features
    if arch.stem_projection:
        weights = arch.stem_projection**2 * channels * arch.dim
        macs += arch.num_patches * weights
        params += weights + arch.dim
    return macs, params


def _reverse(arch: Architecture) -> tuple[int, int]:
    """Parameters and MAC of the reverse modules: an MLP over tokens for every channel, one over channels per token."""
    patches, dim = arch.num_patches, arch.dim
    params = macs = 0
    for kept in arch.block_output_tokens[arch.first_reversed_block :]:
        params += 4 * dim + _linear(kept, 4 * patches) + _linear(4 * patches, patches)
        params += _linear(dim, 4 * dim) + _linear(4 * dim, dim)
        macs += dim * (kept * 4 * patches + 4 * patches * patches) + patches * 8 * dim**2
    return params, macs


def _linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + outputs * bias
