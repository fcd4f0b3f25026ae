"""`sit evaluate`."""

import argparse
import json
import pathlib
from typing import Any

from sit_jax.cli.runtime import join, keep_memory
from sit_jax.cli.verb import (
    ANY_MODEL,
    Verbs,
    above_0,
    add_checkpoint,
    add_kept_tokens,
    add_option,
    add_processes,
    add_verb,
)


def add_parser(verbs: Verbs) -> None:
    """Adds the parser of `sit evaluate`."""
    parser = add_verb(verbs, "evaluate", run, "measure the accuracy of a run or of an exported model")
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("source", nargs="?", metavar="MODEL", type=pathlib.Path, help=ANY_MODEL)
    which.add_argument("--workdir", type=pathlib.Path, help="run folder, instead of MODEL")
    add_checkpoint(parser)
    add_kept_tokens(parser)
    add("--name", help="another data set with the same classes, such as imagenet_v2; data.name of the run if not given")
    add("--split", dest="eval_split", metavar="SPLIT", help="split; data.eval_split of the run if not given")
    add("--data_dir", metavar="FOLDER", help="folder of the data set; data.data_dir of the run if not given")
    text = "fraction of each class in val, for a folder without splits; data.val_fraction of the run if not given"
    add_option(parser, "--val_fraction", "--held_out", type=above_0(1), help=text)
    text = "stop at an image that cannot be decoded, or skip it; as in training if not given"
    add_option(parser, "--on_decode_error", "--on_broken", choices=("error", "skip"), help=text)
    text = "match classes of model and data set by name, where both have names, or by index"
    add("--match_classes", choices=("names", "index"), default="names", help=text)
    text = "instead, accuracy of a k-NN vote and a logistic regression on the features; fitted on data.train_split"
    add("--probe", action="store_true", help=text)
    add("--json", action="store_true", help="print JSON")
    add_processes(parser)


def run(arguments: argparse.Namespace) -> None:
    """Evaluates the model and prints its metrics."""
    keep_memory()
    first = join(arguments)
    from sit_jax.analysis.probe import probe_models
    from sit_jax.analysis.summary import feature_line, trained_teacher
    from sit_jax.io.load import load
    from sit_jax.io.runs import find_checkpoint
    from sit_jax.training.evaluate import evaluate_model, feature_comparison

    keys = ("name", "eval_split", "data_dir", "val_fraction", "on_decode_error")
    changes = {key: value for key in keys if (value := getattr(arguments, key)) is not None}
    match_names = arguments.match_classes == "names"
    path = arguments.workdir or arguments.source
    model = load(path, ema=arguments.ema, step=arguments.step, kept_tokens=arguments.kept_tokens)
    data = model.evaluation_data(changes)
    is_labelled = model.is_labelled(named=arguments.name is not None)
    teacher = None if is_labelled and not arguments.probe else trained_teacher(model, find_checkpoint(path)[0])
    result: Any
    if arguments.probe:
        result = probe_models({"model": model} if teacher is None else {"teacher": teacher, "student": model}, data)
    elif is_labelled:
        result = evaluate_model(model, data, match_names)
    else:
        result = feature_comparison(teacher, data, model.source)(model)
    if first and arguments.json:
        print(json.dumps(result))
    elif first and arguments.probe:
        for name, entry in result.items():
            print(f"{name}: k-NN {entry['knn']:.2%}, linear probe {entry['linear']:.2%}")
    elif first and not is_labelled:
        print(feature_line(result))
    elif first:
        accuracies = [f"top-{k} {result[f'top{k}']:.2%}" for k in (1, 5) if f"top{k}" in result]
        print(f"{', '.join(accuracies)}, loss {result['loss']:.4f} over {result['examples']:.0f} examples")
