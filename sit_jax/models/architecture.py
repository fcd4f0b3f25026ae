"""Architectures as plain values, used by the modules, the cost counter, the converters and the configs."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

from sit_jax.errors import ConfigError, require

Stem = Literal["patch", "conv4", "conv6", "conv7"]
Pool = Literal["token", "avg", "token_avg", "map"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]

# The total stride of the conv stems' strided convolutions, independent of patch_size.
CONV_STEM_STRIDE = 16
# Upper limit of all sizes; larger values indicate damaged data.
_LARGEST, _DEEPEST = 2**20, 2**12
_MAY_BE_0 = ("num_classes", "registers", "projection")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """Architecture of a vision transformer, with slimming (`stage_blocks` is set) or without (`stage_blocks` is empty).

    A slimmed model has stages; a token slimming module follows every stage except the last. Stage `i` has
    `token_counts[i]` patch tokens: `int(N * keep_ratio**i)` of the grid's `N` (the original's rule), or the value in
    `kept_tokens`.

    Attributes:
        family: Distinguishes this architecture from a RegNet.
        image_size: Height and width of the input in pixels: one number for a square, or both (`32,48` or `32x48` on
            the command line).
        in_channels: Channels of the input image.
        num_classes: Width of the classification head. 0 is a backbone without a head. In the configuration of a run
            with labels, 0 means that the data determines it.
        stem: `patch` is one strided convolution (ViT, DeiT); `conv4` and `conv6` are the 3x3 stems with BatchNorm of
            the paper's models; `conv7` is LV-ViT's, a 7x7 convolution, two 3x3 ones and a patch projection.
        stem_width: Channels of the `conv7` stem's convolutions; the other stems follow from `dim`.
        patch_size: Pixels per side of a patch. The conv stems reduce by 16 and accept nothing else.
        patch_bias: Whether the projection of the patches has a bias (not in CLIP).
        class_token: Whether there is a class token, the first token.
        registers: Number of learned tokens without a position, after the class token (DINOv2 with registers, DINOv3).
        positions: `learned`, a table that is added to the tokens, or `rope`, rotary positions of queries and keys as in
            DINOv3. A merged token's coordinates are the mean of its patches'.
        rope_theta: Base of the periods of `rope`.
        pre_norm: Whether there is a LayerNorm before the first block (CLIP).
        dim: Embedding dimension (width of a token).
        depth: Number of transformer blocks.
        num_heads: Attention heads; divides `dim`.
        mlp_ratio: Hidden width of a block's MLP, relative to `dim`.
        mlp: `plain`, two linear layers with the activation between them, or `swiglu`, whose hidden units are gated by
            as many others (DINOv2 giant).
        activation: Activation of the MLPs: exact GELU, its approximation `gelu_tanh` (SigLIP), or `quick_gelu`,
            `x sigmoid(1.702 x)` (OpenAI's CLIP). `swiglu` does not use it.
        qkv_bias: Whether the query, key and value projections have a bias.
        key_bias: Whether the key projection has a bias, if the others have one (not in DINOv3).
        residual_scale: Divisor of the residual branches (LV-ViT's `skip_lam`).
        layer_scale: Whether residual branches are multiplied by a learned scale per channel (CaiT, DeiT-III).
        norm_eps: Epsilon of every LayerNorm in the blocks and before the head.
        pool: What the head reads: the class `token`; `avg`, the mean of the patch tokens, weighted by the patches
            merged into each; `token_avg`, both of them side by side (DINOv2's classifier); `map`, attention of one
            learned query (SigLIP).
        norm_after_pool: Whether the last LayerNorm is after the `avg` pool (MAE's fine-tuning) and not before it.
        projection: Width of the projection without bias after the pool (CLIP's embedding); 0 for none.
        distillation_token: Whether there is a second learned token with a head, trained on a CNN teacher's hard labels
            (DeiT).
        aux_head: Whether there is the per-patch head of token-labelled teachers; only token labelling, and
            custom loss terms, train or use it.
        stage_blocks: Blocks per stage; empty for a model without slimming.
        keep_ratio: Fraction of the tokens that each stage keeps of the previous one.
        reducer: Module that reduces the patch tokens between stages: `slim` (token slimming, of the paper), another
            registered name, or `MODULE:CLASS`.
        kept_tokens: Explicit patch tokens per stage, the first of which is the whole grid; overrides `keep_ratio`.
        kept_tokens_choices: Token schedules that one model is trained for, from the largest, which is also
            `kept_tokens`, to the smallest; empty for a model with one schedule. See `sit_jax.models.cut`.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    family: Literal["vit"] = "vit"
    image_size: int | tuple[int, int] = 224
    in_channels: int = 3
    num_classes: int = 1000
    stem: Stem = "patch"
    stem_width: int = 64
    patch_size: int = 16
    patch_bias: bool = True
    class_token: bool = True
    registers: int = 0
    positions: Literal["learned", "rope"] = "learned"
    rope_theta: float = 100.0
    pre_norm: bool = False
    dim: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    mlp: Literal["plain", "swiglu"] = "plain"
    activation: Activation = "gelu"
    qkv_bias: bool = True
    key_bias: bool = True
    residual_scale: float = 1.0
    layer_scale: bool = False
    norm_eps: float = 1e-6
    pool: Pool = "token"
    norm_after_pool: bool = False
    projection: int = 0
    distillation_token: bool = False
    aux_head: bool = False
    stage_blocks: tuple[int, ...] = ()
    keep_ratio: float | None = None
    kept_tokens: tuple[int, ...] = ()
    kept_tokens_choices: tuple[tuple[int, ...], ...] = ()
    reducer: str = "slim"

    def __post_init__(self) -> None:
        for name in ("stage_blocks", "kept_tokens"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        choices = tuple(tuple(counts) for counts in self.kept_tokens_choices)
        object.__setattr__(self, "kept_tokens_choices", choices)
        if choices and not self.kept_tokens:
            object.__setattr__(self, "kept_tokens", choices[0])
        if not isinstance(self.image_size, int):
            size = tuple(self.image_size)
            require(len(size) == 2, "image_size", f"must be one number, or height and width, got {self.image_size!r}")
            # Squares have one form, so that equal architectures compare equal.
            object.__setattr__(self, "image_size", size[0] if size[0] == size[1] else size)
        self._check_sizes()
        self._check_tokens()
        self._check_stages()

    def _check_sizes(self) -> None:
        sizes = ("in_channels", "stem_width", "patch_size", "dim", "depth", "num_heads")
        values = [("image_size", size) for size in self.image_shape] + [(name, getattr(self, name)) for name in sizes]
        values += [(name, getattr(self, name)) for name in _MAY_BE_0]
        for name, value in values:
            least, most = 0 if name in _MAY_BE_0 else 1, _DEEPEST if name == "depth" else _LARGEST
            problem = f"must be a whole number from {least} to {most}, got {value!r}"
            require(isinstance(value, int) and least <= value <= most, name, problem)
        for name in ("mlp_ratio", "residual_scale", "norm_eps", "rope_theta"):
            value = getattr(self, name)
            require(0 < value < _LARGEST, name, f"must be above 0 and at most {_LARGEST}, got {value!r}")
        require(int(self.dim * self.mlp_ratio) >= 1, "mlp_ratio", f"{self.mlp_ratio!r} leaves an MLP without width")
        require(self.stem in get_args(Stem), "stem", f"must be one of {', '.join(get_args(Stem))}, got {self.stem!r}")
        if self.stem != "patch":
            problem = f"must be {CONV_STEM_STRIDE} with the {self.stem} stem, got {self.patch_size}"
            require(self.patch_size == CONV_STEM_STRIDE, "patch_size", problem)
            divides = self.dim % 8 == 0 or self.stem == "conv7"
            require(divides, "dim", f"{self.dim} does not divide by 8, as the {self.stem} stem needs")
        for side in self.image_shape:
            problem = f"{side} does not divide by patch_size {self.patch_size}"
            require(side % self.patch_size == 0, "image_size", problem)
        require(self.dim % self.num_heads == 0, "dim", f"{self.dim} does not divide by num_heads {self.num_heads}")

    def _check_tokens(self) -> None:
        choices = {"pool": get_args(Pool), "activation": get_args(Activation)}
        choices |= {"mlp": ("plain", "swiglu"), "positions": ("learned", "rope")}
        for name, known in choices.items():
            value = getattr(self, name)
            require(value in known, name, f"must be one of {', '.join(known)}, got {value!r}")
        reads_token = self.pool in ("token", "token_avg") or self.distillation_token
        require(self.class_token or not reads_token, "class_token", "must be True if the head reads it: set pool=avg")
        problem = f"needs pool=avg, got {self.pool}"
        require(self.pool == "avg" or not self.norm_after_pool, "norm_after_pool", problem)
        problem = "needs pool=token and no registers or pre_norm"
        plain = self.pool == "token" and not self.registers and not self.pre_norm
        require(plain or not self.distillation_token, "distillation_token", problem)
        require(self.pool != "map" or not self.aux_head, "aux_head", "needs a pool other than map")
        whole = self.dim // max(1, self.num_heads) % 4 == 0
        require(whole or self.positions != "rope", "positions", "rope needs heads whose width divides by 4")

    def _check_stages(self) -> None:
        blocks, counts, ratio = self.stage_blocks, self.kept_tokens, self.keep_ratio
        if not blocks:
            require(ratio is None, "keep_ratio", "is given, but stage_blocks is empty")
            given = "kept_tokens_choices" if self.kept_tokens_choices else "kept_tokens"
            require(not counts, given, "is given, but stage_blocks is empty")
            return
        if self.kept_tokens_choices:
            self._check_choices()
        total, patches = sum(blocks), self.num_patches
        require(min(blocks) >= 1, "stage_blocks", f"{blocks} has a stage with no block")
        require(total == self.depth, "stage_blocks", f"{blocks} adds up to {total}, but depth is {self.depth}")
        if not counts:
            problem = f"must be above 0 and at most 1 where stage_blocks is given, got {ratio}"
            require(ratio is not None and 0 < ratio <= 1, "keep_ratio", problem)
            counts = self.token_counts
            problem = f"{ratio} leaves fewer than one token in some stage: {counts} of {patches}"
            require(min(counts) >= 1, "keep_ratio", problem)
            return
        self._check_schedule("kept_tokens", counts)

    def _check_schedule(self, name: str, counts: tuple[int, ...]) -> None:
        stages, patches = len(self.stage_blocks), self.num_patches
        require(len(counts) == stages, name, f"has {len(counts)} entries for {stages} stages")
        require(counts[0] == patches, name, f"must begin with the {patches} tokens of the grid, got {counts[0]}")
        falling = list(counts) == sorted(counts, reverse=True)
        require(falling and counts[-1] >= 1, name, f"{counts} must fall, and keep at least one token")

    def _check_choices(self) -> None:
        name, choices = "kept_tokens_choices", self.kept_tokens_choices
        require(len(self.stage_blocks) > 1, name, "needs a slimmed model: stage_blocks has one stage")
        for counts in choices:
            self._check_schedule(name, counts)
        for larger, counts in itertools.pairwise(choices):
            fits = all(mine <= most for mine, most in zip(counts, larger, strict=True))
            require(fits, name, f"{counts} must be at most the one before, {larger}, in each stage")
        require(1 < len(choices) == len(set(choices)), name, f"must be at least two different schedules, got {choices}")
        problem = f"must be empty or the first of kept_tokens_choices, {choices[0]}, got {self.kept_tokens}"
        require(self.kept_tokens == choices[0], "kept_tokens", problem)

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""
        return patch_grid(self.image_size, 1)

    @property
    def image_size_text(self) -> str:
        """The image size in messages: `224`, or height and width, `224x320`."""
        return str(self.image_size) if isinstance(self.image_size, int) else "x".join(map(str, self.image_size))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches."""
        return patch_grid(self.image_size, self.patch_size)

    @property
    def num_patches(self) -> int:
        """Number of patch tokens before any slimming."""
        return math.prod(self.grid)

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens that are not patches: class token, distillation token and registers."""
        return self.class_token + self.distillation_token + self.registers

    @property
    def pooled_dim(self) -> int:
        """Width of the pool's output."""
        return self.dim * (2 if self.pool == "token_avg" else 1)

    @property
    def feature_dim(self) -> int:
        """Width of the features that the head reads: of the projection, if there is one, else of the pool."""
        return self.projection or self.pooled_dim

    @property
    def mlp_hidden(self) -> tuple[int, int]:
        """Width of the first linear layer of an MLP, and of the input of the second one."""
        hidden = int(self.dim * self.mlp_ratio)
        return hidden * (2 if self.mlp == "swiglu" else 1), hidden

    @property
    def is_slimmed(self) -> bool:
        """Whether the model has a token slimming module."""
        return len(self.stage_blocks) > 1

    @property
    def token_counts(self) -> tuple[int, ...]:
        """Patch tokens in each stage; a single stage with all tokens if there is no slimming."""
        if self.kept_tokens:
            return self.kept_tokens
        ratio = 1.0 if self.keep_ratio is None else self.keep_ratio
        return tuple(int(self.num_patches * ratio**stage) for stage in range(max(1, len(self.stage_blocks))))

    @property
    def slimming(self) -> dict[int, int]:
        """Block index -> tokens kept by the slimming module after that block, in order."""
        ends = [sum(self.stage_blocks[: stage + 1]) - 1 for stage in range(len(self.stage_blocks) - 1)]
        return dict(zip(ends, self.token_counts[1:], strict=False))

    @property
    def block_input_tokens(self) -> tuple[int, ...]:
        """Number of patch tokens in the input of each block."""
        blocks = self.stage_blocks or (self.depth,)
        return tuple(n for n, repeats in zip(self.token_counts, blocks, strict=True) for _ in range(repeats))

    @property
    def block_output_tokens(self) -> tuple[int, ...]:
        """Number of patch tokens after each block and its slimming module: the input of the reverse modules."""
        return tuple(self.slimming.get(block, n) for block, n in enumerate(self.block_input_tokens))

    @property
    def first_reversed_block(self) -> int:
        """Index of the first block with a reverse module; the depth if there is no slimming."""
        return min(self.slimming, default=self.depth)

    @property
    def conv_stem_layers(self) -> tuple[tuple[int, int, int], ...]:
        """(features, kernel, stride) of each convolution with BatchNorm, in order; empty for the patch stem."""
        if self.stem == "patch":
            return ()
        if self.stem == "conv7":
            return ((self.stem_width, 7, 2), (self.stem_width, 3, 1), (self.stem_width, 3, 1))
        eighth = self.dim // 8
        extra = ((eighth, 3, 1), (eighth, 3, 1)) if self.stem == "conv6" else ()
        return ((eighth, 3, 2), *extra, (self.dim // 4, 3, 2), (self.dim // 2, 3, 2), (self.dim, 3, 2))

    @property
    def stem_projection(self) -> int:
        """Patch size of the strided projection that ends the stem; 0 for stems that end with a BatchNorm."""
        return {"patch": self.patch_size, "conv7": self.patch_size // 2}.get(self.stem, 0)

    def without_slimming(self) -> "Architecture":
        """Returns the teacher's architecture: the same without slimming modules and without distillation token."""
        return dataclasses.replace(
            self,
            stage_blocks=(),
            keep_ratio=None,
            kept_tokens=(),
            kept_tokens_choices=(),
            reducer="slim",
            distillation_token=False,
        )


def patch_grid(image_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Returns rows and columns of the patches of an image size: one number for a square, or height and width."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return height // patch_size, width // patch_size


def architecture_from_dict(values: Mapping[str, Any], where: str = "") -> Architecture:
    """Builds an architecture from a mapping of its fields.

    Args:
        values: Field name -> value.
        where: Prefix of the field names in messages, such as `model.`.

    Raises:
        ConfigError: A field is unknown or has an invalid value; the message begins with the field's name.
    """
    known = sorted(field.name for field in dataclasses.fields(Architecture))
    for name in values:
        require(name in known, f"{where}{name}", f"is not a field of Architecture; there are {', '.join(known)}")
    try:
        return Architecture(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}{error.key}", error.problem) from None
