"""Maps the class names of a model to those of a data set."""

import functools
import sys
from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import PyTree

from sit_jax.data.sources import Example, Source, nfc
from sit_jax.errors import UserError, listed


def class_order(names: Sequence[str] | None, wanted: Sequence[str] | None, what: str, other: str) -> list[int] | None:
    """Returns the index in `names` of each name in `wanted`, or None if both have the same order.

    Unicode forms of a name are equal. Unknown names (None) match any names, and so do names that are the numbers 0 to
    n - 1: each is the index of a class. If numbers are in another order, as those of folders are (0, 1, 10, 11, 2), a
    line on standard error says so. Raises a UserError with the differences if `what` and `other`, the owners of the
    names, have different classes.
    """
    if wanted is None:
        return None
    indices = [str(index) for index in range(len(wanted))]
    names, wanted = indices if names is None else [nfc(name) for name in names], [nfc(name) for name in wanted]
    if set(names) != set(wanted) and (_are_numbers(names) or _are_numbers(wanted)):
        if len(names) != len(wanted):
            return None
        names, wanted = (x if _are_numbers(x) else indices for x in (names, wanted))
    if names == wanted:
        return None
    index = {name: place for place, name in enumerate(names)}
    if set(index) == set(wanted) and len(index) == len(names) == len(wanted):
        if _are_numbers(names):
            _log_once(f"classes of {what} and {other}: matched by number (match_classes=index: by order)")
        return [index[name] for name in wanted]
    extra, missing = (sorted(set(a) - set(b)) for a, b in ((names, wanted), (wanted, names)))
    differences = [f"only {what}: {listed(extra)}"] if extra else []
    differences += [f"only {other}: {listed(missing)}"] if missing else []
    problem = "; ".join(differences) or "several classes have the same name"
    raise UserError(f"class names of {what} and {other} differ: {problem}")


def reorder_heads(
    variables: dict[str, PyTree], order: Sequence[int] | None, heads: Collection[str]
) -> dict[str, PyTree]:
    """Returns a model's variables with the outputs of the named heads reordered; `order` has the old indices."""
    if order is None:
        return variables
    columns = np.asarray(order)
    params = {
        name: {key: x[..., columns] for key, x in value.items()} if name in heads else value
        for name, value in variables["params"].items()
    }
    return {**variables, "params": params}


def match_classes(source: Source, names: Sequence[str] | None, what: str) -> Source:
    """Returns the source with its labels mapped to the indices of a model's class names, if they are known.

    Raises a UserError if the data set has other classes than the model, which messages call `what`.
    """
    order = class_order(names, source.class_names, what, "the data set")
    if order is None:
        return source
    return _ReorderedSource(source, tuple(map(str, range(len(order))) if names is None else names), tuple(order))


class _ReorderedSource:
    """A source whose labels are mapped by `order`: the index in `class_names` of each class of the wrapped source."""

    def __init__(self, source: Source, class_names: Sequence[str], order: Sequence[int]) -> None:
        self.class_names, self.multi_label = class_names, source.multi_label
        self._source, self._order = source, order

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        label = self._order[example.label] if example.label >= 0 else example.label
        return example._replace(label=label, labels=tuple(self._order[x] for x in example.labels))


def _are_numbers(names: Sequence[str]) -> bool:
    return sorted(names) == sorted(str(index) for index in range(len(names)))


@functools.cache
def _log_once(line: str) -> None:
    import jax  # Not at the top: loader processes import this module.

    if jax.process_index() == 0:
        print(line, file=sys.stderr)
