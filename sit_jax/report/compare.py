"""Compares the configurations of several runs."""

import itertools
import json
from collections.abc import Sequence

from flax.traverse_util import empty_node, flatten_dict

from sit_jax.config import JsonObject
from sit_jax.report.load_run import RunInfo

ABSENT = "\N{EN DASH}"


def differences(runs: Sequence[RunInfo]) -> dict[str, tuple[str, ...]]:
    """Returns the keys in which configurations differ, in the first run's order -> one value per run, as text.

    Runs with unreadable configurations are not compared.
    """
    flat = [flatten(run.values) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = {key: tuple(values.get(key, ABSENT) for values in flat) for key in keys}
    known = [bool(values) for values in flat]
    return {key: row for key, row in rows.items() if len(set(itertools.compress(row, known))) > 1}


def flatten(values: JsonObject) -> dict[str, str]:
    """Flattens a nested configuration to `section.key` -> value as text."""
    flat = flatten_dict(values, keep_empty_nodes=True, sep=".")
    return {key: ABSENT if value is empty_node else show(value) for key, value in flat.items()}


def show(value: object) -> str:
    """Formats a value of a configuration as text."""
    if value is None or value == "" or value == {}:
        return ABSENT
    return value if isinstance(value, str) else json.dumps(value)
