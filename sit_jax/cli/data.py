"""`sit data prepare|show|check|label`."""

import argparse
import dataclasses
import json
import pathlib

from sit_jax.cli.config_file import add_config, load_config
from sit_jax.cli.verb import Verbs, above_0, add_option, add_verb, positive
from sit_jax.errors import UserError


def add_parser(verbs: Verbs) -> None:
    """Adds the parser of `sit data`."""
    parser = add_verb(verbs, "data", run, "prepare, preview, check and label data sets")
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    prepare = add_verb(tasks, "prepare", run, "download a data set, or convert one to ArrayRecord")
    add = prepare.add_argument
    add("--name", help="data set: digits, a tfds name, or a new name with --from_folder")
    text = "folder of prepared data sets; TFDS_DATA_DIR or ~/tensorflow_datasets if not given"
    add("--data_dir", metavar="FOLDER", default="", help=text)
    add("--manual_dir", metavar="FOLDER", default="", help="folder of archives that tfds cannot download itself")
    add("--from_folder", metavar="FOLDER", type=pathlib.Path, help="convert images in folders [SPLIT/]CLASS/IMAGE")
    text = "fraction of each class to hold out for val, if the folder has no splits"
    add_option(prepare, "--val_fraction", "--held_out", type=above_0(1), default=0.1, help=text)
    add("--skip_broken", action="store_true", help="leave out images that cannot be decoded")
    add("--from_tfrecord", metavar="FOLDER", type=pathlib.Path, help="convert a folder of TFRecord files of tfds")
    show = add_verb(tasks, "show", run, "draw training images as the model receives them")
    add_config(show)
    show.add_argument("--output", metavar="FILE.png", type=pathlib.Path, default="examples.png", help="file to write")
    show.add_argument("--count", metavar="N", type=positive, default=32, help="number of images, at most a batch")
    show.add_argument("--step", metavar="N", type=int, default=0, help="training step whose batch is drawn, from 0")
    check = add_verb(tasks, "check", run, "decode every image once; list broken and unusual ones")
    add_config(check)
    check.add_argument("--threads", metavar="N", type=positive, default=8, help="number of decoding threads")
    check.add_argument("--all", action="store_true", help="print all file names instead of the first few")
    check.add_argument("--json", action="store_true", help="print JSON")
    label = add_verb(tasks, "label", run, "write dense labels for token labelling, computed by a trained model")
    label.add_argument("--workdir", type=pathlib.Path, required=True, help="run folder of the trained model")
    label.add_argument("--output", metavar="FOLDER", type=pathlib.Path, required=True, help="folder to write")
    label.add_argument("--top", metavar="N", type=positive, default=5, help="classes stored per patch, top-1 first")


def run(arguments: argparse.Namespace) -> None:
    """Runs one of the tasks prepare, show, check and label."""
    {"prepare": _prepare, "show": _show, "check": _check, "label": _label}[arguments.task](arguments)


def _prepare(arguments: argparse.Namespace) -> None:
    from sit_jax.data.config import DataConfig
    from sit_jax.data.prepare import convert_tfrecord, prepare_folder, prepare_named

    if arguments.from_tfrecord and (arguments.from_folder or arguments.name):
        raise UserError("--from_tfrecord excludes --name and --from_folder: the copy keeps the name of the data set")
    if not arguments.from_tfrecord and not arguments.name:
        raise UserError("--name is required: digits, a tfds name, or a new name with --from_folder")
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


def _show(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    from sit_jax.data.preview import draw_examples
    from sit_jax.training.loop import resolve_num_classes

    count = draw_examples(resolve_num_classes(config).inputs, arguments.output, arguments.count, arguments.step)
    print(f"Written: {arguments.output} ({count} images)")


def _check(arguments: argparse.Namespace) -> None:
    data = load_config(arguments.config, arguments.overrides, only_data=True).data
    from sit_jax.data.validate import check_data

    reports = check_data(data, arguments.threads)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(report) for report in reports], indent=2))
    else:
        for report in reports:
            print("\n".join(report.lines(data.on_decode_error, arguments.all)))
    broken = sum(len(report.broken) for report in reports)
    if broken:
        raise UserError(f"{broken} images cannot be read")


def _label(arguments: argparse.Namespace) -> None:
    from sit_jax.training.dense_labels import write_label_maps

    count = write_label_maps(arguments.workdir, arguments.output, arguments.top)
    print(f"Written: {arguments.output} ({count} images); use it with data.label_maps={arguments.output}")
