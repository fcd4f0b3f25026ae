"""What tells several runs apart."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sit_jax.report.gather import RunRecord

ABSENT = "\N{EN DASH}"


class Difference(NamedTuple):
    """A key of the configuration in which runs differ.

    Attributes:
        key: Such as `optim.lr`.
        values: One per run, as text.
    """

    key: str
    values: tuple[str, ...]


def differences(records: Sequence[RunRecord]) -> list[Difference]:
    """The keys in which the runs' configurations differ, in the order of the first run's.

    Runs whose configuration cannot be read are not compared.
    """
    flat = [flatten(record.values) for record in records]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = [Difference(key, tuple(values.get(key, ABSENT) for values in flat)) for key in keys]
    known = [bool(values) for values in flat]
    return [row for row in rows if len(set(itertools.compress(row.values, known))) > 1]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested configuration as `section.key` -> value as text."""
    result: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            result |= flatten(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = show(value)
    return result


def show(value: Any) -> str:
    """A value of a configuration as text."""
    if value is None or value == "" or value == {}:
        return ABSENT
    return value if isinstance(value, str) else json.dumps(value)
