"""Arguments of commands that several processes run together."""

import argparse

from sit_jax.cli.argument_types import positive


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of jax.distributed."""
    group = parser.add_argument_group(
        "multiple processes", "Auto-detected on Cloud TPU, under SLURM and under Open MPI."
    )
    group.add_argument("--coordinator", default="", help="host:port of process 0")
    group.add_argument("--num_processes", type=positive, default=0, help="number of processes")
    group.add_argument("--process_id", type=int, default=-1, help="this process, from 0")


def join(arguments: argparse.Namespace) -> bool:
    """Joins the other processes; whether this is the one that writes and prints."""
    from sit_jax.parallel.distributed import Processes, initialize, is_process_0

    initialize(Processes(arguments.coordinator, arguments.num_processes, arguments.process_id))
    return is_process_0()
