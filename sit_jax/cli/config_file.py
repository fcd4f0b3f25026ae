"""Config files with `--config.KEY=VALUE` overrides."""

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sit_jax.errors import ConfigError

if TYPE_CHECKING:
    from sit_jax.config import Config


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds `--config`; `sit_jax.cli.app` accepts `--config.KEY=VALUE` with it."""
    text = "config of this package, such as digits, or file with get_config(); CONFIG:ARGUMENT passes an argument"
    parser.add_argument("--config", required=True, help=text)
    parser.epilog = "Set any value of the config with --config.KEY=VALUE, such as --config.optim.lr=1e-3."


def load_config(path: str, overrides: Sequence[str] = (), only_data: bool = False) -> "Config":
    """Reads a config file (see `get_config`), applies `--config.KEY=VALUE` overrides, and validates the result.

    With `only_data`, all sections but `data` have their default values. Raises a ConfigError if the file is missing or
    fails, a key is unknown, or a value is not allowed.
    """
    from absl import flags
    from ml_collections import config_flags

    from sit_jax.config.config_dict import check_overrides, from_config_dict
    from sit_jax.config.files import get_config

    known = get_config(path)
    args = ["sit", *check_overrides(known, overrides)]
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", known, flag_values=values, sys_argv=args)
        values(args)
    except (flags.Error, AttributeError, LookupError, TypeError, ValueError) as error:
        # ml_collections nests the text of a KeyError, quoted and escaped, in that of another one.
        text = str(error.args[0] if error.args else error).replace("\\n", " ").replace("\\'", "").replace("'", "")
        text = re.sub(r"^(.*) \(in: (.*)\)$", r"\2: \1", " ".join(text.split())[:400])  # Of an index into a tuple.
        key, colon, problem = text.partition(": ")
        raise (ConfigError(key, problem) if colon else ConfigError("--config", key)) from None
    return from_config_dict({"model": {}, "data": values.config.data.to_dict()} if only_data else values.config)
