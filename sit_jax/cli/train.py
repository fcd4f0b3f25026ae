"""`sit train`."""

import argparse
from typing import Any

from sit_jax.cli.argument_types import folder
from sit_jax.cli.config_file import add_config, load_config
from sit_jax.cli.processes import add_processes, join
from sit_jax.cli.runtime import enable_compilation_cache, set_log_levels
from sit_jax.cli.verb import add_verb


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parser = add_verb(verbs, "train", run, "train a model, or a teacher and its slimmed student")
    add_config(parser)
    parser.add_argument("--workdir", required=True, type=folder, help="folder of the run; created if missing")
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder, if there is one")
    parser.add_argument(
        "--compilation_cache",
        default="",
        help="folder of the compilation cache, or none; ~/.cache/sit_jax if not given",
    )
    parser.add_argument("--print_sharding", action="store_true", help="print the placement of every array, and exit")
    add_processes(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Trains, and summarizes the run."""
    config = load_config(arguments.config, overrides)
    set_log_levels()
    enable_compilation_cache(arguments.compilation_cache)
    first = join(arguments)
    from sit_jax.analysis.summary import print_summary, summarize
    from sit_jax.training import loop

    if arguments.print_sharding:
        loop.print_sharding(config, quiet=not first)
        return
    loop.run(config, arguments.workdir, arguments.resume, label="student" if config.teacher else "model")
    summary = summarize(arguments.workdir)
    if not first:
        return
    print_summary(summary)
    print(f"Written: {arguments.workdir / 'summary.json'}, curves.png and the checkpoints beside it")
