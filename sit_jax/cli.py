"""The command line: `sit VERB ...`.

Verbs import what they need when they run, so that `sit --help` answers at once.
"""

import argparse
import io
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from sit_jax import __version__
from sit_jax.analysis.arguments import add_benchmark
from sit_jax.argument_types import fraction, positive
from sit_jax.checkpoint_command import add_checkpoint_tasks
from sit_jax.convert.arguments import add_convert, convert_options
from sit_jax.demo.arguments import add_demo, run_demo
from sit_jax.errors import ConfigError, MissingProcessError, SkippedError, StoppedError, UserError
from sit_jax.export.arguments import ANY_MODEL, add_checkpoint, add_export, add_predict
from sit_jax.process import keep_compiled, keep_memory, quiet_libraries, survive_closed_pipes, take_cpu
from sit_jax.report.arguments import add_report, run_report
from sit_jax.visual.arguments import add_visualize, run_visualize

Verb = Callable[[argparse.Namespace, list[str]], None]

# Some inputs were skipped, or processes are missing.
FAILED = 1
USER_ERROR = 2
# What sysexits.h calls a temporary failure: whoever started the command may start it again, with --resume.
STOPPED = 75
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 1 where inputs were skipped or processes are missing, 2 for a user's
    mistake, 75 for a run that was told to end and can be resumed, 130 when interrupted."""
    survive_closed_pipes()
    if isinstance(sys.stdout, io.TextIOWrapper):  # A file's name may hold bytes that are no text.
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    command = f"sit {arguments.verb}" + (f" {arguments.task}" if "task" in arguments else "")
    strays = [word for word in rest if not ("config" in arguments and word.startswith("--config."))]
    if strays:
        parser.error(f"unrecognized arguments: {' '.join(strays)}")
    try:
        arguments.run(arguments, rest)
        if sys.stdout is not None:  # None where the shell closed it.
            sys.stdout.flush()
    except UserError as error:
        print(f"{command}: {error}", file=sys.stderr)
        codes: dict[type, int] = {StoppedError: STOPPED, MissingProcessError: FAILED, SkippedError: FAILED}
        code = codes.get(type(error), USER_ERROR)
        if "sit_jax.distributed" in sys.modules and not isinstance(error, MissingProcessError):
            sys.modules["sit_jax.distributed"].part(code)
        return code
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sit", description="Slims vision transformers.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"sit_jax {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    train = _verb(verbs, "train", _train, "train a model, or a teacher and its slimmed student")
    _add_config(train)
    train.add_argument("--workdir", required=True, type=_folder, help="folder of the run; made if missing")
    train.add_argument("--resume", action="store_true", help="go on with the run in the folder, if there is one")
    train.add_argument(
        "--compilation_cache",
        default="",
        help="folder that keeps compiled programs, or none; ~/.cache/sit_jax if not given",
    )
    train.add_argument("--print_sharding", action="store_true", help="print where every array would lie, and stop")
    _add_processes(train)
    plan = _verb(
        verbs, "plan", _plan, "compile a run's train step for devices that are not here, and say what it needs"
    )
    _add_config(plan)
    plan.add_argument("--topology", required=True, help="TPU slice such as v5e:16x16 or v4:2x2x4, or cpu:8")
    plan.add_argument("--examples", type=positive, help="training examples, where the data set is not at hand")
    plan.add_argument("--json", action="store_true", help="print JSON")
    evaluate = _verb(verbs, "evaluate", _evaluate, "evaluate a run or an exported model over an evaluation split")
    which = evaluate.add_mutually_exclusive_group(required=True)
    which.add_argument("source", nargs="?", metavar="MODEL", type=pathlib.Path, help=ANY_MODEL)
    which.add_argument("--workdir", type=pathlib.Path, help="folder of a run")
    add_checkpoint(evaluate)
    evaluate.add_argument("--name", help="another data set of the same classes, such as imagenet_v2")
    evaluate.add_argument("--split", dest="eval_split", metavar="SPLIT", help="another split")
    evaluate.add_argument("--data_dir", help="where the data set lies, if not where it lay in training")
    evaluate.add_argument(
        "--held_out", type=fraction, help="fraction of each class in val, for a folder without splits"
    )
    evaluate.add_argument("--on_broken", choices=("error", "skip"), help="what an unreadable image does")
    text = "match the classes of model and data by name where both have names, or by index (default: names)"
    evaluate.add_argument("--match_classes", choices=("names", "index"), default="names", help=text)
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    _add_processes(evaluate)
    add_convert(_verb(verbs, "convert", _convert, "read weights of other programs, and of runs, and write them"))
    add_export(_verb(verbs, "export", _export, "write a model for PyTorch, ONNX, StableHLO or timm"))
    add_predict(_verb(verbs, "predict", _predict, "say what is on pictures"))
    add_visualize(
        _verb(verbs, "visualize", run_visualize, "draw where tokens look and what the class token attends to")
    )
    add_demo(_verb(verbs, "demo", run_demo, "open a page that shows what slimming does to your pictures"))
    add_report(_verb(verbs, "report", run_report, "make a page about a run, or about several side by side"))
    add_benchmark(_verb(verbs, "benchmark", _benchmark, "time models side by side"))
    models = _verb(verbs, "models", _models, "list the named models and what they cost")
    models.add_argument("--json", action="store_true", help="print a list of objects")
    models.add_argument("--verbose", action="store_true", help="also what each kind of module costs")
    add_checkpoint_tasks(_verb(verbs, "checkpoint", None, "list, show and verify a run's checkpoints"))
    _add_data(_verb(verbs, "data", None, "prepare, look at, check and label data sets"))
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    prepare = _verb(tasks, "prepare", _data_prepare, "download or convert a data set to ArrayRecord")
    prepare.add_argument("--name", help="the data set: digits, a tfds name, or a new name with --from_folder")
    prepare.add_argument("--data_dir", default="", help="where prepared data sets lie; tfds's default if not given")
    prepare.add_argument("--manual_dir", default="", help="where files lie that must be downloaded by hand")
    prepare.add_argument("--from_folder", type=pathlib.Path, help="folder of pictures to convert")
    prepare.add_argument("--held_out", type=fraction, default=0.1, help="share for val where the folder has no splits")
    prepare.add_argument("--skip_broken", action="store_true", help="leave pictures out that cannot be read")
    prepare.add_argument("--from_tfrecord", type=pathlib.Path, help="folder of a prepared TFRecord version to convert")
    show = _verb(tasks, "show", _data_show, "draw training pictures as the model gets them")
    _add_config(show)
    show.add_argument("--output", type=pathlib.Path, default=pathlib.Path("examples.png"), help="PNG file to write")
    show.add_argument("--count", type=positive, default=32, help="pictures, at most a batch")
    show.add_argument("--step", type=int, default=0, help="which batch")
    check = _verb(tasks, "check", _data_check, "read every picture once; list broken and unusual ones")
    _add_config(check)
    check.add_argument("--threads", type=positive, default=8, help="pictures read at a time")
    check.add_argument("--all", action="store_true", help="list every name")
    check.add_argument("--json", action="store_true", help="print a list of objects")
    label = _verb(tasks, "label", _data_label, "write dense labels for token labelling with a trained model")
    label.add_argument("--workdir", type=pathlib.Path, required=True, help="folder of the model's run")
    label.add_argument("--output", type=pathlib.Path, required=True, help="folder to write")
    label.add_argument("--top", type=positive, default=5, help="likeliest classes stored per place")


def _add_config(parser: argparse.ArgumentParser) -> None:
    text = "Python file with a get_config() that returns a ConfigDict; FILE:ARGUMENT hands it an argument"
    parser.add_argument("--config", required=True, help=text)
    parser.epilog = "Any value of the configuration: --config.KEY=VALUE, such as --config.optim.lr=1e-3"


def _add_processes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("many processes", "Found out on Cloud TPU, under SLURM and under Open MPI.")
    group.add_argument("--coordinator", default="", help="host:port of process 0")
    group.add_argument("--num_processes", type=positive, default=0, help="processes in all")
    group.add_argument("--process_id", type=int, default=-1, help="this process, from 0")


def _join(arguments: argparse.Namespace) -> bool:
    """Joins the other processes; whether this is the one that writes and prints."""
    from sit_jax.distributed import Processes, initialize, is_first

    initialize(Processes(arguments.coordinator, arguments.num_processes, arguments.process_id))
    return is_first()


def _folder(text: str) -> pathlib.Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is no folder; mount the bucket, as launch/README.md says")
    return pathlib.Path(text)


def _verb(verbs: Any, name: str, run: Verb | None, help_text: str) -> argparse.ArgumentParser:
    description = help_text[0].upper() + help_text[1:] + "."
    parser = verbs.add_parser(name, help=help_text, description=description, allow_abbrev=False)
    parser.set_defaults(run=run)
    return parser


def _train(arguments: argparse.Namespace, overrides: list[str]) -> None:
    config = load_config(arguments.config, overrides)
    quiet_libraries()
    keep_compiled(arguments.compilation_cache)
    first = _join(arguments)
    from sit_jax.analysis.summary import print_summary, summarize
    from sit_jax.run import print_sharding, run

    if arguments.print_sharding:
        print_sharding(config, quiet=not first)
        return
    run(config, arguments.workdir, arguments.resume, label="student" if config.teacher else "model")
    summary = summarize(arguments.workdir)
    if not first:
        return
    print_summary(summary)
    print(f"Written: {arguments.workdir / 'summary.json'}, curves.png and the checkpoints beside it")


def _plan(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from sit_jax.analysis.chips import parse_topology

    topology = parse_topology(arguments.topology)
    config = load_config(arguments.config, overrides)
    take_cpu(topology.devices if topology.chip is None else 1)
    from sit_jax.analysis.plan_table import make_plan, print_plan

    result = make_plan(config, topology, arguments.examples)
    if arguments.json:
        import dataclasses

        print(json.dumps(dataclasses.asdict(result), indent=2))
    else:
        print_plan(result)


def _evaluate(arguments: argparse.Namespace, _: list[str]) -> None:
    quiet_libraries()
    first = _join(arguments)
    keep_memory()
    import dataclasses

    from sit_jax.export.predictor import evaluate_predictor, evaluation_data, is_run, open_predictor
    from sit_jax.run import evaluate_run
    from sit_jax.workdir import read_config

    keys = ("name", "eval_split", "data_dir", "held_out", "on_broken")
    changes = {key: value for key in keys if (value := getattr(arguments, key)) is not None}
    match_names = arguments.match_classes == "names"
    model = arguments.workdir or arguments.source
    if arguments.workdir or is_run(model):
        data = dataclasses.replace(read_config(model).data, **changes)
        result = evaluate_run(model, arguments.ema, arguments.step, data, match_names)
    else:
        predictor = open_predictor(model, arguments.ema, arguments.step)
        result = evaluate_predictor(predictor, evaluation_data(predictor, changes), match_names=match_names)
    if not first:
        return
    if arguments.json:
        print(json.dumps(result))
        return
    shares = f"top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}, loss {result['loss']:.4f}"
    print(f"{shares} over {result['examples']:.0f} examples")


def _export(arguments: argparse.Namespace, _: list[str]) -> None:
    quiet_libraries()
    from sit_jax.export.command import export_model

    words = {
        name: getattr(arguments, name) for name in ("ema", "step", "with_reverse", "dtype", "raw_input", "licence")
    }
    export_model(arguments.source, arguments.dest, arguments.format, **words)
    print(f"Written: {arguments.dest}")


def _predict(arguments: argparse.Namespace, _: list[str]) -> None:
    quiet_libraries()
    keep_memory()
    from sit_jax.predict import command

    options = {"top": arguments.top, "style": arguments.format, "batch_size": arguments.batch_size}
    command(arguments.source, arguments.pictures, arguments.ema, arguments.step, **options)


def _convert(arguments: argparse.Namespace, _: list[str]) -> None:
    quiet_libraries()
    from sit_jax.convert.command import convert

    convert(arguments.source, arguments.dest, convert_options(arguments), arguments.force, say=print)
    print(f"Written: {arguments.dest}")


def _data_prepare(arguments: argparse.Namespace, _: list[str]) -> None:
    quiet_libraries()
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
        held_out=arguments.held_out,
        on_broken="skip" if arguments.skip_broken else "error",
    )
    if arguments.from_tfrecord:
        path = convert_tfrecord(arguments.from_tfrecord, arguments.data_dir)
    elif arguments.from_folder:
        path = prepare_folder(arguments.from_folder, arguments.name, data)
    else:
        path = prepare_named(data, arguments.manual_dir)
    print(f"Prepared: {path}")


def _data_show(arguments: argparse.Namespace, overrides: list[str]) -> None:
    config = load_config(arguments.config, overrides)
    quiet_libraries()
    from sit_jax.data.show import draw_examples
    from sit_jax.run import settle_classes

    count = draw_examples(settle_classes(config), arguments.output, arguments.count, arguments.step)
    print(f"Written: {arguments.output} ({count} pictures)")


def _data_check(arguments: argparse.Namespace, overrides: list[str]) -> None:
    config = load_config(arguments.config, overrides)
    import dataclasses

    from sit_jax.data.check import check_data

    reports = check_data(config.data, arguments.threads)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(report) for report in reports], indent=2))
    else:
        for report in reports:
            print("\n".join(report.lines(config.data.on_broken, arguments.all)))
    broken = sum(len(report.broken) for report in reports)
    if broken:
        raise UserError(f"{broken} pictures cannot be read")


def _data_label(arguments: argparse.Namespace, _: list[str]) -> None:
    quiet_libraries()
    from sit_jax.annotate import write_label_maps

    count = write_label_maps(arguments.workdir, arguments.output, arguments.top)
    print(f"Written: {arguments.output} ({count} pictures); use it with data.label_maps={arguments.output}")


def _benchmark(arguments: argparse.Namespace, _: list[str]) -> None:
    quiet_libraries()
    keep_memory()
    from sit_jax.analysis.benchmark_command import Settings, command

    settings = Settings(arguments.batch_sizes, arguments.dtype, arguments.seconds, arguments.rounds)
    command(arguments.models, arguments.teacher, settings, arguments.json, arguments.plot)


def _models(arguments: argparse.Namespace, _: list[str]) -> None:
    from sit_jax.analysis.models_table import list_costs, print_costs

    rows = list_costs()
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        print_costs(rows, arguments.verbose)


def load_config(path: str, overrides: Sequence[str] = ()) -> Any:
    """Reads a config file and the `--config.KEY=VALUE` words, and checks the result.

    Raises:
        ConfigError: No such file, an error in it, an unknown key or an impossible value.
    """
    from absl import flags
    from ml_collections import config_flags

    from sit_jax.config_dict import check_keys, from_config_dict, take_nones, with_defaults

    # `page.py:argument` hands the argument on to the page's get_config.
    file = path if path.endswith(".py") else path.rpartition(":")[0] or path
    if not pathlib.Path(file).is_file():
        raise ConfigError(f"--config: there is no file {file}")
    try:
        # First the page by itself, then the words over it and all that it leaves to defaults.
        page = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=page, sys_argv=["sit"])
        page(["sit", f"--config={path}"])
        values = flags.FlagValues()
        known = with_defaults(page.config)
        overrides = take_nones(known, overrides)
        check_keys(known, overrides)
        words = ["sit", *overrides]
        config_flags.DEFINE_config_dict("config", known, flag_values=values, sys_argv=words)
        values(words)
        config = values.config
    except ConfigError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(_override_problem(error, path)) from None
    except Exception as error:  # Whatever a user's own Python file does.
        raise ConfigError(f"--config: {path} raises {type(error).__name__}: {error}") from None
    return from_config_dict(config)


def _override_problem(error: Exception, path: str) -> str:
    text = str(error.args[0]) if error.args else str(error)
    if "Traceback (most recent call last)" in text:
        # ml_collections hands on the traceback of a page that raises; its last line says what is wrong.
        problem = text.strip().splitlines()[-1].partition(": ")
        return f"--config: {path}: {problem[2] or problem[0]}"
    # ml_collections nests one KeyError's text, quoted and escaped, in another's.
    text = text.replace("\\n", " ").replace("\\'", "").replace("'", "")
    return " ".join(text.split())[:400]
