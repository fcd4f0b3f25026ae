"""A student that passes on fewer tokens than it was trained to, with the weights it has.

Each kept token has a column of its own in the assignment, a softmax over the tokens before it that knows nothing of the
other columns; and no weight behind a slimming module depends on how many tokens come. So columns can be cut off a
module, and for the same input it makes the others' tokens as before. More than the trained number cannot be had: each
column has its own weights. Nothing was trained for fewer, so accuracy falls.
"""

import dataclasses
from typing import Any, NamedTuple

from sit_jax.models.architecture import Architecture

_SHARES = (0.8, 0.6, 0.4)


class Keep(NamedTuple):
    """How many tokens each slimming module passes on.

    Attributes:
        label: For the page.
        counts: One per module, in order.
    """

    label: str
    counts: tuple[int, ...]


def keeps(arch: Architecture) -> tuple[Keep, ...]:
    """The trained numbers of tokens, then smaller ones: those of a smaller keep ratio, at least one per module.

    Args:
        arch: A slimmed model's shape.
    """
    trained = arch.token_counts[1:]
    found = {trained: "as trained"}
    for share in _SHARES:
        counts = tuple(max(1, int(count * share ** (stage + 1))) for stage, count in enumerate(trained))
        ratio = f"keep ratio {arch.keep_ratio * share:.2g}" if arch.keep_ratio else f"{share:.0%} per module"
        found.setdefault(counts, ratio)
    return tuple(Keep(f"{label}: {tokens_in_words(counts)}", counts) for counts, label in found.items())


def tokens_in_words(counts: tuple[int, ...]) -> str:
    """`(8, 4)` -> `8/4 tokens`, `(1,)` -> `1 token`."""
    return f"{'/'.join(map(str, counts))} {'token' if counts == (1,) else 'tokens'}"


def with_fewer_tokens(
    arch: Architecture, params: dict[str, Any], counts: tuple[int, ...]
) -> tuple[Architecture, dict[str, Any]]:
    """The shape and the parameters of a model whose slimming modules make only the first of their tokens.

    Args:
        arch: A slimmed model's shape.
        params: Its parameters.
        counts: Tokens behind each slimming module, at most what it makes.
    """
    fewer = dict(params)
    for block, count in zip(arch.slimming, counts, strict=True):
        module = params[f"slimming_{block}"]
        last = {name: values[..., :count] for name, values in module["fc2"].items()}
        fewer[f"slimming_{block}"] = {**module, "fc2": last}
    return dataclasses.replace(arch, keep_ratio=None, kept_tokens=(arch.num_patches, *counts)), fewer
