"""Infers the architecture from the names and shapes of tensors, as far as they determine it."""

import itertools
import math
import re
from typing import NamedTuple

from sit_jax.config import JsonObject
from sit_jax.errors import ConfigError, UserError
from sit_jax.io.convert.layouts import Layout, Shapes, find_layout
from sit_jax.models.architecture import CONV_STEM_STRIDE


class Inferred(NamedTuple):
    """An architecture inferred from a file's tensors.

    `fields` has `num_heads` only if the layout determines it, `num_classes` only if there is a head. `kept` are the
    tokens that each slimming module keeps, in order.
    """

    layout: Layout
    fields: JsonObject
    kept: tuple[int, ...]
    has_rtsm: bool
    class_position: bool


class Positions(NamedTuple):
    """Known facts about a table of position embeddings; `likely_size` is assumed if nothing else determines the size.

    `source` is where `image_size` is given, for messages.
    """

    image_size: object = None
    class_position: bool | None = None
    likely_size: int | None = None
    source: str = "model.image_size"


def infer(shapes: Shapes, known: Positions | None = None) -> Inferred:
    """Infers an architecture from the tensors' names and shapes, as far as they determine it.

    Raises a UserError if the layout is unknown, or tensors that determine the model's size are missing.
    """
    known, layout = known or Positions(), find_layout(shapes)
    if layout is None:
        some = ", ".join(sorted(shapes)[:4]) or "nothing"
        raise UserError(f"no vision transformer of a known layout; it holds {some}{' ...' if len(shapes) > 4 else ''}")
    # Names that only another layout uses are not read here; they are reported as unexpected in the end.
    shapes = {name: shape for name, shape in shapes.items() if layout.knows(name)}
    look = _Look(layout, shapes)
    stem = _stem(shapes)
    positions = look.shape("pos_embed", 3)
    dim = positions[2]
    kernel = look.shape("patch_embed.conv1.weight" if stem["stem"] != "patch" else "patch_embed.proj.weight", 4)
    patch_size = kernel[2] if stem["stem"] == "patch" else CONV_STEM_STRIDE
    layer_scale, distilled = look.has("blocks.0.ls1.gamma"), "dist_token" in shapes
    if layout.prefixes:  # The layouts of google-research, whose class token always has a position.
        known = known._replace(class_position=True)
    prefix = prefix_positions(positions[1], patch_size, distilled, layer_scale, known) if layout.plain else 1
    layout = find_layout(shapes, prefix) or layout
    patches = positions[1] - prefix
    if not _is_square(patches) or dim == 0:
        raise UserError(f"positions for {patches} patches, which are not a square grid")
    hidden = look.shape("blocks.0.mlp.fc1.weight", 2)[0]
    fields: JsonObject = {
        **stem,
        "image_size": round(patches**0.5) * patch_size,
        "in_channels": kernel[1],
        "patch_size": patch_size,
        "dim": dim,
        "depth": len(_numbers(shapes, r"blocks\.(\d+)\.|Transformer/encoderblock_(\d+)/")),
        "mlp_ratio": hidden_ratio(hidden, dim),
        "qkv_bias": look.has("blocks.0.attn.qkv.bias"),
        "layer_scale": layer_scale,
        "distillation_token": distilled,
        "aux_head": "aux_head.weight" in shapes,
    }
    if look.has("head.weight"):
        fields["num_classes"] = look.shape("head.weight", 2)[0]
    query = shapes.get("Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel", ())
    if len(query) == 3:
        fields["num_heads"] = query[1]
    modules = len(_numbers(shapes, r"tsm\.(\d+)\.|cluster_layers\.(\d+)\.weight\.3\."))
    kept = tuple(look.shape(f"tsm.{i}.weight.3.weight", 2)[0] for i in range(modules))
    stages = _stages_from_rtsm(shapes, patches, kept, fields["depth"])
    if stages:
        fields["stage_blocks"] = stages
    return Inferred(layout, fields, kept, any(name.startswith("rtsm.") for name in shapes), prefix > 0)


