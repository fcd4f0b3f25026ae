"""`sit checkpoint list|show|verify`."""

import argparse
import json
import pathlib

from sit_jax.cli.runtime import force_cpu
from sit_jax.cli.verb import Verbs, add_verb
from sit_jax.errors import UserError


def add_parser(verbs: Verbs) -> None:
    """Adds the parser of `sit checkpoint`."""
    parser = add_verb(verbs, "checkpoint", run, "list, show and verify the checkpoints of a run")
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, summary in (
        ("list", "list complete checkpoints: accuracy, size, best and newest"),
        ("show", "show the metadata and arrays of a checkpoint"),
        ("verify", "read every array and check that it is complete, finite and of the right shape"),
    ):
        task = add_verb(tasks, name, run, summary)
        task.add_argument("--workdir", required=True, type=pathlib.Path, help="run folder")
        if name != "list":
            task.add_argument("--step", type=int, help="step of the checkpoint; the newest if not given")
        task.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    """Runs one of the tasks list, show and verify."""
    force_cpu()  # Training may be using the accelerators.
    from sit_jax.analysis import checkpoints

    if arguments.task == "list":
        entries = checkpoints.list_checkpoints(arguments.workdir)
        if arguments.json:
            print(json.dumps([entry._asdict() for entry in entries], indent=2))
        else:
            checkpoints.print_list(entries)
    elif arguments.task == "show":
        contents = checkpoints.read_contents(arguments.workdir, arguments.step)
        if arguments.json:
            arrays = [array._asdict() for array in contents.arrays]
            print(json.dumps({**contents._asdict(), "arrays": arrays}, indent=2))
        else:
            checkpoints.print_contents(contents)
    else:
        verdict = checkpoints.verify(arguments.workdir, arguments.step)
        if arguments.json:
            print(json.dumps(verdict._asdict(), indent=2))
        step, size = verdict.step, f"{verdict.bytes / 2**20:,.1f} MiB"
        if verdict.problems:
            raise UserError(f"checkpoint {step} in {arguments.workdir}: {checkpoints.describe_problems(verdict)}")
        if not arguments.json:
            print(f"checkpoint {step}: {verdict.arrays} arrays, {size}, all readable, finite and of the right size")
