"""`sit predict`."""

import argparse
import pathlib
import sys

from sit_jax.cli.runtime import keep_memory, reader_gone
from sit_jax.cli.verb import ANY_MODEL, Verbs, add_checkpoint, add_images, add_kept_tokens, add_verb, positive


def add_parser(verbs: Verbs) -> None:
    """Adds the parser of `sit predict`."""
    parser = add_verb(verbs, "predict", run, "classify images, or compute their features")
    parser.add_argument("source", metavar="MODEL", type=pathlib.Path, help=ANY_MODEL)
    add_images(parser, "+")
    add_checkpoint(parser)
    add_kept_tokens(parser)
    parser.add_argument("--top", metavar="N", type=positive, default=5, help="classes printed per image, top-1 first")
    parser.add_argument("--format", default="table", choices=("table", "jsonl", "csv"), help="output format")
    parser.add_argument("--batch_size", metavar="N", type=positive, default=32, help="batch size")
    text = "write the pooled features (embeddings) to this file instead: .npz or .parquet"
    parser.add_argument("--features", metavar="FILE", type=pathlib.Path, help=text)


def run(arguments: argparse.Namespace) -> None:
    """Prints the top classes of each image, or writes the features of all."""
    keep_memory()
    from sit_jax.analysis.predict import run_predict
    from sit_jax.analysis.write_features import write_features
    from sit_jax.data.folder import find_images
    from sit_jax.data.sources import read_lines
    from sit_jax.io.load import load

    images = find_images(arguments.images, read_lines(sys.stdin))
    model = load(arguments.source, ema=arguments.ema, step=arguments.step, kept_tokens=arguments.kept_tokens)
    if arguments.features is not None:
        write_features(model, images, arguments.features, arguments.batch_size)
        print(f"Written: {arguments.features}")
        return
    how = (arguments.top, arguments.format, arguments.batch_size)
    run_predict(model, images, *how, sys.stdout, reader_gone)
