"""`sit export`."""

import argparse
import pathlib
from typing import Any

from sit_jax.cli.runtime import set_log_levels
from sit_jax.cli.verb import add_checkpoint, add_verb


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parser = add_verb(verbs, "export", run, "write a model for PyTorch, ONNX, StableHLO or timm")
    formats = ("folder", "onnx", "stablehlo", "original", "timm")
    parser.add_argument("source", metavar="MODEL", type=pathlib.Path, help="a run's folder or a model folder")
    parser.add_argument("dest", metavar="DEST", type=pathlib.Path, help="folder or file to write; not there yet")
    parser.add_argument("--format", required=True, choices=formats, help="what to write")
    add_checkpoint(parser)
    parser.add_argument("--with_reverse", action="store_true", help="folder, original: the reverse modules too")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16"), help="onnx: type of the weights")
    parser.add_argument("--licence", metavar="TEXT", help="folder, onnx, stablehlo: of the weights")
    parser.add_argument("--raw_input", action="store_true", help="onnx, stablehlo: take uint8 pixels (NHWC)")


def run(arguments: argparse.Namespace, _: list[str]) -> None:
    """Exports a run or a model folder."""
    set_log_levels()
    from sit_jax.io.export.export import export_model

    words = {
        name: getattr(arguments, name) for name in ("ema", "step", "with_reverse", "dtype", "raw_input", "licence")
    }
    export_model(arguments.source, arguments.dest, arguments.format, **words)
    print(f"Written: {arguments.dest}")
