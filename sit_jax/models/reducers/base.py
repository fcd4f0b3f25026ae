"""The protocol and the registry of token reducers.

Nearly every static method of token reduction is `X' = A^T X` with an assignment `A`: one-hot columns (top-k), means of
pairs (ToMe), soft columns (SiT). Code that uses only `A` and the number of kept tokens works with all of them:
distillation, RTSMs, token maps, cost, StableHLO export and benchmarks.
"""

import importlib
import pathlib
import sys
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple, Protocol, TypeVar, get_args, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sit_jax.errors import ConfigError, one_line

Place = Literal["behind_block", "inside_block"]


class Cues(NamedTuple):
    """Values that a block provides to the reducer after or inside it; `jit` prunes the unused ones.

    Attributes:
        tokens: Patch tokens, without class token and other prefix tokens.
        keys: The attention's keys of the patch tokens, mean over heads; None unless `needs` has `keys`.
        class_attention: Attention of the class token to each patch token, mean over heads; None unless `needs` has
            `class_attention`.
        mass: Number of patches merged into each token so far; they sum to the number of patches if no patch is dropped.
    """

    tokens: Float[Array, "batch tokens dim"]
    keys: Float[Array, "batch tokens size"] | None
    class_attention: Float[Array, "batch tokens"] | None
    mass: Float[Array, "batch tokens"]


class Reduced(NamedTuple):
    """Result of a reducer.

    Attributes:
        tokens: The kept tokens.
        mass: Number of patches merged into each kept token.
        assignment: Weight of each input token in each kept token; `tokens` is `assignment^T tokens`.
    """

    tokens: Float[Array, "batch kept dim"]
    mass: Float[Array, "batch kept"]
    assignment: Float[Array, "batch tokens kept"]


@runtime_checkable
class Reducer(Protocol):
    """A Flax module that merges or drops patch tokens; constructed as `Reducer(dtype=..., name=...)`.

    Attributes:
        needs: Cues that it reads in addition to `tokens` and `mass`: `keys`, `class_attention`.
        place: `behind_block` (after a block), or `inside_block` (between a block's attention and its MLP).

    A reducer with `weighs_attention = True` has the logarithm of each token's mass added to the scores of the attention
    in all later blocks, so that a merged token counts as the patches in it (ToMe's proportional attention).

    A reducer with parameters can be cut to fewer tokens if it has a static method `first_tokens(params, kept)`, which
    returns the parameters of a reducer whose tokens are its first ones.
    """

    needs: ClassVar[frozenset[str]]
    place: ClassVar[Place]

    def __call__(self, cues: Cues, kept: int) -> Reduced:
        """Reduces to `kept` tokens, a Python int, since shapes are static."""
        ...


@runtime_checkable
class ReducerFactory(Protocol):
    """The class of a `Reducer`."""

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def place(self) -> Place: ...

    def __call__(self, *, dtype: DTypeLike, name: str) -> Reducer: ...


ReducerClass = TypeVar("ReducerClass", bound=ReducerFactory)
_REDUCERS: dict[str, ReducerFactory] = {}


def register_reducer(name: str) -> Callable[[ReducerClass], ReducerClass]:
    """Returns a class decorator that registers a reducer for `Architecture.reducer=name`."""

    def register(reducer: ReducerClass) -> ReducerClass:
        _REDUCERS[name] = reducer
        return reducer

    return register


def find_reducer(name: str) -> ReducerFactory:
    """Returns the class of a reducer: a registered name, or `MODULE:CLASS` of a module that can be imported.

    Raises:
        ConfigError: There is no such reducer.
    """
    reducer = _REDUCERS[name] if name in _REDUCERS else _import_reducer(name)
    if not isinstance(reducer, ReducerFactory) or reducer.place not in get_args(Place):
        known = " or ".join(get_args(Place))
        raise ConfigError("reducer", f"{name!r} is not a reducer: it must have `needs`, and a `place`, {known}")
    return reducer


def weighs_attention(reducer: ReducerFactory) -> bool:
    """Returns whether the blocks after a reducer add the logarithm of a token's mass to its attention scores."""
    return bool(getattr(reducer, "weighs_attention", False))


def _import_reducer(name: str) -> object:
    module, colon, attribute = name.partition(":")
    if not colon:
        known = ", ".join(sorted(_REDUCERS))
        raise ConfigError("reducer", f"there is no reducer {name!r}; there are {known}, and MODULE:CLASS for your own")
    here = str(pathlib.Path.cwd())
    path = [] if here in sys.path else [here]
    sys.path += path
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # A user's module may raise any error.
        problem = f"{name!r} cannot be imported: {type(error).__name__}: {one_line(error)}"
        raise ConfigError("reducer", problem) from None
    finally:
        for entry in path:
            sys.path.remove(entry)


def merge(cues: Cues, assignment: Float[Array, "batch tokens kept"]) -> Reduced:
    """Computes `assignment^T tokens`, in the type of the tokens, and the merged mass."""
    weights = assignment.astype(cues.tokens.dtype)
    tokens = jnp.einsum("bnk,bnc->bkc", weights, cues.tokens)
    return Reduced(tokens, (assignment * cues.mass[:, :, None]).sum(axis=1), assignment)


def merge_groups(
    cues: Cues,
    groups: Int[Array, "batch tokens"],
    kept: int,
    weights: Float[Array, "batch tokens"] | None = None,
) -> Reduced:
    """Merges each group of tokens into one token, whose mass is the sum of theirs.

    Args:
        cues: Cues of the block.
        groups: Index of the kept token that each token is merged into; -1 for a token that is dropped.
        kept: Number of groups.
        weights: Weight of each token in the sum; if None, its part of the group's mass, for a weighted mean.
    """
    members = jax.nn.one_hot(groups, kept)
    masses = members * cues.mass[:, :, None]
    mass = masses.sum(axis=1)
    assignment = masses / mass[:, None] if weights is None else members * weights[:, :, None]
    return merge(cues, assignment)._replace(mass=mass)


def is_among_largest(scores: Float[Array, "batch tokens"], count: int) -> Bool[Array, "batch tokens"]:
    """Returns whether a score is among the `count` largest of its row; of equal scores, the first are.

    It compares all pairs, which needs no sorting and is the same on every device and in every exported format.
    """
    mine, others = scores[:, :, None], scores[:, None]
    position = jnp.arange(scores.shape[1])
    is_first = (position[None] < position[:, None])[None]
    return ((others > mine) | ((others == mine) & is_first)).sum(axis=2) < count


def reduce_patches(
    reducer: Reducer, x: Float[Array, "batch tokens dim"], cues: Cues, kept: int
) -> tuple[Float[Array, "batch _ dim"], Reduced]:
    """Reduces the patch tokens among all tokens of a block; prefix tokens are unchanged.

    Args:
        reducer: The bound reducer.
        x: Prefix tokens, then patch tokens.
        cues: Cues of the block; its tokens are the patch tokens of `x`.
        kept: Number of patch tokens to keep.
    """
    prefix = x.shape[1] - cues.tokens.shape[1]
    reduced = reducer(cues, kept)
    return jnp.concatenate([x[:, :prefix], reduced.tokens], axis=1), reduced
