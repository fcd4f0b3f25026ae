"""The words of `sit export` and `sit predict`; light to import, since every command reads them."""

import argparse
import pathlib

from sit_jax.argument_types import positive

ANY_MODEL = "a run's folder, a model folder, a .onnx or .stablehlo file"


def add_export(parser: argparse.ArgumentParser) -> None:
    """Adds the words of `sit export` to its parser."""
    formats = ("folder", "onnx", "stablehlo", "original", "timm")
    parser.add_argument("source", metavar="MODEL", type=pathlib.Path, help="a run's folder or a model folder")
    parser.add_argument("dest", metavar="DEST", type=pathlib.Path, help="folder or file to write; not there yet")
    parser.add_argument("--format", required=True, choices=formats, help="what to write")
    add_checkpoint(parser)
    parser.add_argument("--with_reverse", action="store_true", help="folder, original: the reverse modules too")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16"), help="onnx: type of the weights")
    parser.add_argument("--licence", metavar="TEXT", help="folder, onnx, stablehlo: of the weights")
    parser.add_argument("--raw_input", action="store_true", help="onnx, stablehlo: take uint8 pixels (NHWC)")


def add_predict(parser: argparse.ArgumentParser) -> None:
    """Adds the words of `sit predict` to its parser."""
    parser.add_argument("source", metavar="MODEL", type=pathlib.Path, help=ANY_MODEL)
    parser.add_argument("pictures", metavar="PICTURE", nargs="+", help="files, folders, patterns; - reads a list")
    add_checkpoint(parser)
    parser.add_argument("--top", type=positive, default=5, help="likeliest classes told")
    parser.add_argument("--format", default="table", choices=("table", "jsonl", "csv"), help="how they are printed")
    parser.add_argument("--batch_size", type=positive, default=32, help="pictures at a time")
    parser.epilog = "Exit code 1 where some pictures could not be read: they are named and skipped."


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds the words that choose among a run's weights."""
    parser.add_argument("--ema", action="store_true", help="of a run: the moving average of the weights")
    parser.add_argument("--step", type=int, help="of a run: which checkpoint; the newest if not given")
