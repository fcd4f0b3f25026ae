"""`sit evaluate`."""

import argparse
import json
import pathlib
from typing import Any

from sit_jax.cli.argument_types import fraction
from sit_jax.cli.processes import add_processes, join
from sit_jax.cli.runtime import keep_memory, set_log_levels
from sit_jax.cli.verb import ANY_MODEL, add_checkpoint, add_option, add_verb


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parser = add_verb(verbs, "evaluate", run, "evaluate a run or an exported model over an evaluation split")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("source", nargs="?", metavar="MODEL", type=pathlib.Path, help=ANY_MODEL)
    which.add_argument("--workdir", type=pathlib.Path, help="folder of a run")
    add_checkpoint(parser)
    parser.add_argument("--name", help="name of another data set of the same classes, such as imagenet_v2")
    parser.add_argument("--split", dest="eval_split", metavar="SPLIT", help="name of another split")
    parser.add_argument("--data_dir", help="folder of the data set, if not the one of training")
    text = "fraction of each class in val, for a folder without splits"
    add_option(parser, "--val_fraction", "--held_out", type=fraction, help=text)
    text = "what to do about an image that cannot be decoded"
    add_option(parser, "--on_decode_error", "--on_broken", choices=("error", "skip"), help=text)
    text = "match the classes of model and data by name where both have names, or by index (default: names)"
    parser.add_argument("--match_classes", choices=("names", "index"), default="names", help=text)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_processes(parser)


def run(arguments: argparse.Namespace, _: list[str]) -> None:
    """Evaluates, and prints the metrics."""
    set_log_levels()
    first = join(arguments)
    keep_memory()
    from sit_jax.io.load import load
    from sit_jax.training.evaluate import evaluate_model

    keys = ("name", "eval_split", "data_dir", "val_fraction", "on_decode_error")
    changes = {key: value for key in keys if (value := getattr(arguments, key)) is not None}
    match_names = arguments.match_classes == "names"
    model = load(arguments.workdir or arguments.source, ema=arguments.ema, step=arguments.step)
    result = evaluate_model(model, model.evaluation_data(changes), match_names)
    if not first:
        return
    if arguments.json:
        print(json.dumps(result))
        return
    shares = f"top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}, loss {result['loss']:.4f}"
    print(f"{shares} over {result['examples']:.0f} examples")
