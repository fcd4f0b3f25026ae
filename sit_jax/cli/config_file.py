"""Reads a config file and the `--config.KEY=VALUE` arguments over it."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sit_jax.errors import ConfigError

if TYPE_CHECKING:
    from sit_jax.config import Config


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds `--config`, and says how its values are overridden."""
    text = (
        "name of a config of this package, such as digits or imagenet_sit_small, or a Python file with a get_config() "
        "that returns a ConfigDict; CONFIG:ARGUMENT hands it an argument"
    )
    parser.add_argument("--config", required=True, help=text)
    parser.epilog = "Any value of the configuration: --config.KEY=VALUE, such as --config.optim.lr=1e-3"


def load_config(path: str, overrides: Sequence[str] = ()) -> "Config":
    """Reads a config file and the `--config.KEY=VALUE` arguments, and checks the result.

    Args:
        path: A file, or the name of a config of this package; behind a colon an argument for its `get_config`.
        overrides: The arguments.

    Raises:
        ConfigError: No such file, an error in it, an unknown key or an impossible value.
    """
    from absl import flags
    from ml_collections import config_flags

    from sit_jax.config.config_dict import check_overrides, from_config_dict
    from sit_jax.config.files import get_config

    known = get_config(path)
    words = ["sit", *check_overrides(known, overrides)]
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", known, flag_values=values, sys_argv=words)
        values(words)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise _override_error(error) from None
    return from_config_dict(values.config)


def _override_error(error: Exception) -> ConfigError:
    text = str(error.args[0]) if error.args else str(error)
    # ml_collections nests one KeyError's text, quoted and escaped, in another's.
    text = text.replace("\\n", " ").replace("\\'", "").replace("'", "")
    key, colon, rest = " ".join(text.split())[:400].partition(": ")
    return ConfigError(key, rest) if colon else ConfigError("--config", key)
