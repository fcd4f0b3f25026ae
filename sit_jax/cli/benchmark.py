"""`sit benchmark`."""

import argparse
import pathlib

from sit_jax.cli.runtime import keep_memory
from sit_jax.cli.verb import ANY_MODEL, Verbs, above_0, add_verb, positive


def add_parser(verbs: Verbs) -> None:
    """Adds the parser of `sit benchmark`."""
    parser = add_verb(verbs, "benchmark", run, "compare the throughput of models")
    add = parser.add_argument
    add("models", metavar="MODEL", nargs="+", help=f"name from `sit models`, {ANY_MODEL}")
    add("--teacher", metavar="MODEL", help="reference of the comparison; the first MODEL if not given")
    add("--batch_sizes", metavar="N", nargs="+", type=positive, default=[1, 16, 64], help="batch sizes")
    text = "dtype of the matrix products; exported files keep their own"
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help=text)
    add("--seconds", type=above_0(1e6), default=3.0, help="measuring time of each model and batch size, in seconds")
    add("--rounds", metavar="N", type=positive, default=9, help="number of rounds; each times every model once")
    text = "time models for several token schedules (model.kept_tokens_choices) at each of them"
    add("--all_schedules", action="store_true", help=text)
    add("--json", action="store_true", help="print JSON")
    add("--plot", type=pathlib.Path, metavar="FILE.png", help="plot accuracy (GMAC if unknown) over throughput")


def run(arguments: argparse.Namespace) -> None:
    """Times the models and prints the comparison."""
    keep_memory()
    from sit_jax.analysis.benchmark_table import Settings, command

    settings = Settings(arguments.batch_sizes, arguments.dtype, arguments.seconds, arguments.rounds)
    options = (arguments.json, arguments.plot, arguments.all_schedules)
    command(arguments.models, arguments.teacher, settings, *options)
