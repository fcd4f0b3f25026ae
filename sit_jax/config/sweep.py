"""The sweep of a config file: which token reducers `sit compare` trains with the file's recipe."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from sit_jax.errors import require

Objective = Literal["frd", "ce", "untrained"]

# Overrides of the recipe by which an objective trains.
_OBJECTIVES: dict[str, tuple[str, ...]] = {
    "frd": (),
    "ce": ("loss.token=0", "loss.logits=0", "loss.feature=0", "loss.hard=0"),
    "untrained": (),
}
_LARGEST_SEED = 2**31 - 1


class Reported(NamedTuple):
    """A published result, for the figure: a name, GMAC, and top-1 accuracy as a fraction of 1."""

    name: str
    gmac: float
    top1: float


class Point(NamedTuple):
    """One training of a sweep; `untrained` ones have no seed."""

    reducer: str
    keep_ratio: float
    objective: str
    seed: int | None

    @property
    def name(self) -> str:
        """The name of the run directory; a reducer `MODULE:CLASS` is `MODULE-CLASS` in it."""
        parts = (re.sub(r"[^\w.]", "-", self.reducer), self.keep_ratio, self.objective, self.seed)
        return "_".join(str(part) for part in parts if part is not None)

    @property
    def overrides(self) -> list[str]:
        """The `--config.KEY=VALUE` arguments that make the recipe this point's."""
        values = [f"model.reducer={self.reducer}", f"model.keep_ratio={self.keep_ratio}", *_OBJECTIVES[self.objective]]
        return [f"--config.{value}" for value in (*values, *([] if self.seed is None else [f"seed={self.seed}"]))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """What `sit compare` compares: every reducer at every keep ratio, by every objective, with every seed.

    Attributes:
        reducers: Names of reducers, or `MODULE:CLASS`.
        keep_ratios: Fractions of the tokens that each stage keeps of the previous one: one for each budget.
        objectives: `frd` trains with the losses of the config file, `ce` with the cross entropy alone, `untrained` not
            at all: the teacher's weights, for reducers without parameters.
        seeds: Seeds of the trainings.
        batch_sizes: Batch sizes at which the models are timed.
        reported: Published results, which the figure shows in grey.
    """

    reducers: tuple[str, ...]
    keep_ratios: tuple[float, ...]
    objectives: tuple[Objective, ...] = ("frd",)
    seeds: tuple[int, ...] = (0,)
    batch_sizes: tuple[int, ...] = (1, 64)
    reported: tuple[Reported, ...] = ()

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ConfigError: A value is not allowed; the key is the field's name.
        """
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            is_list = isinstance(values, Sequence) and not isinstance(values, str)
            require(is_list, field.name, f"must be values in parentheses, such as (A, B), got {values!r}")
            require(bool(values) or field.name == "reported", field.name, "is empty")
            require(len(set(values)) == len(values), field.name, f"has a value twice: {values!r}")
            object.__setattr__(self, field.name, tuple(values))
        for name in self.reducers:
            require(isinstance(name, str) and bool(name), "reducers", f"must be names, got {name!r}")
        for ratio in self.keep_ratios:
            fits = isinstance(ratio, float | int) and 0 < ratio < 1
            require(fits, "keep_ratios", f"must be above 0 and below 1, got {ratio!r}")
        for name in self.objectives:
            known = get_args(Objective)
            require(name in known, "objectives", f"must be of {', '.join(known)}, got {name!r}")
        for name, least, most in (("seeds", 0, _LARGEST_SEED), ("batch_sizes", 1, math.inf)):
            for value in getattr(self, name):
                fits = isinstance(value, int) and least <= value <= most
                require(fits, name, f"must be integers, at least {least}, got {value!r}")
        for entry in self.reported:
            fits = isinstance(entry, Reported) and entry.gmac > 0 and 0 <= entry.top1 <= 1
            require(fits, "reported", f"must be Reported(name, gmac, top1), top1 a fraction of 1, got {entry!r}")
        names = [point.name for point in self.points]
        require(len(set(names)) == len(names), "reducers", "two names differ only in punctuation")

    @property
    def points(self) -> list[Point]:
        """All points, in order; a sweep that is cut short has all of its reducers at the first budgets."""
        return [
            Point(reducer, ratio, objective, seed)
            for objective in self.objectives
            for seed in (self.seeds if objective != "untrained" else (None,))
            for ratio in self.keep_ratios
            for reducer in self.reducers
        ]
