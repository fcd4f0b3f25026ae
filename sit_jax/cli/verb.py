"""Parsers of verbs, types of arguments, and the arguments that several verbs have."""

import argparse
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any, TypeAlias

# What `ArgumentParser.add_subparsers` returns.
Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

# Help texts of the argument MODEL.
TRAINED_MODEL = "run folder, model folder, or weights of another program"
ANY_MODEL = f"{TRAINED_MODEL}; .onnx file or .stablehlo file"


def _number(kind: type, name: str, valid: Callable[[float], bool], bounds: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {name}, got {text!r}") from None
        if not valid(value):
            raise argparse.ArgumentTypeError(f"must be {bounds.format(text)}")
        return value

    return parse


def integer(least: int, most: float = math.inf, hint: str = "") -> Callable[[str], int]:
    """The type of integers from `least` to `most`; `hint` is appended to the error message."""
    bounds = f"at least {least}" if most == math.inf else f"from {least} to {most}"
    return _number(int, "an integer", lambda value: least <= value <= most, f"{bounds}, got {{}}{hint}")


positive = integer(1)


def above_0(below: float) -> Callable[[str], float]:
    """The type of numbers above 0 and below a bound."""
    return _number(float, "a number", lambda value: 0 < value < below, f"above 0 and below {below:g}, got {{}}")


def integers(text: str) -> tuple[int, ...]:
    """The type of integers above 0, separated by commas."""
    return tuple(positive(number) for number in text.split(","))


def folder(text: str) -> pathlib.Path:
    """A local folder, not the address of a bucket."""
    if not text:  # As from an unset variable of the shell; a path would be the current folder.
        raise argparse.ArgumentTypeError("is empty; give a folder")
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is not a folder; mount the bucket, as launch/README.md says")
    return pathlib.Path(text)


def expand_users(arguments: argparse.Namespace) -> argparse.Namespace:
    """Expands `~` and `~user` at the start of every argument, since no shell does that in `--workdir=~/run`."""

    def expand(value: Any) -> Any:
        if isinstance(value, list):
            return [expand(item) for item in value]
        return type(value)(os.path.expanduser(value)) if isinstance(value, str | pathlib.Path) else value

    return argparse.Namespace(**{name: expand(value) for name, value in vars(arguments).items()})


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends defaults to the help texts, except those that mean 'not given'."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default not in (None, False, "", 0, -1, [], ())
        return super()._get_help_string(action) if shown else action.help


def add_verb(
    verbs: Verbs, name: str, run: Callable[[argparse.Namespace], None], summary: str
) -> argparse.ArgumentParser:
    """Adds the parser of a verb, or of one of its tasks; the summary has no capital and no full stop.

    `run` is called with the parsed arguments; `overrides` among them are the `--config.KEY=VALUE` ones.
    """
    text = summary[0].upper() + summary[1:] + "."
    parser = verbs.add_parser(name, help=summary, description=text, allow_abbrev=False, formatter_class=_HelpFormatter)
    parser.set_defaults(run=run)
    return parser


def add_option(parser: argparse.ArgumentParser, name: str, former: str, **options: Any) -> None:
    """Adds an option that is still accepted under its former name."""
    dest = parser.add_argument(name, **options).dest
    hidden = {**options, "help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
    parser.add_argument(former, dest=dest, **hidden)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that select a run's weights."""
    parser.add_argument("--ema", action="store_true", help="use the moving average of the weights (runs only)")
    parser.add_argument("--step", type=int, help="step of the checkpoint (runs only); the newest if not given")


def add_kept_tokens(parser: argparse.ArgumentParser) -> None:
    """Adds the argument that cuts a slimmed model to fewer tokens."""
    text = "patch tokens of each stage, at most the model's; the first is the whole grid, as in 196,98,49,24"
    parser.add_argument("--kept_tokens", metavar="N,N,...", type=integers, default=(), help=text)


def add_images(parser: argparse.ArgumentParser, nargs: str) -> None:
    """Adds the paths of images."""
    text = "image file, folder or glob pattern; - reads paths from standard input"
    parser.add_argument("images", metavar="IMAGE", nargs=nargs, help=text)
    parser.epilog = "Images that cannot be decoded are listed and skipped; the exit code is then 1."


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `sit_jax.cli.runtime.join`."""
    text = "Detected automatically on Cloud TPU, under SLURM and under Open MPI. Elsewhere, give all three."
    group = parser.add_argument_group("multiple processes", text)
    group.add_argument("--coordinator", metavar="HOST:PORT", default="", help="address of process 0")
    group.add_argument("--num_processes", metavar="N", type=positive, default=0, help="number of processes")
    group.add_argument("--process_id", metavar="N", type=int, default=-1, help="index of this process, from 0")
