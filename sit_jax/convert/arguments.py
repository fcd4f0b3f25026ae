"""The words of `sit convert`; light to import, since every command reads them."""

import argparse
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from sit_jax.argument_types import positive

if TYPE_CHECKING:
    from sit_jax.models.architecture import Architecture

# What options of the architecture begin with.
_PREFIX = "model."


class Options(NamedTuple):
    """What is read, and what is changed on the way.

    Attributes:
        fields: Fields of the architecture that the tensors do not tell, and `name`; see `settle.OPTIONS`.
        image_size: Another resolution, or None.
        num_classes: Another number of classes, or None.
        ema: The moving average instead of the weights, where there are both.
        reverse: Whether reverse modules are read where there are any.
        licence: What the weights may be used for, such as `MIT`; what the source says where None.
        like: A model that is taken for the one in the file, in what its tensors leave open; fields come before it.
    """

    fields: Mapping[str, Any] = {}
    image_size: int | None = None
    num_classes: int | None = None
    ema: bool = False
    reverse: bool = True
    licence: str | None = None
    like: "Architecture | None" = None


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Adds the words of `sit convert` to its parser."""
    sources = ".pth, .pt, .pth.tar, .safetensors or .npz file, model folder, or run"
    parser.add_argument("source", metavar="SOURCE", type=pathlib.Path, help=sources)
    destinations = "model folder (no suffix), or .pth or .safetensors file in the original's layout"
    parser.add_argument("dest", metavar="DEST", type=pathlib.Path, help=destinations)
    parser.add_argument("--image_size", type=positive, help="interpolate the positions to this resolution")
    parser.add_argument("--num_classes", type=positive, help="replace the heads by zeros for so many classes")
    parser.add_argument("--without_reverse", action="store_true", help="leave the reverse modules out")
    parser.add_argument("--ema", action="store_true", help="the moving average, where SOURCE holds one besides")
    parser.add_argument("--licence", metavar="TEXT", help="of the weights, for a model folder's config.json")
    parser.add_argument("--force", action="store_true", help="replace DEST if it is there")
    group = parser.add_argument_group("what tensors do not tell", "Needed where no named model has the shape found.")
    group.add_argument(f"--{_PREFIX}name", metavar="NAME", help="take the values below from a named model")
    group.add_argument(f"--{_PREFIX}num_heads", metavar="COUNT", type=positive, help="attention heads")
    group.add_argument(f"--{_PREFIX}residual_scale", metavar="NUMBER", type=float, help="divides residual branches")
    group.add_argument(f"--{_PREFIX}norm_eps", metavar="NUMBER", type=float, help="epsilon of the LayerNorms")
    group.add_argument(f"--{_PREFIX}image_size", metavar="PX", type=positive, help="side that the positions are for")
    group.add_argument(f"--{_PREFIX}stage_blocks", metavar="COUNT,COUNT,...", type=_counts, help="blocks per stage")
    group.add_argument(f"--{_PREFIX}keep_ratio", metavar="NUMBER", type=float, help="share of tokens a stage keeps")


def convert_options(arguments: argparse.Namespace) -> Options:
    """The options in parsed words."""
    fields = {key.removeprefix(_PREFIX): value for key, value in vars(arguments).items() if key.startswith(_PREFIX)}
    return Options(
        fields={key: value for key, value in fields.items() if value is not None},
        image_size=arguments.image_size,
        num_classes=arguments.num_classes,
        ema=arguments.ema,
        reverse=not arguments.without_reverse,
        licence=arguments.licence,
    )


def _counts(text: str) -> tuple[int, ...]:
    return tuple(positive(count) for count in text.split(","))
