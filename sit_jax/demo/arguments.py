"""The words of `sit demo`; light to import, since every command reads them."""

import argparse
import pathlib

from sit_jax.process import quiet_libraries


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Adds the words of `sit demo` to its parser."""
    folder = "a run's or model's folder; may be given several times, the page then offers a choice"
    parser.add_argument("--student", metavar="MODEL", type=pathlib.Path, action="append", required=True, help=folder)
    teacher = "the same for what it is compared with; a run's own teacher if not given"
    parser.add_argument("--teacher", metavar="MODEL", type=pathlib.Path, action="append", default=[], help=teacher)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=_port, default=7860, help="port to listen at")
    parser.add_argument("--max_mb", type=_megabytes, default=20, help="largest file that the page takes, in megabytes")


def run_demo(arguments: argparse.Namespace, _: list[str]) -> None:
    """Runs `sit demo`."""
    quiet_libraries()
    from sit_jax.demo.serve import serve

    serve(arguments.student, arguments.teacher, arguments.host, arguments.port, arguments.max_mb)


def _port(text: str) -> int:
    value = int(text)
    if not 1 <= value < 65536:
        raise argparse.ArgumentTypeError(f"must be from 1 to 65535, is {value}")
    return value


def _megabytes(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, is {value}")
    return value