def prefix_positions(count: int, patch_size: int, distilled: bool, layer_scale: bool, known: Positions) -> int:
    """Returns how many positions of a plain ViT belong to class and distillation tokens; DeiT-III has none for them.

    The same count can be a square grid alone, or the tokens' positions and a non-square grid: 196 is 14x14, or a class
    token and 13x15. The image size decides; if it is unknown, layer scale does, which DeiT-III's models have.
    Raises a UserError if the image size is another one, or the grid is, or may be, not square.
    """
    usual = 2 if distilled else 1
    allowed = {None: (usual, 0), True: (usual,), False: (0,)}[known.class_position]
    if known.image_size is not None:
        side = known.image_size if type(known.image_size) is int else 0
        prefix = count - (side // patch_size) ** 2
        if side < patch_size or side % patch_size or prefix not in allowed:
            problem = f"is {str(known.image_size)[:50]}, but there are {count} positions for patches of {patch_size} px"
            raise ConfigError(known.source, problem)
        return prefix
    square = [prefix for prefix in allowed if _is_square(count - prefix)]
    if not square:
        raise UserError(f"{count} positions are not those of a square grid; only square images are supported")
    prefix, size = square[0], round((count - square[0]) ** 0.5) * patch_size
    if prefix == usual or known.class_position is not None or layer_scale or size == known.likely_size:
        return prefix
    raise UserError(
        f"{count} positions are those of {size}x{size} px where the class token has none, or of images that are not "
        f"square, which are not supported: give `sit convert --model.image_size {size}` if it is the former"
    )


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


class _Look(NamedTuple):
    """Shapes of a file's tensors, accessed by the original's names."""

    layout: Layout
    shapes: Shapes

    def has(self, key: str) -> bool:
        return all(name in self.shapes for name in self.layout.source(key).names)

    def shape(self, key: str, rank: int) -> tuple[int, ...]:
        """Returns the shape in PyTorch's order."""
        name = self.layout.source(key).names[0]
        if name not in self.shapes:
            raise UserError(f"missing {name}, without which the model's size is not known")
        shape = self.shapes[name]
        if len(shape) != rank:
            raise UserError(f"{name} has shape {shape}, not {rank} axes")
        if not self.layout.prefixes or rank == 3:  # As in PyTorch; those of google-research are transposed.
            return shape
        return (shape[3], shape[2], shape[0], shape[1]) if rank == 4 else shape[::-1]


def _stem(shapes: Shapes) -> JsonObject:
    first = shapes.get("patch_embed.conv1.weight")
    if first is None:
        return {"stem": "patch"}
    if len(first) == 4 and first[-1] == 7:
        return {"stem": "conv7", "stem_width": first[0]}
    return {"stem": "conv6" if "patch_embed.conv6.weight" in shapes else "conv4"}


def hidden_ratio(hidden: int, dim: int) -> float:
    """Returns the `mlp_ratio` of an MLP's hidden width."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim


def _numbers(shapes: Shapes, pattern: str) -> set[str]:
    matches = (re.match(pattern, name) for name in shapes)
    return {match[match.lastindex or 0] for match in matches if match}


def _stages_from_rtsm(shapes: Shapes, patches: int, kept: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """Returns the blocks per stage: the input of a reverse module has as many tokens as its block outputs.

    The result is empty if there are no reverse modules, or if two stages keep the same number of tokens.
    """
    blocks = sorted(int(number) for number in _numbers(shapes, r"rtsm\.(\d{1,6})\."))
    inputs = [shapes.get(f"rtsm.{block}.mlp1.fc1.weight", ()) for block in blocks]
    if not kept or blocks != list(range(depth - len(blocks), depth)) or any(len(shape) != 2 for shape in inputs):
        return ()
    counts = [patches] * (depth - len(blocks)) + [shape[1] for shape in inputs]
    changes = zip([patches, *counts], counts, strict=False)
    ends = [block for block, (before, after) in enumerate(changes) if before != after]
    if tuple(counts[end] for end in ends) != kept:
        return ()
    edges = [-1, *ends, depth - 1]
    return tuple(later - earlier for earlier, later in itertools.pairwise(edges))
