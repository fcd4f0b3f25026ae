"""User errors, which the command line prints in one line and without a traceback."""

import difflib
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """The command cannot do what the user asked for; the message names the input and says what to do.

    Attributes:
        exit_code: Exit code of the command line.
    """

    exit_code = 2


class ConfigError(UserError, ValueError):
    """A config value or a command-line option is wrong; the message is `KEY: PROBLEM`.

    Attributes:
        key: The config key, such as `optim.lr`, or the option, such as `--config`.
        problem: What is wrong and how to fix it.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key, self.problem = key, problem

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[str, str]]:
        return ConfigError, (self.key, self.problem)


class RunError(UserError, RuntimeError):
    """A run cannot start or continue, because of its folder, its checkpoint or its loss."""


class NotFiniteError(RunError):
    """Weights, outputs or an evaluation of a model are not finite."""


class ImageDecodeError(UserError):
    """An image cannot be decoded; the message names it and gives the reason."""


class PartialFailureError(UserError):
    """Some inputs could not be read and were skipped; all others were processed."""

    exit_code = 1


def check_all_read(read: int, images: int) -> None:
    """Raises a PartialFailureError if fewer images were read than there are."""
    if read < images:
        raise PartialFailureError(
            f"{images - read} of {images} images could not be read and were skipped; all others were processed"
        )


class PreemptedError(RunError):
    """A run saved its state and stopped, after a signal or a preemption notice; `--resume` continues it."""

    # EX_TEMPFAIL of sysexits.h: launchers start the command again.
    exit_code = 75


class MissingProcessError(RunError):
    """Other processes of the run are missing; a retry may help."""

    exit_code = 1


def require(condition: bool, key: str, problem: str) -> None:
    """Raises a ConfigError unless the condition is true."""
    if not condition:
        raise ConfigError(key, problem)


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """Returns the end of a message about an unknown name: the closest known one, or `otherwise` if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else otherwise


def one_line(error: BaseException, most: int = 300) -> str:
    """Returns an error's message in one line of at most `most` characters, or the error's type if it has none."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def valid_text(text: str) -> str:
    """Returns a text, such as a file name, with its bytes that are not valid UTF-8 escaped, as `caf\\udce9`."""
    return text.encode(errors="backslashreplace").decode()


def listed(names: Sequence[str], most: int = 5) -> str:
    """Joins the first names with commas and appends the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
