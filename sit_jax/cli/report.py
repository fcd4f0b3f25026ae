"""`sit report`."""

import argparse
import pathlib
from typing import Any

from sit_jax.cli.argument_types import positive
from sit_jax.cli.runtime import force_cpu, set_log_levels
from sit_jax.cli.verb import add_verb


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parser = add_verb(verbs, "report", run, "write a page about a run, or compare several")
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=pathlib.Path, help="folder of a run; several are compared"
    )
    text = "page to write; RUN/report.html if not given, comparison.html here for several runs"
    parser.add_argument("--output", metavar="FILE.html", type=pathlib.Path, help=text)
    parser.add_argument(
        "--examples", metavar="N", type=positive, default=6, help="number of example images of each kind"
    )
    parser.add_argument("--no_model", action="store_true", help="do not run the model; needs no data set")
    parser.epilog = "A run that has not finished is looked at on the CPU: it may need the accelerators itself."


def run(arguments: argparse.Namespace, _: list[str]) -> None:
    """Writes the page."""
    from sit_jax.report.write import make_report, output_of, unfinished

    set_log_levels()
    output = output_of(arguments.runs, arguments.output)
    if arguments.no_model or unfinished(arguments.runs):
        force_cpu()
    make_report(arguments.runs, output, arguments.examples, with_model=not arguments.no_model)
    print(f"Written: {output}")
