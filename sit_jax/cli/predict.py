"""`sit predict`."""

import argparse
import pathlib
import sys
from typing import Any

from sit_jax.cli.argument_types import positive
from sit_jax.cli.runtime import keep_memory, reader_gone, set_log_levels
from sit_jax.cli.verb import ANY_MODEL, add_checkpoint, add_verb


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parser = add_verb(verbs, "predict", run, "classify images")
    parser.add_argument("source", metavar="MODEL", type=pathlib.Path, help=ANY_MODEL)
    parser.add_argument(
        "pictures", metavar="PICTURE", nargs="+", help="files, folders or glob patterns; - reads a list from stdin"
    )
    add_checkpoint(parser)
    parser.add_argument("--top", type=positive, default=5, help="classes printed for each image, most likely first")
    parser.add_argument("--format", default="table", choices=("table", "jsonl", "csv"), help="output format")
    parser.add_argument("--batch_size", type=positive, default=32, help="batch size")
    parser.epilog = "Exit code 1 if some images could not be decoded: they are listed and skipped."


def run(arguments: argparse.Namespace, _: list[str]) -> None:
    """Predicts, and prints the most likely classes of each image."""
    set_log_levels()
    keep_memory()
    from sit_jax.analysis.predict import run_predict
    from sit_jax.data.folder import find_pictures
    from sit_jax.io.load import load

    pictures = find_pictures(arguments.pictures, sys.stdin)
    model = load(arguments.source, ema=arguments.ema, step=arguments.step)
    how = (arguments.top, arguments.format, arguments.batch_size)
    run_predict(model, pictures, *how, sys.stdout, reader_gone)
