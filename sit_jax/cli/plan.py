"""`sit plan`."""

import argparse
import dataclasses
import json

from sit_jax.cli.config_file import add_config, load_config
from sit_jax.cli.runtime import force_cpu
from sit_jax.cli.verb import Verbs, add_verb, positive


def add_parser(verbs: Verbs) -> None:
    """Adds the parser of `sit plan`."""
    text = "compile a train step for a TPU slice, without the TPU; print its memory, FLOPs and collectives"
    parser = add_verb(verbs, "plan", run, text)
    add_config(parser)
    parser.add_argument("--topology", required=True, help="TPU slice, such as v5e:16x16 or v4:2x2x4, or cpu:8")
    text = "number of training examples, if the data set is not on this machine"
    parser.add_argument("--examples", metavar="N", type=positive, help=text)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    """Compiles the step and prints its cost."""
    from sit_jax.analysis.chips import parse_topology

    topology = parse_topology(arguments.topology)
    force_cpu(topology.devices if topology.chip is None else 1)
    config = load_config(arguments.config, arguments.overrides)
    from sit_jax.analysis.plan_table import make_plan, print_plan

    result = make_plan(config, topology, arguments.examples)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(result), indent=2))
    else:
        print_plan(result)
