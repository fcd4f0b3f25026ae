"""Cuts slimmed models to fewer tokens, without training."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sit_jax.errors import ConfigError, require
from sit_jax.models.architecture import Architecture
from sit_jax.models.reducers.base import find_reducer
from sit_jax.models.trees import Params


def cut_architecture(arch: Architecture, kept_tokens: Sequence[int]) -> Architecture:
    """Returns the architecture of a model that is cut to a token schedule.

    Args:
        arch: A slimmed architecture.
        kept_tokens: Patch tokens of each stage, at most as many as in `arch`.

    Raises:
        ConfigError: `kept_tokens` does not fit the architecture.
    """
    require(arch.is_slimmed, "kept_tokens", "is for slimmed models; this one has all tokens in every block")
    fits = bool(kept_tokens) and all(isinstance(count, int | np.integer) for count in kept_tokens)
    require(fits, "kept_tokens", f"must be integers, as {arch.token_counts}, got {tuple(kept_tokens)}")
    schedule = tuple(map(int, kept_tokens))
    cut = dataclasses.replace(arch, keep_ratio=None, kept_tokens=schedule, kept_tokens_choices=())
    trained = arch.token_counts
    fits = all(mine <= most for mine, most in zip(cut.kept_tokens, trained, strict=True))
    require(fits, "kept_tokens", f"must be at most {trained} in each stage, got {cut.kept_tokens}")
    return cut


def scaled_schedule(token_counts: Sequence[int], factor: float) -> tuple[int, ...]:
    """Returns a schedule whose reducers each keep `factor` times the fraction of tokens, and at least one token."""
    return tuple(max(1, int(count * factor**stage)) for stage, count in enumerate(token_counts))


def cut_params(arch: Architecture, params: Params, kept_tokens: Sequence[int]) -> Params:
    """Returns the parameters of a model that is cut to a token schedule; see `cut_architecture`.

    Reducers with parameters keep those of their first tokens, by their `first_tokens`. No other parameter depends on
    the number of tokens.

    Raises:
        ConfigError: `kept_tokens` does not fit the architecture, or the reducer cannot be cut.
    """
    cut = dict(params)
    for block, kept in cut_architecture(arch, kept_tokens).slimming.items():
        outside, inside = f"slimming_{block}", f"blocks_{block}"
        if kept == arch.slimming[block]:
            continue
        if outside in params:
            cut[outside] = _first_tokens(arch, params[outside], kept)
        elif "reducer" in params[inside]:
            cut[inside] = {**params[inside], "reducer": _first_tokens(arch, params[inside]["reducer"], kept)}
    return cut


def can_cut(arch: Architecture, params: Params) -> bool:
    """Returns whether a slimmed model can be cut: its reducers have no parameters, or `first_tokens`."""
    has_params = any(f"slimming_{block}" in params or "reducer" in params[f"blocks_{block}"] for block in arch.slimming)
    return not has_params or hasattr(find_reducer(arch.reducer), "first_tokens")


def _first_tokens(arch: Architecture, params: Params, kept: int) -> Params:
    reducer: Any = find_reducer(arch.reducer)
    if not hasattr(reducer, "first_tokens"):
        raise ConfigError("kept_tokens", f"{arch.reducer} has parameters and no `first_tokens`, so it cannot be cut")
    found: Params = reducer.first_tokens(params, kept)
    return found


def cut_rtsm(arch: Architecture, rtsm: Params, kept_tokens: Sequence[int]) -> Params:
    """Returns the reverse modules of a model that is cut to a token schedule: they take the first tokens only."""
    cut = dict(rtsm)
    for block, kept in enumerate(cut_architecture(arch, kept_tokens).block_output_tokens):
        name = f"blocks_{block}"
        if name in rtsm:
            across = rtsm[name]["token_mlp"]
            first = {**across["fc1"], "kernel": across["fc1"]["kernel"][:kept]}
            cut[name] = {**rtsm[name], "token_mlp": {**across, "fc1": first}}
    return cut
