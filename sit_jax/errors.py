"""User errors: the command line prints them as one line, without a traceback."""

from collections.abc import Sequence


class UserError(Exception):
    """Something the user asked for cannot be done; the message names the input and what to do."""


class ConfigError(UserError, ValueError):
    """A value of a configuration, or an option, is wrong; the message is `KEY: PROBLEM`.

    Attributes:
        key: The field, such as `optim.lr`, or the option, such as `--config`.
        problem: What is wrong, and what to do.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key, self.problem = key, problem

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[str, str]]:
        return ConfigError, (self.key, self.problem)


class RunError(UserError, RuntimeError):
    """A run cannot start or go on: its folder, its checkpoint or its loss is not what it must be."""


class NotFiniteError(RunError):
    """Weights, outputs or an evaluation of a model are not finite."""


class ImageDecodeError(UserError):
    """An image cannot be read; the message names it and says why."""


class PartialFailureError(UserError):
    """Some of the inputs could not be read and were skipped; the others were done."""


class PreemptedError(RunError):
    """A run was told to end (SIGTERM, or a notice that its machine will go), has saved its state and can be resumed."""


class MissingProcessError(RunError):
    """Other processes of the run did not come; trying again may help."""


def one_line(error: BaseException, most: int = 300) -> str:
    """What an error of a library says, in one line of bounded length; its type's name if it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names, separated by commas, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
