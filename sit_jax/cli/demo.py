"""`sit demo`."""

import argparse
import pathlib
from typing import Any

from sit_jax.cli.argument_types import between, positive
from sit_jax.cli.runtime import set_log_levels
from sit_jax.cli.verb import add_verb


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parser = add_verb(verbs, "demo", run, "serve a page that shows what slimming does to your images")
    folder = "a run's or model's folder; may be given several times, the page then offers a choice"
    parser.add_argument("--student", metavar="MODEL", type=pathlib.Path, action="append", required=True, help=folder)
    teacher = "the same for what it is compared with; a run's own teacher if not given"
    parser.add_argument("--teacher", metavar="MODEL", type=pathlib.Path, action="append", default=[], help=teacher)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all interfaces")
    parser.add_argument("--port", type=between(1, 65535), default=7860, help="port to listen on")
    parser.add_argument("--max_mb", type=positive, default=20, help="maximum size of an upload in MB")


def run(arguments: argparse.Namespace, _: list[str]) -> None:
    """Serves the page."""
    set_log_levels()
    from sit_jax.demo.serve import serve

    serve(arguments.student, arguments.teacher, arguments.host, arguments.port, arguments.max_mb)
