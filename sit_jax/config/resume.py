"""Which keys of a configuration may change when a run resumes."""

from typing import Any, Literal, NamedTuple

from sit_jax.config.config_dict import to_dict
from sit_jax.config.schema import Config

# `free`: the training stays the same. `later`: the steps from then on use the new value. `other`: another run.
Effect = Literal["free", "later", "other"]

# Keys and sections, of which the longest that matches applies; all other keys are `other`.
# The table in docs/training.md is compared with this one.
ON_RESUME: dict[str, Effect] = {
    "log": "free",
    "checkpoint": "free",
    "mesh": "free",
    "eval_batch_size": "free",
    "eval_every_epochs": "free",
    "data.data_dir": "free",
    "data.workers": "free",
    "data.threads": "free",
    "model.name": "free",
    "model.remat": "free",
    "model.attention": "free",
    "epochs": "later",
    "elastic_rule": "later",
    "optim": "later",
    "loss": "later",
    "augment": "later",
    "mix": "later",
    "data": "later",
    "model.dtype": "later",
    "model.drop_path": "later",
    # They select the training images.
    "data.name": "other",
    "data.train_split": "other",
    "data.val_fraction": "other",
}


class Change(NamedTuple):
    """A key with another value than in the run so far; None if its section is absent."""

    key: str
    before: Any
    now: Any
    effect: Effect


def changes(before: Config, now: Config) -> list[Change]:
    """Returns the keys in which two configurations of a run differ, sorted."""
    special: dict[str, Effect] = {
        # With the first token loss, the run gets reverse modules that have no optimizer state; and the reverse.
        "loss.token": "later" if (before.recovered is None) == (now.recovered is None) else "other",
        # Runs with and without labels have other classes and other evaluations.
        "loss.classification": "later" if before.loss.uses_labels == now.loss.uses_labels else "other",
    }
    return [
        Change(key, *values, special.get(key) or _effect(key))
        for key, values in _differences(to_dict(before), to_dict(now))
    ]


def _effect(key: str) -> Effect:
    matching = [name for name in ON_RESUME if f"{key}.".startswith(f"{name}.")]
    return ON_RESUME[max(matching, key=len)] if matching else "other"


def _differences(before: Any, now: Any, key: str = "") -> list[tuple[str, tuple[Any, Any]]]:
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted(before.keys() | now.keys())
        return [x for name in names for x in _differences(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))]
    return [] if before == now else [(key, (before, now))]
