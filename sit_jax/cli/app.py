"""The command line: `sit VERB ...`.

Verbs import what they need when they run, so that `sit --help` answers at once.
"""

import argparse
import io
import sys
from collections.abc import Sequence

from sit_jax import __version__
from sit_jax.cli import (
    benchmark,
    checkpoint,
    convert,
    data,
    demo,
    evaluate,
    export,
    models,
    plan,
    predict,
    report,
    train,
    visualize,
)
from sit_jax.cli.runtime import survive_closed_pipes
from sit_jax.errors import MissingProcessError, PartialFailureError, PreemptedError, UserError

# In the order of `sit --help`.
VERBS = (
    train,
    plan,
    evaluate,
    convert,
    export,
    predict,
    visualize,
    demo,
    report,
    benchmark,
    models,
    checkpoint,
    data,
)

# Some inputs were skipped, or processes are missing.
FAILED = 1
USER_ERROR = 2
# What sysexits.h calls a temporary failure: the launcher may start the command again, with --resume.
STOPPED = 75
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 1 where inputs were skipped or processes are missing, 2 for a user's
    mistake, 75 for a run that was told to end and can be resumed, 130 when interrupted."""
    survive_closed_pipes()
    if isinstance(sys.stdout, io.TextIOWrapper):  # A file's name may hold bytes that are no text.
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    command = f"sit {arguments.verb}" + (f" {arguments.task}" if "task" in arguments else "")
    unknown = [word for word in rest if not ("config" in arguments and word.startswith("--config."))]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        arguments.run(arguments, rest)
        if sys.stdout is not None:  # None where the shell closed it.
            sys.stdout.flush()
    except UserError as error:
        print(f"{command}: {error}", file=sys.stderr)
        codes: dict[type, int] = {PreemptedError: STOPPED, MissingProcessError: FAILED, PartialFailureError: FAILED}
        code = codes.get(type(error), USER_ERROR)
        if "sit_jax.parallel.distributed" in sys.modules and not isinstance(error, MissingProcessError):
            sys.modules["sit_jax.parallel.distributed"].abort_after_failure(code)
        return code
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = argparse.ArgumentParser(prog="sit", description="Slims vision transformers.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"sit_jax {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add_parser(verbs)
    return parser
