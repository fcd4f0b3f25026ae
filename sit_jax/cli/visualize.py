"""`sit visualize`."""

import argparse
import pathlib

from sit_jax.cli.verb import (
    TRAINED_MODEL,
    Verbs,
    add_checkpoint,
    add_images,
    add_kept_tokens,
    add_verb,
    integer,
    positive,
)


def add_parser(verbs: Verbs) -> None:
    """Adds the parser of `sit visualize`."""
    parser = add_verb(verbs, "visualize", run, "draw token maps and the attention of the class token")
    add = parser.add_argument
    add("source", metavar="MODEL", type=pathlib.Path, help=TRAINED_MODEL)
    add_images(parser, "*")
    add_checkpoint(parser)
    add_kept_tokens(parser)
    add("--split", help="instead of IMAGE: draw the first images of this split of a data set, such as test")
    add("--name", help="with --split: name of the data set; data.name of the run if not given")
    text = "with --split: folder of the data set; data.data_dir of the run if not given"
    add("--data_dir", metavar="FOLDER", help=text)
    text = "maximum number of images; if not given, 16 of a split and all files"
    add("--limit", metavar="N", type=positive, help=text)
    add("--output", metavar="FOLDER", type=pathlib.Path, help="folder of the figures; maps if not given")
    text = "write all arrays to a .npz file, or to one file per image in a folder; figures then need --output"
    add("--arrays", metavar="PATH", type=pathlib.Path, help=text)
    # A figure has no room for more than 32.
    tokens = integer(1, 32, "; --arrays holds all tokens")
    add(
        "--tokens",
        metavar="N",
        type=tokens,
        default=8,
        help="tokens shown per module, the most attended first, and blocks whose attention is shown",
    )
    add("--dpi", type=integer(20, 1200), default=150, help="dots per inch of the figures; 300 is good for print")
    add("--batch_size", metavar="N", type=positive, default=8, help="batch size")


def run(arguments: argparse.Namespace) -> None:
    """Writes figures and arrays of token maps."""
    from sit_jax.visual.visualize import FIGURES, OutputSettings, command

    figures = arguments.output or (FIGURES if arguments.arrays is None else None)
    output = OutputSettings(figures, arguments.arrays, arguments.tokens, arguments.dpi, arguments.batch_size)
    data = {"split": arguments.split, "name": arguments.name, "data_dir": arguments.data_dir}
    selected = (arguments.ema, arguments.step, arguments.kept_tokens)
    command(arguments.source, arguments.images, output, data, arguments.limit, *selected)
