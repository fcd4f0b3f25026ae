"""`sit export`."""

import argparse
import pathlib
from typing import Any

from sit_jax.cli.runtime import set_log_levels
from sit_jax.cli.verb import add_checkpoint, add_option, add_verb


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parser = add_verb(verbs, "export", run, "write a model for PyTorch, ONNX, StableHLO or timm")
    formats = ("folder", "onnx", "stablehlo", "original", "timm")
    parser.add_argument("source", metavar="MODEL", type=pathlib.Path, help="a run's folder or a model folder")
    parser.add_argument("dest", metavar="DEST", type=pathlib.Path, help="folder or file to write; must not exist")
    parser.add_argument("--format", required=True, choices=formats, help="output format")
    add_checkpoint(parser)
    text = "include the reverse modules (folder, original)"
    add_option(parser, "--with_rtsm", "--with_reverse", action="store_true", help=text)
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "float16"), help="dtype of the weights (onnx)"
    )
    parser.add_argument("--licence", metavar="TEXT", help="license of the weights (folder, onnx, stablehlo)")
    parser.add_argument("--raw_input", action="store_true", help="take uint8 pixels, NHWC (onnx, stablehlo)")


def run(arguments: argparse.Namespace, _: list[str]) -> None:
    """Exports a run or a model folder."""
    set_log_levels()
    from sit_jax.io.export.export import export_model

    options = {name: getattr(arguments, name) for name in ("ema", "step", "dtype", "raw_input", "licence")}
    with_rtsm = arguments.with_rtsm
    export_model(arguments.source, arguments.dest, arguments.format, with_reverse=with_rtsm, **options)
    print(f"Written: {arguments.dest}")
