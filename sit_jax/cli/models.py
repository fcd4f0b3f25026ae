"""`sit models`."""

import argparse
import json

from sit_jax.cli.verb import Verbs, add_verb


def add_parser(verbs: Verbs) -> None:
    """Adds the parser of `sit models`."""
    parser = add_verb(verbs, "models", run, "list the named models with their parameters and GMAC")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--verbose", action="store_true", help="also print the cost of each kind of module")


def run(arguments: argparse.Namespace) -> None:
    """Prints the named models."""
    from sit_jax.analysis.models_table import list_costs, print_costs

    rows = list_costs()
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        print_costs(rows, arguments.verbose)
