"""`sit visualize`."""

import argparse
import pathlib
from typing import Any

from sit_jax.cli.argument_types import between, positive
from sit_jax.cli.runtime import set_log_levels
from sit_jax.cli.verb import add_checkpoint, add_verb

# More have no room side by side.
_MOST_TOKENS = 32


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parser = add_verb(verbs, "visualize", run, "draw token maps and the attention of the class token")
    parser.add_argument("source", metavar="MODEL", type=pathlib.Path, help="a run's folder or a model folder")
    parser.add_argument(
        "pictures", metavar="PICTURE", nargs="*", help="files, folders or glob patterns; - reads a list from stdin"
    )
    add_checkpoint(parser)
    parser.add_argument("--split", help="instead of PICTURE: the first images of a data set's split, such as test")
    parser.add_argument("--name", help="with --split: name of the data set, if not the model's own")
    parser.add_argument("--data_dir", help="with --split: its folder, if not the one of training")
    parser.add_argument("--limit", type=positive, help="maximum number of images; all if not given, or 16 of a split")
    parser.add_argument(
        "--output", type=pathlib.Path, help="output folder of the figures, one per image; maps if not given"
    )
    arrays = "all arrays in one .npz file, or a folder for one file per image; alone, no figures are drawn"
    parser.add_argument("--arrays", metavar="PLACE", type=pathlib.Path, help=arrays)
    parser.add_argument(
        "--tokens",
        type=between(1, _MOST_TOKENS, "--arrays holds all tokens"),
        default=8,
        help="tokens shown per module: the most attended ones",
    )
    parser.add_argument(
        "--dpi", type=between(20, 1200), default=150, help="dots per inch of the figures; 300 for print"
    )
    parser.add_argument("--batch_size", type=positive, default=8, help="batch size")
    parser.epilog = "Exit code 1 if some images could not be decoded: they are listed and skipped."


def run(arguments: argparse.Namespace, _: list[str]) -> None:
    """Draws figures, or writes arrays."""
    set_log_levels()
    from sit_jax.visual.visualize import FIGURES, OutputSettings, command

    default = FIGURES if arguments.arrays is None else None
    figures = arguments.output or default
    output = OutputSettings(figures, arguments.arrays, arguments.tokens, arguments.dpi, arguments.batch_size)
    data = {"split": arguments.split, "name": arguments.name, "data_dir": arguments.data_dir}
    command(arguments.source, arguments.pictures, output, data, arguments.limit, arguments.ema, arguments.step)
