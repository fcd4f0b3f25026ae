"""`sit train`."""

import argparse
import pathlib

from sit_jax.cli.config_file import add_config, load_config
from sit_jax.cli.runtime import enable_compilation_cache, join, keep_memory
from sit_jax.cli.verb import Verbs, add_processes, add_verb, folder
from sit_jax.errors import ConfigError


def add_parser(verbs: Verbs) -> None:
    """Adds the parser of `sit train`."""
    parser = add_verb(verbs, "train", run, "train a model, or a teacher and its slimmed student")
    add_config(parser)
    text = "run folder, created if missing; runs/CONFIG if not given"
    parser.add_argument("--workdir", type=folder, help=text)
    parser.add_argument("--resume", action="store_true", help="continue the run in --workdir, if there is one")
    text = "folder of the persistent compilation cache, or `none` to disable it; ~/.cache/sit_jax if not given"
    parser.add_argument("--compilation_cache", metavar="FOLDER", default="", help=text)
    text = "train only the teacher, in --workdir/teacher; students then name it in teacher.run"
    parser.add_argument("--only_teacher", action="store_true", help=text)
    parser.add_argument("--print_sharding", action="store_true", help="print the sharding of every array, and exit")
    add_processes(parser)


def run(arguments: argparse.Namespace) -> None:
    """Trains, and prints a summary of the run."""
    keep_memory()
    enable_compilation_cache(arguments.compilation_cache)
    first = join(arguments)
    # After `join`: a config may compute with JAX, such as one that reads a backbone.
    config = load_config(arguments.config, arguments.overrides)
    from sit_jax.config.files import split_argument

    name = pathlib.PurePath(split_argument(arguments.config)[0]).name.removesuffix(".py")
    workdir = arguments.workdir or pathlib.Path("runs", name)
    from sit_jax.analysis.summary import print_summary, summarize
    from sit_jax.training import loop

    if arguments.print_sharding:
        from sit_jax.analysis.plan_table import print_sharding

        print_sharding(config, quiet=not first)
        return
    label = "student" if config.teacher else "model"
    if arguments.only_teacher:
        teacher = config.teacher
        if teacher is None or teacher.run:
            raise ConfigError("--only_teacher", "needs a teacher section in the config, without teacher.run")
        config, workdir, label = config.teacher_run(teacher), workdir / "teacher", "teacher"

    def finish() -> None:
        summary = summarize(workdir)
        if first:
            print_summary(summary)
            print(f"Written: summary.json, curves.png and the checkpoints, in {workdir}")

    loop.run(config, workdir, arguments.resume, label, loop.Extensions(finish=finish))
