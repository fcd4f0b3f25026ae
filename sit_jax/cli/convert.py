"""`sit convert`."""

import argparse
import pathlib
from typing import TYPE_CHECKING, Any

from sit_jax.cli.argument_types import positive
from sit_jax.cli.runtime import set_log_levels
from sit_jax.cli.verb import add_verb

if TYPE_CHECKING:
    from sit_jax.io.convert.options import Options

# What options of the architecture begin with.
_PREFIX = "model."


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parser = add_verb(verbs, "convert", run, "read weights of other programs, and of runs, and write them")
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


def run(arguments: argparse.Namespace, _: list[str]) -> None:
    """Converts a file, a model folder or a run."""
    set_log_levels()
    from sit_jax.io.convert.convert import convert

    convert(arguments.source, arguments.dest, _options(arguments), arguments.force, log=print)
    print(f"Written: {arguments.dest}")


def _options(arguments: argparse.Namespace) -> "Options":
    """The options in parsed words."""
    from sit_jax.io.convert.options import Options

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
