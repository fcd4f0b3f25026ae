"""`sit data prepare|show|check|label`."""

import argparse
import dataclasses
import json
import pathlib
from typing import Any

from sit_jax.cli.argument_types import fraction, positive
from sit_jax.cli.config_file import add_config, load_config
from sit_jax.cli.runtime import set_log_levels
from sit_jax.cli.verb import add_option, add_verb
from sit_jax.errors import UserError


def add_parser(verbs: Any) -> None:
    """Adds the verb and its tasks."""
    parser = add_verb(verbs, "data", None, "prepare, preview, check and label data sets")
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    prepare = add_verb(tasks, "prepare", _prepare, "download or convert a data set to ArrayRecord")
    prepare.add_argument("--name", help="the data set: digits, a tfds name, or a new name with --from_folder")
    prepare.add_argument(
        "--data_dir", default="", help="folder of prepared data sets; the default of tfds if not given"
    )
    prepare.add_argument("--manual_dir", default="", help="folder of files that were downloaded by hand")
    prepare.add_argument("--from_folder", type=pathlib.Path, help="folder of images to convert")
    text = "fraction of each class for val, where the folder has no splits"
    add_option(prepare, "--val_fraction", "--held_out", type=fraction, default=0.1, help=text)
    prepare.add_argument("--skip_broken", action="store_true", help="leave out images that cannot be decoded")
    prepare.add_argument("--from_tfrecord", type=pathlib.Path, help="folder of a prepared TFRecord data set to convert")
    show = add_verb(tasks, "show", _show, "draw training images as the model receives them")
    add_config(show)
    show.add_argument("--output", type=pathlib.Path, default=pathlib.Path("examples.png"), help="PNG file to write")
    show.add_argument("--count", type=positive, default=32, help="number of images, at most a batch")
    show.add_argument("--step", type=int, default=0, help="index of the batch")
    check = add_verb(tasks, "check", _check, "decode every image once; list broken and unusual ones")
    add_config(check)
    check.add_argument("--threads", type=positive, default=8, help="number of threads")
    check.add_argument("--all", action="store_true", help="list every file name")
    check.add_argument("--json", action="store_true", help="print a list of objects")
    label = add_verb(tasks, "label", _label, "write dense labels for token labelling with a trained model")
    label.add_argument("--workdir", type=pathlib.Path, required=True, help="folder of the run whose model labels")
    label.add_argument("--output", type=pathlib.Path, required=True, help="folder to write")
    label.add_argument("--top", type=positive, default=5, help="classes stored per patch, most likely first")


def _prepare(arguments: argparse.Namespace, _: list[str]) -> None:
    set_log_levels()
    from sit_jax.data.config import DataConfig
    from sit_jax.data.prepare import convert_tfrecord, prepare_folder, prepare_named

    ways = [arguments.from_folder, arguments.from_tfrecord]
    if all(ways) or (arguments.from_tfrecord and arguments.name):
        raise UserError("--from_tfrecord stands alone: the copy keeps the data set's name")
    if not arguments.from_tfrecord and not arguments.name:
        raise UserError("--name: which data set? A tfds name, digits, or a new name with --from_folder")
    data = DataConfig(
        name=arguments.name or "digits",
        data_dir=arguments.data_dir,
        val_fraction=arguments.val_fraction,
        on_decode_error="skip" if arguments.skip_broken else "error",
    )
    if arguments.from_tfrecord:
        path = convert_tfrecord(arguments.from_tfrecord, arguments.data_dir)
    elif arguments.from_folder:
        path = prepare_folder(arguments.from_folder, arguments.name, data)
    else:
        path = prepare_named(data, arguments.manual_dir)
    print(f"Prepared: {path}")


def _show(arguments: argparse.Namespace, overrides: list[str]) -> None:
    config = load_config(arguments.config, overrides)
    set_log_levels()
    from sit_jax.data.preview import draw_examples
    from sit_jax.training.loop import resolve_num_classes

    count = draw_examples(resolve_num_classes(config).inputs, arguments.output, arguments.count, arguments.step)
    print(f"Written: {arguments.output} ({count} pictures)")


def _check(arguments: argparse.Namespace, overrides: list[str]) -> None:
    config = load_config(arguments.config, overrides)
    from sit_jax.data.validate import check_data

    reports = check_data(config.data, arguments.threads)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(report) for report in reports], indent=2))
    else:
        for report in reports:
            print("\n".join(report.lines(config.data.on_decode_error, arguments.all)))
    broken = sum(len(report.broken) for report in reports)
    if broken:
        raise UserError(f"{broken} pictures cannot be read")


def _label(arguments: argparse.Namespace, _: list[str]) -> None:
    set_log_levels()
    from sit_jax.training.dense_labels import write_label_maps

    count = write_label_maps(arguments.workdir, arguments.output, arguments.top)
    print(f"Written: {arguments.output} ({count} pictures); use it with data.label_maps={arguments.output}")
