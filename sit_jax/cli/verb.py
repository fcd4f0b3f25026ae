"""How a verb's parser is made."""

import argparse
from collections.abc import Callable
from typing import Any

Run = Callable[[argparse.Namespace, list[str]], None]

ANY_MODEL = "a run's folder, a model folder, a .onnx or .stablehlo file"


def add_verb(verbs: Any, name: str, run: Run | None, help_text: str) -> argparse.ArgumentParser:
    """Adds a verb, or a task of one.

    Args:
        verbs: What `ArgumentParser.add_subparsers` returns.
        name: What is typed.
        run: Takes the parsed arguments and the `--config.KEY=VALUE` ones; None for a verb that has tasks.
        help_text: One line, without a capital and a full stop.
    """
    description = help_text[0].upper() + help_text[1:] + "."
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=help_text, description=description, allow_abbrev=False
    )
    parser.set_defaults(run=run)
    return parser


def add_option(parser: argparse.ArgumentParser, name: str, former: str, **options: Any) -> None:
    """Adds an option that is still accepted under its former name."""
    dest = parser.add_argument(name, **options).dest
    hidden = {**options, "help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
    parser.add_argument(former, dest=dest, **hidden)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that choose among a run's weights."""
    parser.add_argument("--ema", action="store_true", help="use the moving average of the weights (runs only)")
    parser.add_argument("--step", type=int, help="step of the checkpoint (runs only); the newest if not given")
