"""The words of `sit demo`; light to import, since every command reads them."""

import argparse
import pathlib

from sit_jax.argument_types import between, positive
from sit_jax.process import quiet_libraries


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Adds the words of `sit demo` to its parser."""
    folder = "a run's or model's folder; may be given several times, the page then offers a choice"
    parser.add_argument("--student", metavar="MODEL", type=pathlib.Path, action="append", required=True, help=folder)
    teacher = "the same for what it is compared with; a run's own teacher if not given"
    parser.add_argument("--teacher", metavar="MODEL", type=pathlib.Path, action="append", default=[], help=teacher)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=between(1, 65535), default=7860, help="port to listen at")
    parser.add_argument("--max_mb", type=positive, default=20, help="largest file that the page takes, in megabytes")


def run_demo(arguments: argparse.Namespace, _: list[str]) -> None:
    """Runs `sit demo`."""
    quiet_libraries()
    from sit_jax.demo.serve import serve

    serve(arguments.student, arguments.teacher, arguments.host, arguments.port, arguments.max_mb)
