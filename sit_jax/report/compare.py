"""What tells several runs apart."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from flax.traverse_util import empty_node, flatten_dict

from sit_jax.report.load_run import RunInfo

ABSENT = "\N{EN DASH}"


def differences(records: Sequence[RunInfo]) -> dict[str, tuple[str, ...]]:
    """The keys in which the runs' configurations differ, in the order of the first run's -> one value per run, as text.

    Runs whose configuration cannot be read are not compared.
    """
    flat = [flatten(record.values) for record in records]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = {key: tuple(values.get(key, ABSENT) for values in flat) for key in keys}
    known = [bool(values) for values in flat]
    return {key: row for key, row in rows.items() if len(set(itertools.compress(row, known))) > 1}


def flatten(values: Mapping[str, Any]) -> dict[str, str]:
    """A nested configuration as `section.key` -> value as text."""
    flat = flatten_dict(dict(values), keep_empty_nodes=True, sep=".")
    return {key: ABSENT if value is empty_node else show(value) for key, value in flat.items()}


def show(value: Any) -> str:
    """A value of a configuration as text."""
    if value is None or value == "" or value == {}:
        return ABSENT
    return value if isinstance(value, str) else json.dumps(value)
