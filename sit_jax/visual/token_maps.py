"""Where tokens come from: what every token after a slimming module is made of, as numbers over the image.

A slimming module makes each of its tokens as a weighted mean of the tokens before it. The product of the modules'
weights says what share each patch of the image has in each token. (Attention between the modules mixes tokens too;
like the paper's figures, the maps follow the slimming alone.)
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy import ndarray

from sit_jax.io.inference import softmax
from sit_jax.visual.attention import apply_watched


class StageMaps(NamedTuple):
    """The tokens that one slimming module makes.

    Attributes:
        after_block: The module stands behind this block, counted from 1.
        assignment: Fraction of each token before it in each token behind it, (batch, tokens, kept); columns sum to one.
        cumulative: Fraction of each patch of the image in each token, (batch, kept, patches); rows sum to one.
    """

    after_block: int
    assignment: Float[ndarray, "batch tokens kept"]
    cumulative: Float[ndarray, "batch kept patches"]

    @property
    def kept(self) -> int:
        """Tokens behind the module."""
        return self.cumulative.shape[1]

    @property
    def hard(self) -> Int[ndarray, "batch patches"]:
        """The token in which each patch has its largest share; see `hard_assignment`."""
        return hard_assignment(self.cumulative)

    @property
    def overlooked(self) -> Bool[ndarray, "batch patches"]:
        """Patches that no token looks at; see `overlooked_patches`."""
        return overlooked_patches(self.cumulative)

    @property
    def effective_patches(self) -> Float[ndarray, "batch kept"]:
        """How many patches each token is made of; see `effective_patches`."""
        return effective_patches(self.cumulative)


class TokenMaps(NamedTuple):
    """What a model does with a batch of images.

    Attributes:
        grid: Patches along one side of the image; patch `row * grid + column`.
        stages: One per slimming module, in order; empty for a model without.
        attention: One per block: the class token's attention to the block's patch tokens, (batch, tokens), mean over
            the heads. What is missing to one goes to the class token itself (and the distillation token).
        logits: (batch, classes), float32.
    """

    grid: int
    stages: tuple[StageMaps, ...]
    attention: tuple[Float[ndarray, "batch tokens"], ...]
    logits: Float[ndarray, "batch classes"]

    @property
    def probabilities(self) -> Float[ndarray, "batch classes"]:
        """Of the classes."""
        return softmax(self.logits)

    def stage_of(self, block: int) -> StageMaps | None:
        """The last slimming module before a block (counted from 1); None where the block works on the patches."""
        before = [stage for stage in self.stages if stage.after_block < block]
        return before[-1] if before else None

    def attention_on_patches(self, block: int) -> Float[ndarray, "batch patches"]:
        """The class token's attention in a block, handed on to the patches that the block's tokens are made of.

        Args:
            block: Counted from 1.

        Returns:
            (batch, patches); sums to the attention that the block's patch tokens get together.
        """
        weights, stage = self.attention[block - 1], self.stage_of(block)
        return weights if stage is None else np.einsum("bk,bkp->bp", weights, stage.cumulative)

    def token_attention(self, stage: int) -> Float[ndarray, "batch kept"]:
        """How much the class token attends to each token of a stage: the mean over the blocks that work on them.

        Args:
            stage: Index into `stages`.
        """
        first = self.stages[stage].after_block
        last = self.stages[stage + 1].after_block if stage + 1 < len(self.stages) else len(self.attention)
        return np.mean(self.attention[first:last], axis=0)

    def most_attended(self, stage: int, index: int, count: int) -> tuple[int, ...]:
        """The tokens of a stage that the class token attends to most in the blocks that work on them, most first.

        Args:
            stage: Index into `stages`.
            index: Of the image within the batch.
            count: How many, at most.
        """
        order = np.argsort(-self.token_attention(stage)[index], kind="stable")
        return tuple(int(token) for token in order[:count])


def token_maps(model: Any, variables: dict[str, Any], images: Float[Any, "batch height width channels"]) -> TokenMaps:
    """Runs a model and says where its tokens come from.

    Compiled once for each model and batch size.

    Args:
        model: A vision transformer's module (`sit_jax.models.build_model`), slimmed or not.
        variables: Its variables.
        images: Normalised images, (batch, height, width, channels).
    """
    logits, assignments, attention = jax.device_get(_forward(model, variables, jnp.asarray(images)))
    arch = model.arch
    totals = cumulative_maps(assignments)
    stages = tuple(
        StageMaps(block + 1, assignment, total)
        for block, assignment, total in zip(arch.slimming, assignments, totals, strict=True)
    )
    patches = tuple(weights[:, arch.num_prefix_tokens :] for weights in attention)
    return TokenMaps(arch.grid_size, stages, patches, logits)


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    model: Any, variables: dict[str, Any], images: Float[Array, "batch height width channels"]
) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    logits, outputs, attention = apply_watched(model, variables, images)
    return logits, outputs.assignments, attention


def cumulative_maps(
    assignments: Sequence[Float[ndarray, "batch _tokens _kept"]],
) -> list[Float[ndarray, "batch _kept patches"]]:
    """Fraction of each patch in each token behind each slimming module: the product of the assignments up to there.

    Args:
        assignments: The modules' assignments in order, each (batch, tokens, kept), columns summing to one.

    Returns:
        One array per module, float32; rows sum to one.
    """
    maps: list[ndarray] = []
    total: ndarray | None = None
    for assignment in assignments:
        own = np.swapaxes(np.asarray(assignment, np.float64), 1, 2)
        total = own if total is None else own @ total
        maps.append(total.astype(np.float32))
    return maps


def hard_assignment(cumulative: Float[ndarray, "batch kept patches"]) -> Int[ndarray, "batch patches"]:
    """The token in which each patch has its largest share; the first of equals.

    Every patch gets one, also where all shares are next to nothing: `overlooked_patches` tells these.
    """
    return cumulative.argmax(axis=1)


def overlooked_patches(cumulative: Float[ndarray, "batch kept patches"]) -> Bool[ndarray, "batch patches"]:
    """Patches that have less than half an even share, 1 / patches, in every token.

    A token that does not choose at all gives an even share to each patch. So all tokens have turned away from these,
    and their largest share says little about where they belong.
    """
    return cumulative.max(axis=1) < 0.5 / cumulative.shape[2]


def effective_patches(cumulative: Float[ndarray, "batch kept patches"]) -> Float[ndarray, "batch kept"]:
    """How many patches each token is made of: the exponential of its row's entropy.

    1 where a token is a single patch, the number of patches where it is the mean of all.
    """
    shares = cumulative.astype(np.float64)
    logarithms = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
    return np.exp(-(shares * logarithms).sum(axis=2))
