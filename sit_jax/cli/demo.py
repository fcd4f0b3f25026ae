"""`sit demo`."""

import argparse
import pathlib

from sit_jax.cli.verb import TRAINED_MODEL, Verbs, add_verb, integer, positive


def add_parser(verbs: Verbs) -> None:
    """Adds the parser of `sit demo`."""
    parser = add_verb(verbs, "demo", run, "serve a web page that compares slimmed models with teachers on your images")
    add = parser.add_argument
    text = f"slimmed model: {TRAINED_MODEL}; repeat the option to offer several"
    add("--student", metavar="MODEL", type=pathlib.Path, action="append", required=True, help=text)
    text = "model to compare with, may be repeated as well; the teacher of the student's run if not given"
    add("--teacher", metavar="MODEL", type=pathlib.Path, action="append", default=[], help=text)
    text = "for models without a head: images to search for similar ones, up to 200 of these files, folders or glob"
    text += " patterns; the evaluation split of the student's run if not given"
    add("--images", metavar="IMAGE", nargs="+", default=[], help=text)
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all interfaces")
    add("--port", type=integer(1, 65535), default=7860, help="port to listen on")
    add("--max_mb", metavar="MB", type=positive, default=20, help="maximum size of an upload in MB")


def run(arguments: argparse.Namespace) -> None:
    """Serves the page until it is interrupted."""
    from sit_jax.demo.serve import serve

    places = arguments.student, arguments.teacher, arguments.images
    serve(*places, arguments.host, arguments.port, arguments.max_mb)
