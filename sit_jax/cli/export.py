"""`sit export`."""

import argparse
import pathlib

from sit_jax.cli.verb import TRAINED_MODEL, Verbs, add_checkpoint, add_kept_tokens, add_option, add_verb


def add_parser(verbs: Verbs) -> None:
    """Adds the parser of `sit export`."""
    parser = add_verb(verbs, "export", run, "export a model to PyTorch, ONNX, StableHLO or timm")
    add = parser.add_argument
    add("source", metavar="MODEL", type=pathlib.Path, help=TRAINED_MODEL)
    add("dest", metavar="DEST", type=pathlib.Path, help="folder or file to write; must not exist")
    text = "folder: weights, config.json and a PyTorch module; original, timm: state dict (.safetensors or .pth)"
    text += "; source: folder in the layout of --like"
    add("--format", required=True, choices=("folder", "onnx", "stablehlo", "original", "timm", "source"), help=text)
    add(
        "--like",
        metavar="WEIGHTS",
        type=pathlib.Path,
        help="weights of the un-slimmed model in their own layout (source)",
    )
    add_checkpoint(parser)
    add_kept_tokens(parser)
    text = "include the reverse modules (RTSM), which only training needs (folder, original)"
    add_option(parser, "--with_rtsm", "--with_reverse", action="store_true", help=text)
    add("--dtype", default="float32", choices=("float32", "float16"), help="dtype of the weights (onnx)")
    add("--licence", metavar="TEXT", help="licence of the weights (folder, onnx, stablehlo)")
    text = "leave the head out: the outputs are pooled, prefix_tokens and patch_tokens (folder, onnx, stablehlo)"
    add("--features", action="store_true", help=text)
    text = "bring patch_tokens back to the full grid: by the reverse module, or spread (onnx, stablehlo)"
    add("--grid", choices=("rtsm", "spread"), help=text)
    add("--raw_input", action="store_true", help="take uint8 pixels in NHWC, not normalized images (onnx, stablehlo)")


def run(arguments: argparse.Namespace) -> None:
    """Writes the model in another format."""
    from sit_jax.io.export.export import export_model

    names = ("ema", "step", "dtype", "raw_input", "licence", "like", "features", "grid", "kept_tokens")
    options = {name: getattr(arguments, name) for name in names}
    export_model(arguments.source, arguments.dest, arguments.format, with_rtsm=arguments.with_rtsm, **options)
    print(f"Written: {arguments.dest}")
