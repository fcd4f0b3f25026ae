"""`sit convert`."""

import argparse
import pathlib

from sit_jax.cli.verb import Verbs, add_option, add_verb, integers, positive


def add_parser(verbs: Verbs) -> None:
    """Adds the parser of `sit convert`."""
    parser = add_verb(verbs, "convert", run, "convert weights from PyTorch, Flax and other formats, or from a run")
    add = parser.add_argument
    text = ".pth, .pt or .pth.tar file (needs PyTorch), .safetensors or .npz file, model folder or run folder"
    add("source", metavar="SOURCE", type=pathlib.Path, help=text)
    text = "model folder (no suffix), or .pth or .safetensors file in the layout of the original SiT code"
    add("dest", metavar="DEST", type=pathlib.Path, help=text)
    text = "interpolate the position embeddings to this image size, or height and width"
    add("--image_size", metavar="PX[xPX]", type=_image_size, help=text)
    add("--num_classes", metavar="N", type=positive, help="replace the heads by zeros for this number of classes")
    text = "leave out the reverse modules (RTSM), which only training needs"
    add_option(parser, "--without_rtsm", "--without_reverse", action="store_true", help=text)
    add("--key", metavar="NAME", default="", help="key or prefix of the weights, if SOURCE holds several models")
    add("--ema", action="store_true", help="use the moving average of the weights, if SOURCE has one")
    add("--licence", metavar="TEXT", help="licence of the weights, written to the config.json of a model folder")
    add("--force", action="store_true", help="overwrite DEST")
    text = "Needed if no named model has the shapes in SOURCE."
    add = parser.add_argument_group("hyperparameters that tensor shapes do not determine", text).add_argument
    add("--model.name", metavar="NAME", help="take the values below from this model of `sit models`")
    add("--model.num_heads", metavar="N", type=positive, help="attention heads")
    add("--model.residual_scale", metavar="NUMBER", type=float, help="divisor of the residual branches")
    add("--model.norm_eps", metavar="NUMBER", type=float, help="epsilon of the LayerNorms")
    text = "image size that the position embeddings were trained for"
    add("--model.image_size", metavar="PX[xPX]", type=_image_size, help=text)
    add("--model.activation", metavar="NAME", help="activation of the MLPs: gelu, gelu_tanh or quick_gelu")
    add("--model.pool", metavar="NAME", help="what the head reads: token, avg, token_avg or map")
    add("--model.stage_blocks", metavar="N,N,...", type=integers, help="blocks per stage")
    text = "fraction of tokens that each slimming module keeps"
    add("--model.keep_ratio", metavar="NUMBER", type=float, help=text)


def run(arguments: argparse.Namespace) -> None:
    """Reads the weights of SOURCE and writes them to DEST."""
    from sit_jax.io.convert.convert import convert
    from sit_jax.io.convert.read import Options

    given = vars(arguments)
    fields = {key.partition(".")[2]: value for key, value in given.items() if "." in key and value is not None}
    changes = {key: given[key] for key in ("image_size", "num_classes", "ema", "licence", "key")}
    options = Options(fields, rtsm=not arguments.without_rtsm, **changes)
    convert(arguments.source, arguments.dest, options, arguments.force, log=print)
    print(f"Written: {arguments.dest}")


def _image_size(text: str) -> int | tuple[int, int]:
    sides = [positive(side) for side in text.lower().split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"must be PX or HEIGHTxWIDTH, got {text!r}")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])
