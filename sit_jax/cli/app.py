"""The command line `sit VERB ...`.

Verbs import their dependencies when they run, so that `sit --help` is fast.
"""

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence

from sit_jax import __version__
from sit_jax.cli.config_file import split_overrides
from sit_jax.cli.runtime import is_about_devices, set_log_levels, survive_closed_pipes
from sit_jax.cli.verb import expand_users
from sit_jax.errors import MissingProcessError, UserError, one_line

# In the order of `sit --help`.
VERBS = (
    "train", "plan", "evaluate", "convert", "slim", "export", "predict", "visualize", "demo", "report", "benchmark",
    "compare", "tune", "models", "checkpoint", "data",
)  # fmt: skip

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, that of the `UserError` raised, or 130 after Ctrl-C."""
    survive_closed_pipes()
    if isinstance(sys.stdout, io.TextIOWrapper):  # File names may contain bytes that are not valid text.
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = make_parser()
    overrides, others = split_overrides(sys.argv[1:] if argv is None else argv)
    arguments = expand_users(parser.parse_args(others))
    arguments.overrides = overrides
    command = f"sit {arguments.verb}" + (f" {arguments.task}" if "task" in arguments else "")
    if overrides and "config" not in arguments:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    set_log_levels()
    os.environ["MPLBACKEND"] = "agg"  # A notebook sets one that may not be installed here.
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except UserError as error:
        print(f"{command}: {error}", file=sys.stderr)
        if "sit_jax.parallel.distributed" in sys.modules and not isinstance(error, MissingProcessError):
            sys.modules["sit_jax.parallel.distributed"].abort_after_failure(error.exit_code)
        return error.exit_code
    except (AssertionError, RuntimeError) as error:
        if not is_about_devices(error):
            raise
        reason = one_line(error) if str(error) else "there is no such device, or JAX is installed without support of it"
        platforms = os.environ.get("JAX_PLATFORMS")
        print(
            f"{command}: JAX cannot start: {f'JAX_PLATFORMS={platforms}: ' * bool(platforms)}{reason}", file=sys.stderr
        )
        return UserError.exit_code
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of all verbs."""
    description = "Token slimming of vision transformers: train, convert, export and compare slimmed models."
    parser = argparse.ArgumentParser(prog="sit", description=description, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"sit_jax {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        importlib.import_module(f"sit_jax.cli.{verb}").add_parser(verbs)
    return parser
