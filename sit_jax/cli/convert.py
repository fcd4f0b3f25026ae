"""`sit convert`."""

import argparse
import pathlib
from typing import TYPE_CHECKING, Any

from sit_jax.cli.argument_types import positive
from sit_jax.cli.runtime import set_log_levels
from sit_jax.cli.verb import add_option, add_verb

if TYPE_CHECKING:
    from sit_jax.io.convert.options import Options

# What options of the architecture begin with.
_PREFIX = "model."


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parser = add_verb(verbs, "convert", run, "convert weights of other programs and of runs")
    sources = ".pth, .pt or .pth.tar file (needs PyTorch), .safetensors or .npz file, model folder, or run"
    parser.add_argument("source", metavar="SOURCE", type=pathlib.Path, help=sources)
    destinations = "model folder (no suffix), or .pth or .safetensors file in the original's layout"
    parser.add_argument("dest", metavar="DEST", type=pathlib.Path, help=destinations)
    parser.add_argument("--image_size", type=positive, help="interpolate the position embeddings to this resolution")
    parser.add_argument(
        "--num_classes", type=positive, help="replace the heads by zero-initialized ones for this many classes"
    )
    text = "leave out the reverse modules (RTSM)"
    add_option(parser, "--without_rtsm", "--without_reverse", action="store_true", help=text)
    parser.add_argument("--ema", action="store_true", help="the moving average, if SOURCE holds one")
    parser.add_argument(
        "--licence", metavar="TEXT", help="license of the weights, for the config.json of a model folder"
    )
    parser.add_argument("--force", action="store_true", help="overwrite DEST")
    group = parser.add_argument_group(
        "hyperparameters that tensor shapes do not determine", "Needed if no named model has the shapes found."
    )
    group.add_argument(f"--{_PREFIX}name", metavar="NAME", help="take the values below from a named model")
    group.add_argument(f"--{_PREFIX}num_heads", metavar="COUNT", type=positive, help="attention heads")
    group.add_argument(
        f"--{_PREFIX}residual_scale", metavar="NUMBER", type=float, help="divisor of the residual branches"
    )
    group.add_argument(f"--{_PREFIX}norm_eps", metavar="NUMBER", type=float, help="epsilon of the LayerNorms")
    group.add_argument(
        f"--{_PREFIX}image_size", metavar="PX", type=positive, help="image size that the position embeddings are for"
    )
    group.add_argument(f"--{_PREFIX}stage_blocks", metavar="COUNT,COUNT,...", type=_counts, help="blocks per stage")
    text = "fraction of the tokens that a stage keeps"
    group.add_argument(f"--{_PREFIX}keep_ratio", metavar="NUMBER", type=float, help=text)


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
        reverse=not arguments.without_rtsm,
        licence=arguments.licence,
    )


def _counts(text: str) -> tuple[int, ...]:
    return tuple(positive(count) for count in text.split(","))
