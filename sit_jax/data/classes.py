"""Class names of a model against those of a data set: the same order, another order, or other classes."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from sit_jax.data.sources import Example, Source
from sit_jax.errors import UserError, listed


def class_order(names: Sequence[str] | None, wanted: Sequence[str] | None, what: str, other: str) -> list[int] | None:
    """The index in `names` of each of the `wanted` names; None where both are in the same order.

    Names that are only numbers, 0, 1, 2, ..., say nothing but the index, and match everything.

    Args:
        names: Class names by index, or None where they are unknown.
        wanted: The names to find among them, or None where they are unknown.
        what: What has `names`, for messages.
        other: What has the `wanted` ones, for messages.

    Raises:
        UserError: They are other classes; the message lists the differences.
    """
    if names is None or wanted is None or _are_numbers(names) or _are_numbers(wanted) or list(names) == list(wanted):
        return None
    index = {name: place for place, name in enumerate(names)}
    if set(index) == set(wanted) and len(index) == len(names) == len(wanted):
        return [index[name] for name in wanted]
    extra, missing = (sorted(set(a) - set(b)) for a, b in ((names, wanted), (wanted, names)))
    differences = [f"only {what}: {listed(extra)}"] if extra else []
    differences += [f"only {other}: {listed(missing)}"] if missing else []
    problem = "; ".join(differences) or "several classes have the same name"
    raise UserError(f"class names of {what} and {other} differ: {problem}")


def reorder_heads(variables: dict[str, Any], order: Sequence[int] | None, heads: Collection[str]) -> dict[str, Any]:
    """A model's variables with the outputs of its heads in another order.

    Args:
        variables: The model's.
        order: Old index of each new output; None for no change.
        heads: Names of the parameters whose width is the number of classes.
    """
    if order is None:
        return variables
    columns = np.asarray(order)
    params = {
        name: {key: x[..., columns] for key, x in value.items()} if name in heads else value
        for name, value in variables["params"].items()
    }
    return {**variables, "params": params}


def match_classes(source: Source, names: Sequence[str] | None, what: str) -> Source:
    """The source with labels that are indices of a model's class names.

    Args:
        source: A split of a data set.
        names: The model's class names, or None where they are unknown.
        what: The model, for messages.

    Raises:
        ConfigError: The data set has other classes.
    """
    order = class_order(names, source.class_names, what, "the data set")
    return source if order is None or names is None else ReorderedSource(source, tuple(names), tuple(order))


class ReorderedSource:
    """A source whose classes are numbered as in a model.

    Attributes:
        class_names: The model's class names, by index.
        multi_label: Whether several classes, or none, may be right.
    """

    def __init__(self, source: Source, class_names: Sequence[str], order: Sequence[int]) -> None:
        """Wraps a source.

        Args:
            source: The source.
            class_names: The model's class names, by index.
            order: The model's index of each class of the source.
        """
        self.class_names, self.multi_label = class_names, source.multi_label
        self._source, self._order = source, order

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        label = self._order[example.label] if example.label >= 0 else example.label
        return example._replace(label=label, labels=tuple(self._order[x] for x in example.labels))


def _are_numbers(names: Sequence[str]) -> bool:
    return list(names) == [str(index) for index in range(len(names))]
