"""Config files with `--config.KEY=VALUE` overrides."""

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sit_jax.errors import ConfigError

if TYPE_CHECKING:
    from sit_jax.config import Config

_KINDS = {int: "an integer", bool: "true or false", tuple: "values separated by commas"}
_KINDS |= {float: "a number", type(None): "a number or None"}


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds `--config`; `sit_jax.cli.app` accepts `--config.KEY=VALUE` with it."""
    text = "config of this package, such as digits, or file with get_config(); CONFIG:ARGUMENT passes an argument"
    parser.add_argument("--config", required=True, help=text)
    parser.epilog = "Set any value of the config with --config.KEY=VALUE, such as --config.optim.lr=1e-3."


def split_overrides(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits arguments into overrides and others, in the forms that absl accepts, with one dash or two.

    Overrides are returned as `--config.KEY=VALUE`, also if the value is the next argument. Those without a value are
    `--config.KEY` and `--noconfig.KEY`.
    """
    overrides: list[str] = []
    others: list[str] = []
    left = list(args)
    while left:
        arg = left.pop(0)
        if arg == "--":
            return overrides, [*others, arg, *left]
        if re.match(r"-(no)?config(\.|=|$)", arg):
            arg = f"-{arg}"
        if not re.match(r"--(no)?config\.", arg):
            others.append(arg)
            continue
        # A dash and a digit begin a negative number.
        if "=" not in arg and arg.startswith("--config.") and left and not re.match(r"--|-[a-zA-Z]", left[0]):
            arg = f"{arg}={left.pop(0)}"
        overrides.append(arg)
    return overrides, others


def load_config(path: str, overrides: Sequence[str] = (), only_data: bool = False) -> "Config":
    """Reads a config file (see `get_config`), applies `--config.KEY=VALUE` overrides, and validates the result.

    Booleans are also set by `--config.KEY` and `--noconfig.KEY`. With `only_data`, all sections but `data` have their
    default values. Raises a ConfigError if the file is missing or fails, a key is unknown, or a value is not allowed.
    """
    from absl import flags
    from ml_collections import config_flags
    from ml_collections.config_flags import config_path

    from sit_jax.config.config_dict import check_overrides, from_config_dict
    from sit_jax.config.files import get_config

    known = get_config(path)
    args = ["sit", *check_overrides(known, overrides)]
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", known, flag_values=values, sys_argv=args)
        values(args)
    except flags.IllegalFlagValueError as error:
        option, _, value = next(arg for arg in args if str(error).startswith(f"flag {arg}: ")).partition("=")
        key = option.removeprefix("--config.")
        section = f"a dict; set its values by --config.{key}.KEY=VALUE"
        kind = _KINDS.get(type(config_path.get_value(key, known)), section)
        raise ConfigError(key, f"must be {kind}, got {value!r}") from None
    except (flags.Error, AttributeError, LookupError, TypeError, ValueError) as error:
        # ml_collections nests the text of a KeyError, quoted and escaped, in that of another one.
        text = str(error.args[0] if error.args else error).replace("\\n", " ").replace("\\'", "").replace("'", "")
        text = re.sub(r"^(.*) \(in: (.*)\)$", r"\2: \1", " ".join(text.split())[:400])  # Of an index into a tuple.
        key, colon, problem = text.partition(": ")
        raise (ConfigError(key, problem) if colon else ConfigError("--config", key)) from None
    return from_config_dict({"model": {}, "data": values.config.data.to_dict()} if only_data else values.config)
