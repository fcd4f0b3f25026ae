"""The words of `sit report`; light to import, since every command reads them."""

import argparse
import pathlib

from sit_jax.argument_types import positive


def add_report(parser: argparse.ArgumentParser) -> None:
    """Adds the words of `sit report` to its parser."""
    parser.add_argument("runs", metavar="RUN", nargs="+", type=pathlib.Path, help="folder of a run; several compare")
    text = "page to write; RUN/report.html if not given, comparison.html here for several runs"
    parser.add_argument("--output", metavar="FILE.html", type=pathlib.Path, help=text)
    parser.add_argument("--examples", metavar="N", type=positive, default=6, help="pictures shown of each kind")
    parser.add_argument("--no_model", action="store_true", help="only what the folders say; needs no data")
    parser.epilog = "A run that has not finished is looked at on the CPU: it may need the accelerators itself."


def run_report(arguments: argparse.Namespace, _: list[str]) -> None:
    """The verb `sit report`."""
    from sit_jax.process import quiet_libraries, take_cpu
    from sit_jax.report.command import make_report, output_of, unfinished

    quiet_libraries()
    output = output_of(arguments.runs, arguments.output)
    if arguments.no_model or unfinished(arguments.runs):
        take_cpu()
    make_report(arguments.runs, output, arguments.examples, with_model=not arguments.no_model)
    print(f"Written: {output}")
