"""Infers the architecture from the names and shapes of tensors, as far as they determine it."""

import itertools
import math
import re
from typing import NamedTuple

from sit_jax.config import JsonObject
from sit_jax.errors import ConfigError, UserError
from sit_jax.io.convert.layouts import SCANNED, Layout, Shapes, find_layout
from sit_jax.models.architecture import CONV_STEM_STRIDE, patch_grid

_BLOCK = r"blocks\.(\d+)\.|Transformer/encoderblock_(\d+)/|(?:visual\.)?transformer\.resblocks\.(\d+)\."


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

    `source` is where `image_size` is given, for messages; `positions` is `rope` if a description says so.
    """

    image_size: object = None
    class_position: bool | None = None
    likely_size: object = None
    source: str = "model.image_size"
    positions: str = "learned"


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
    dim = look.shape("blocks.0.norm1.weight", 1)[0]
    kernel = look.shape("patch_embed.conv1.weight" if stem["stem"] != "patch" else "patch_embed.proj.weight", 4)
    patch_size = kernel[2] if stem["stem"] == "patch" else CONV_STEM_STRIDE
    tokens = _tokens(look)
    layer_scale = look.has("blocks.0.ls1.gamma")
    if layout.class_position is not None:
        known = known._replace(class_position=layout.class_position)
    if look.has("pos_embed"):
        # OpenCLIP's has no axis for the batch.
        count, usual = look.shape("pos_embed")[-2], tokens["class_token"] + tokens["distillation_token"]
        prefix = prefix_positions(count, patch_size, usual, layer_scale, known) if layout.plain else 1
        layout = find_layout(shapes, prefix) or layout
        size = _image_size(count - prefix, patch_size, known)
    elif known.positions == "rope" or "rope_embed.periods" in shapes:
        prefix, tokens["positions"] = 0, "rope"
        if known.image_size is None:
            raise UserError("rotary positions do not determine the image size: give --model.image_size")
        size = sides(known.image_size, known.source)
    else:
        raise UserError("there are no positions: rotary ones are in no tensor, and only a config.json tells of them")
    narrow, wide = (look.shape(f"blocks.0.mlp.{name}.weight", 2) for name in ("fc2", "fc1"))
    qkv_bias, parts = look.has("blocks.0.attn.qkv.bias"), look.has("blocks.0.attn.q_bias")
    fields: JsonObject = {
        **stem,
        **tokens,
        "image_size": size,
        "in_channels": kernel[1],
        "patch_size": patch_size,
        "patch_bias": stem["stem"] not in ("patch", "conv7") or look.has("patch_embed.proj.bias"),
        "dim": dim,
        "depth": _depth(look),
        "mlp": "swiglu" if wide[0] == 2 * narrow[1] else "plain",
        "mlp_ratio": hidden_ratio(narrow[1], dim),
        "qkv_bias": qkv_bias or parts,
        "key_bias": qkv_bias or not parts,
        "layer_scale": layer_scale,
        "pre_norm": look.has("norm_pre.weight"),
        "projection": _projection(look),
        "aux_head": "aux_head.weight" in shapes,
    }
    if look.has("head.weight"):
        fields["num_classes"] = look.shape("head.weight", 2)[0]
    if layout.prefixes:  # The layouts of google-research, where heads are an axis.
        fields["num_heads"] = look.shape("blocks.0.attn.qkv.weight", 3)[1]
    modules = len(_numbers(shapes, r"tsm\.(\d+)\.|cluster_layers\.(\d+)\.weight\.3\."))
    kept = tuple(look.shape(f"tsm.{i}.weight.3.weight", 2)[0] for i in range(modules))
    patches = math.prod(patch_grid(size, patch_size))
    stages = _stages_from_rtsm(shapes, patches, kept, fields["depth"])
    if stages:
        fields["stage_blocks"] = stages
    return Inferred(layout, fields, kept, any(name.startswith("rtsm.") for name in shapes), prefix > 0)


def prefix_positions(count: int, patch_size: int, usual: int, layer_scale: bool, known: Positions) -> int:
    """Returns how many positions of a plain ViT belong to its `usual` prefix tokens: all, or none as in DeiT-III.

    The same count can be a square grid alone, or the tokens' positions and a non-square grid: 196 is 14x14, or a class
    token and 13x15. The image size decides; if it is unknown, layer scale does, which DeiT-III's models have.
    Raises a UserError if the image size is another one, or the grid is, or may be, not square.
    """
    allowed = {None: (usual, 0), True: (usual,), False: (0,)}[known.class_position]
    if known.image_size is not None:
        size = known.image_size
        sides = (size, size) if type(size) is int else tuple(size) if isinstance(size, list | tuple) else ()
        whole = len(sides) == 2 and all(type(x) is int and x >= patch_size and x % patch_size == 0 for x in sides)
        prefix = count - math.prod(side // patch_size for side in sides) if whole else -1
        if prefix not in allowed:
            problem = f"is {str(size)[:50]}, but there are {count} positions for patches of {patch_size} px"
            raise ConfigError(known.source, problem)
        return prefix
    square = [prefix for prefix in allowed if _is_square(count - prefix)]
    if not square:
        advice = "give sit convert --model.image_size HEIGHTxWIDTH"
        raise UserError(f"{count} positions are not those of a square grid: {advice}")
    prefix, size = square[0], round((count - square[0]) ** 0.5) * patch_size
    if prefix == usual or known.class_position is not None or layer_scale or size == known.likely_size:
        return prefix
    raise UserError(
        f"{count} positions are those of {size}x{size} px where the class token has none, or of images that are not "
        f"square: give sit convert --model.image_size {size} if it is the former, else HEIGHTxWIDTH"
    )


def sides(size: object, source: str) -> int | tuple[int, int]:
    """Returns an image size that a user or a description gives: one number, or height and width."""
    match list(size) if isinstance(size, tuple) else size:
        case int(side):
            return side
        case [int(height), int(width)]:
            return height, width
    raise ConfigError(source, f"must be one number, or height and width, got {str(size)[:50]}")


def _image_size(patches: int, patch_size: int, known: Positions) -> int | tuple[int, int]:
    """Returns the image size for a number of patches: the known one, or that of a square."""
    if isinstance(known.image_size, list | tuple):
        return sides(known.image_size, known.source)
    if not _is_square(patches):
        raise UserError(f"positions for {patches} patches, which are not a square grid")
    return round(patches**0.5) * patch_size


def _tokens(look: "_Look") -> JsonObject:
    """Returns the fields of prefix tokens and pool that the tensors determine."""
    fields: JsonObject = {
        "class_token": look.has("cls_token"),
        "distillation_token": "dist_token" in look.shapes,
        "registers": look.shape("reg_token", 3)[1] if look.has("reg_token") else 0,
    }
    if look.has("attn_pool.latent"):
        fields["pool"] = "map"
    elif "fc_norm.weight" in look.shapes:
        fields |= {"pool": "avg", "norm_after_pool": True}
    elif not fields["class_token"]:
        fields["pool"] = "avg"
    return fields


def _depth(look: "_Look") -> int:
    scanned = look.shapes.get(f"{SCANNED}LayerNorm_0/scale")
    return scanned[0] if scanned else len(_numbers(look.shapes, _BLOCK))


def _projection(look: "_Look") -> int:
    if not look.has("projection.weight"):
        return 0
    shape = look.shape("projection.weight", 2)
    return shape[1] if look.layout.name.startswith("OpenCLIP") else shape[0]


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


class _Look(NamedTuple):
    """Shapes of a file's tensors, accessed by the original's names."""

    layout: Layout
    shapes: Shapes

    def has(self, key: str) -> bool:
        return all(name in self.shapes for name in self.layout.source(key).names)

    def shape(self, key: str, rank: int | None = None) -> tuple[int, ...]:
        """Returns the shape in PyTorch's order; raises a UserError if it is missing or has another rank."""
        name = self.layout.source(key).names[0]
        if name not in self.shapes:
            raise UserError(f"missing {name}, without which the model's size is not known")
        shape = self.shapes[name][1 if name.startswith(SCANNED) else 0 :]
        if rank is not None and len(shape) != rank:
            raise UserError(f"{name} has shape {shape}, not {rank} axes")
        if not self.layout.prefixes or rank in (None, 3):  # As in PyTorch; those of google-research are transposed.
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
