"""Token maps: the weights of the image's patches in each token after a slimming module.

Each token of a slimming module is a weighted mean of the module's input tokens. The product of the modules' weights is
the weight of each patch of the image in each token. (Attention between the modules also mixes tokens; like the paper's
figures, the maps include only the slimming.)
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8
from numpy import ndarray

from sit_jax.data.preprocess import normalize
from sit_jax.io.inference import softmax
from sit_jax.io.model import Model
from sit_jax.models import Outputs
from sit_jax.models.architecture import Architecture
from sit_jax.models.layers import Attention
from sit_jax.models.trees import Variables


class StageMaps(NamedTuple):
    """Token maps of one slimming module.

    Attributes:
        after_block: The block, counted from 1, that the module follows.
        assignment: Weight of each input token in each output token, (batch, tokens, kept); columns sum to one, except
            that of EViT's fused token.
        cumulative: Weight of each patch of the image in each token, (batch, kept, patches); rows sum to one.
    """

    after_block: int
    assignment: Float[ndarray, "batch tokens kept"]
    cumulative: Float[ndarray, "batch kept patches"]

    @property
    def kept(self) -> int:
        """Number of tokens after the module."""
        return self.cumulative.shape[1]

    @property
    def hard(self) -> Int[ndarray, "batch patches"]:
        """See `hard_assignment`."""
        return hard_assignment(self.cumulative)

    @property
    def overlooked(self) -> Bool[ndarray, "batch patches"]:
        """See `overlooked_patches`."""
        return overlooked_patches(self.cumulative)

    @property
    def effective_patches(self) -> Float[ndarray, "batch kept"]:
        """See `effective_patches`."""
        return effective_patches(self.cumulative)


class TokenMaps(NamedTuple):
    """Token maps and outputs of a model for a batch of images.

    Attributes:
        grid: Rows and columns of the patches, which are in row-major order.
        stages: One per slimming module, in order; empty for a model without slimming.
        attention: One per block: the class token's attention to the block's patch tokens, (batch, tokens), mean over
            the heads; without a class token, the mean over all tokens. The remaining attention is to the prefix tokens.
        logits: (batch, classes), float32; no classes without a head.
        attending: Whose attention it is, in words: `the class token` or `all tokens`.
    """

    grid: tuple[int, int]
    stages: tuple[StageMaps, ...]
    attention: tuple[Float[ndarray, "batch tokens"], ...]
    logits: Float[ndarray, "batch classes"]
    attending: str = "the class token"

    @property
    def probabilities(self) -> Float[ndarray, "batch classes"]:
        """Probabilities of the classes."""
        return softmax(self.logits)

    def stage_of(self, block: int) -> StageMaps | None:
        """Returns the last slimming module before a block (counted from 1), or None if there is none."""
        before = [stage for stage in self.stages if stage.after_block < block]
        return before[-1] if before else None

    def attention_on_patches(self, block: int) -> Float[ndarray, "batch patches"]:
        """Returns the attention in a block (counted from 1), distributed to the patches of the block's tokens.

        It sums to the total attention to the block's patch tokens.
        """
        weights, stage = self.attention[block - 1], self.stage_of(block)
        return weights if stage is None else np.einsum("bk,bkp->bp", weights, stage.cumulative)

    def token_attention(self, stage: int) -> Float[ndarray, "batch kept"]:
        """Returns the attention to each token of `stages[stage]`: the mean over the stage's blocks."""
        first = self.stages[stage].after_block
        last = self.stages[stage + 1].after_block if stage + 1 < len(self.stages) else len(self.attention)
        return np.mean(self.attention[first:last], axis=0)

    def most_attended(self, stage: int, index: int, count: int) -> tuple[int, ...]:
        """Returns the `count` tokens of `stages[stage]` with the most attention in image `index`, in order."""
        order = np.argsort(-self.token_attention(stage)[index], kind="stable")
        return tuple(int(token) for token in order[:count])


