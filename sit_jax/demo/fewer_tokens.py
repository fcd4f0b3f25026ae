"""Runs a student with fewer tokens than it was trained with, without changing its weights.

Each kept token has its own column in the assignment, a softmax over the input tokens that is independent of the other
columns, and no weight after a slimming module depends on the number of tokens. Thus columns can be removed from a
module, and for the same input its other tokens do not change. More tokens than trained are not possible, since each
column has its own weights. The model was not trained for fewer tokens, so the accuracy decreases.
"""

import dataclasses
from typing import NamedTuple

from sit_jax.models.architecture import Architecture
from sit_jax.models.trees import Params

# Factors of the keep ratio.
_FACTORS = (0.8, 0.6, 0.4)


class Keep(NamedTuple):
    """Number of tokens that each slimming module keeps, in order, with a label for the page."""

    label: str
    counts: tuple[int, ...]


def keeps(arch: Architecture) -> tuple[Keep, ...]:
    """Returns a slimmed model's trained token counts, then those of smaller keep ratios, at least one per module."""
    trained = arch.token_counts[1:]
    found = {trained: "as trained"}
    for factor in _FACTORS:
        counts = tuple(max(1, int(count * factor ** (stage + 1))) for stage, count in enumerate(trained))
        ratio = f"keep ratio {arch.keep_ratio * factor:.2g}" if arch.keep_ratio else f"{factor:.0%} per module"
        found.setdefault(counts, ratio)
    return tuple(Keep(f"{label}: {tokens_in_words(counts)}", counts) for counts, label in found.items())


def tokens_in_words(counts: tuple[int, ...]) -> str:
    """Formats token counts: `(8, 4)` -> `8/4 tokens`, `(1,)` -> `1 token`."""
    return f"{'/'.join(map(str, counts))} {'token' if counts == (1,) else 'tokens'}"


def with_fewer_tokens(arch: Architecture, params: Params, counts: tuple[int, ...]) -> tuple[Architecture, Params]:
    """Returns a model whose slimming modules output only the first of their tokens, at most as many as trained."""
    fewer = dict(params)
    for block, count in zip(arch.slimming, counts, strict=True):
        module = params[f"slimming_{block}"]
        last = {name: values[..., :count] for name, values in module["fc2"].items()}
        fewer[f"slimming_{block}"] = {**module, "fc2": last}
    return dataclasses.replace(arch, keep_ratio=None, kept_tokens=(arch.num_patches, *counts)), fewer
