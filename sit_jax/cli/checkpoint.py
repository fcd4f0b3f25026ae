"""`sit checkpoint list|show|verify`."""

import argparse
import json
import pathlib
from typing import Any

from sit_jax.cli.runtime import force_cpu
from sit_jax.cli.verb import add_verb
from sit_jax.errors import UserError


def add_parser(verbs: Any) -> None:
    """Adds the verb and its tasks."""
    parser = add_verb(verbs, "checkpoint", None, "list, show and verify a run's checkpoints")
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, run, text in (
        ("list", _list, "list complete checkpoints: accuracy, size, best and newest"),
        ("show", _show, "show the metadata and arrays of a checkpoint"),
        ("verify", _verify, "read every array, and check that it is complete, finite and of the right shape"),
    ):
        task = add_verb(tasks, name, run, text)
        task.add_argument("--workdir", required=True, type=pathlib.Path, help="folder of a run")
        if name != "list":
            task.add_argument("--step", type=int, help="step of the checkpoint; the newest if not given")
        task.add_argument("--json", action="store_true", help="print JSON")


def _list(arguments: argparse.Namespace, _: list[str]) -> None:
    force_cpu()
    from sit_jax.analysis.checkpoints import list_checkpoints, print_list

    entries = list_checkpoints(arguments.workdir)
    if arguments.json:
        print(json.dumps([entry._asdict() for entry in entries], indent=2))
    else:
        print_list(entries)


def _show(arguments: argparse.Namespace, _: list[str]) -> None:
    force_cpu()
    from sit_jax.analysis.checkpoints import print_contents, read_contents

    contents = read_contents(arguments.workdir, arguments.step)
    if arguments.json:
        arrays = [array._asdict() for array in contents.arrays]
        print(json.dumps({**contents._asdict(), "arrays": arrays}, indent=2))
    else:
        print_contents(contents)


def _verify(arguments: argparse.Namespace, _: list[str]) -> None:
    force_cpu()
    from sit_jax.analysis.checkpoints import describe_problems, verify

    verdict = verify(arguments.workdir, arguments.step)
    if arguments.json:
        print(json.dumps(verdict._asdict(), indent=2))
    if verdict.problems:
        raise UserError(f"checkpoint {verdict.step} in {arguments.workdir}: {describe_problems(verdict)}")
    if not arguments.json:
        size = f"{verdict.bytes / 2**20:,.1f} MiB"
        print(f"checkpoint {verdict.step}: {verdict.arrays} arrays, {size}, all readable, finite and of the right size")