def token_maps(
    model: nn.Module, variables: Variables, images: Float[Array | ndarray, "batch height width channels"]
) -> TokenMaps:
    """Returns the token maps of normalized images; compiled once per model and batch size.

    The model is a vision transformer's module (`sit_jax.models.build_model`), slimmed or not.
    """
    logits, assignments, attention = jax.device_get(_forward(model, variables, jnp.asarray(images)))
    arch = model.arch
    totals = cumulative_maps(assignments)
    stages = tuple(
        StageMaps(block + 1, assignment, total)
        for block, assignment, total in zip(arch.slimming, assignments, totals, strict=True)
    )
    patches = tuple(weights[:, arch.num_prefix_tokens :] for weights in attention)
    return TokenMaps(arch.grid, stages, patches, logits, attending_in_words(arch))


def attending_in_words(arch: Architecture) -> str:
    """Returns whose attention the maps of a model have: that of the class token, or the mean over all tokens."""
    return "the class token" if arch.class_token else "all tokens"


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    model: nn.Module, variables: Variables, images: Float[Array, "batch height width channels"]
) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    logits, outputs, attention = apply_watched(model, variables, images)
    return logits, outputs.assignments, attention


def apply_watched(
    model: nn.Module, variables: Variables, images: Float[Array, "batch height width channels"]
) -> tuple[Float[Array, "batch classes"], Outputs, tuple[Array, ...]]:
    """Applies a model and also returns the class token's attention; without a class token, the mean over all tokens.

    A copy of every attention module computes it; the model itself is unchanged. The attention is that to all tokens of
    each block, prefix tokens first; mean over the heads, float32, rows sum to one.
    """
    attention: list[Array] = []

    def intercept(
        call: Callable[..., PyTree], args: PyTree, kwargs: PyTree, context: nn.module.InterceptorContext
    ) -> PyTree:
        module = context.module
        # The copy has no name.
        if isinstance(module, Attention) and module.name and context.method_name == "__call__":
            watched = module.clone(parent=None, name=None, needs=frozenset({"class_attention"}))
            result: Any = watched.apply(module.variables, *args, **kwargs)
            attention.append(result[2])
        return call(*args, **kwargs)

    forward = nn.apply(lambda module: module(images), model.clone(remat=False))
    with nn.intercept_methods(intercept):
        logits, outputs = forward(variables)
    return logits, outputs, tuple(attention)


def model_token_maps(model: Model, pixels: UInt8[ndarray, "batch height width channels"]) -> TokenMaps:
    """Returns the token maps of uint8 images of the model's size; compiled once per model and batch size."""
    return token_maps(model.module, model.variables, normalize(jnp.asarray(pixels), model.data))


def cumulative_maps(
    assignments: Sequence[Float[ndarray, "batch _tokens _kept"]],
) -> list[Float[ndarray, "batch _kept patches"]]:
    """Returns the weight of each patch in each token after each slimming module: the product of the assignments so far.

    The rows of a map, which is float32, sum to one; columns of an assignment that do not are scaled.
    """
    own = [np.swapaxes(np.asarray(assignment, np.float64), 1, 2) for assignment in assignments]
    own = [weights / np.maximum(weights.sum(axis=2, keepdims=True), 1e-30) for weights in own]
    return [total.astype(np.float32) for total in itertools.accumulate(own, lambda total, maps: maps @ total)]


def hard_assignment(cumulative: Float[ndarray, "batch kept patches"]) -> Int[ndarray, "batch patches"]:
    """Returns the token in which each patch has its largest weight; the first one of equals.

    Every patch is assigned, even if all weights are almost zero; see `overlooked_patches` for those.
    """
    return cumulative.argmax(axis=1)


def overlooked_patches(cumulative: Float[ndarray, "batch kept patches"]) -> Bool[ndarray, "batch patches"]:
    """Returns the patches that have less than half of the uniform weight, 1 / patches, in every token.

    A token without preferences has the uniform weight for each patch. All tokens give these patches less, so their hard
    assignment has little meaning.
    """
    return cumulative.max(axis=1) < 0.5 / cumulative.shape[2]


def effective_patches(cumulative: Float[ndarray, "batch kept patches"]) -> Float[ndarray, "batch kept"]:
    """Returns the effective number of patches of each token: the exponential of its row's entropy.

    It is 1 for a token of a single patch, and the number of patches for the mean of all patches.
    """
    weights = cumulative.astype(np.float64)
    logarithms = np.log(weights, where=weights > 0, out=np.zeros_like(weights))
    return np.exp(-(weights * logarithms).sum(axis=2))
