"""`sit report`."""

import argparse
import pathlib

from sit_jax.cli.runtime import force_cpu
from sit_jax.cli.verb import Verbs, add_verb, positive


def add_parser(verbs: Verbs) -> None:
    """Adds the parser of `sit report`."""
    parser = add_verb(verbs, "report", run, "write an HTML report of a run, or a comparison of several runs")
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=pathlib.Path, help="run folder; several are compared")
    text = "file to write; if not given, RUN/report.html for one run, comparison.html in the current folder for several"
    add("--output", metavar="FILE.html", type=pathlib.Path, help=text)
    add("--examples", metavar="N", type=positive, default=6, help="maximum number of images in each section")
    add("--no_model", action="store_true", help="do not run the model; needs no data set")
    parser.epilog = "The model of an unfinished run runs on the CPU, since training may be using the accelerators."


def run(arguments: argparse.Namespace) -> None:
    """Writes the page."""
    from sit_jax.io.runs import SUMMARY
    from sit_jax.report.write import make_report, output_of

    output = output_of(arguments.runs, arguments.output)
    if arguments.no_model or any(not (folder / SUMMARY).is_file() for folder in arguments.runs):
        force_cpu()
    make_report(arguments.runs, output, arguments.examples, with_model=not arguments.no_model)
    print(f"Written: {output}")
