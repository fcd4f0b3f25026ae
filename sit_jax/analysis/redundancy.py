"""Implementation of `sit tune --before_training`: proposes reducers from a model's own tokens.

A reducer's tokens are linear combinations of its input tokens. The best K of them leave the error of a truncated
singular value decomposition (Eckart-Young), which bounds every reducer from below. This is the redundancy curve of a
block: the error of its tokens as a function of K.
"""

import dataclasses
import itertools
import pathlib
import pprint
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sit_jax.analysis.flops import count_cost
from sit_jax.analysis.table import print_table
from sit_jax.config import Config, JsonObject, LossConfig, ModelConfig, TeacherConfig
from sit_jax.config.config_dict import to_dict
from sit_jax.data.config import DataConfig
from sit_jax.data.pipeline import Hosts, eval_batches
from sit_jax.data.preprocess import normalize
from sit_jax.data.registry import open_source
from sit_jax.data.sources import Example, Source, evenly_spread
from sit_jax.errors import UserError
from sit_jax.io.atomic_write import atomic_create
from sit_jax.io.model import Model
from sit_jax.io.runs import find_checkpoint
from sit_jax.models import build_model
from sit_jax.models.architecture import Architecture
from sit_jax.parallel import sharding
from sit_jax.training.evaluate import eval_inputs

_FRACTIONS = (0.5, 0.25, 0.125)
# All blocks' tokens of a batch are in memory at once, and their decomposition.
_BATCH = 16


class Proposal(NamedTuple):
    """Reducers for a model.

    Attributes:
        arch: The slimmed architecture.
        error: The error of each reducer's tokens is at most this, as a fraction of 1.
    """

    arch: Architecture
    error: float

    @property
    def after(self) -> tuple[int, ...]:
        """The blocks, counted from 1, that the reducers are after."""
        return tuple(block + 1 for block in self.arch.slimming)


def redundancy(model: Model, data: DataConfig, limit: int) -> Float[np.ndarray, "depth tokens"]:
    """Measures the redundancy curves of a model on training images, preprocessed as for evaluation.

    Args:
        model: A vision transformer.
        data: The data set.
        limit: Number of images, evenly spaced over the split.

    Returns:
        For each block and each K from 1, the squared error of the block's patch tokens if they are recovered from the
        best K tokens, over the error of recovering them from their mean alone: at most 1, and 0 for all tokens.
    """
    arch = model.vit
    module = build_model(arch, dtype=model.dtype)

    @jax.jit
    def spectra(variables: JsonObject, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, outputs = module.bind(variables)(normalize(pixels, data))
        tokens = jnp.stack(outputs.tokens, axis=1).astype(jnp.float32)  # (batch, depth, tokens, dim)
        energy = jnp.linalg.svd(tokens, compute_uv=False) ** 2
        # The first K components leave the sum of the others, which is added from the smallest on.
        left = jnp.cumsum(energy[..., ::-1], axis=-1)[..., ::-1][..., 1:]
        return left.sum(axis=0), tokens.var(axis=2).sum(axis=(0, 2)) * tokens.shape[2]

    remaining = np.zeros((arch.depth, arch.num_patches))
    whole = np.zeros((arch.depth, 1))
    for pixels in _pixels(model, data, limit):
        left, around_mean = spectra(model.variables, pixels)
        # If there are fewer dimensions than tokens, so many components leave nothing.
        remaining[:, : left.shape[1]] += np.asarray(left, np.float64)
        whole[:, 0] += np.asarray(around_mean, np.float64)
    return remaining / whole


def _pixels(model: Model, data: DataConfig, limit: int) -> Iterator[np.ndarray]:
    """Yields batches of readable images of the training split, uint8."""
    inputs = dataclasses.replace(eval_inputs(model, data, sharding.make_mesh()), labels=False, eval_batch_size=_BATCH)
    read = 0
    for batch in eval_batches(inputs, _EvenlySpaced(open_source(data, data.train_split), limit), Hosts()):
        images = np.asarray(batch["image"])[np.asarray(batch["mask"]) > 0]
        read += len(images)
        if len(images):
            yield images
    if not read:
        raise UserError(f"{data.train_split}: has no image that can be read")


class _EvenlySpaced:
    """A number of examples of a source, evenly spaced: folders of images are sorted by class."""

    def __init__(self, source: Source, count: int) -> None:
        self.class_names, self.multi_label = source.class_names, source.multi_label
        self._source, self._indices = source, evenly_spread(len(source), count).tolist()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self._source[self._indices[index]]


def propose(arch: Architecture, curves: Float[np.ndarray, "depth tokens"], reducers: int, gmac: float) -> Proposal:
    """Proposes after which blocks to reduce, and to how many tokens.

    For a bound on the error, each reducer keeps the fewest tokens that are within the bound. Of all places, those with
    the smallest bound are chosen at which the model costs at most `gmac`.

    Args:
        arch: The architecture without reducers.
        curves: See `redundancy`.
        reducers: Number of reducers.
        gmac: Largest cost of an image.

    Raises:
        UserError: No proposal has so small a cost, or the architecture itself has.
    """
    if arch.depth <= reducers:
        raise UserError(f"--reducers: {reducers} are too many for {arch.depth} blocks")
    whole = count_cost(arch).gmac
    if gmac >= whole:
        raise UserError(f"--gmac: {gmac:g} needs no reducers; the model has {whole:.4g}")
    bounds = np.unique(np.concatenate([[0.0], curves[:-1].ravel()]))
    best: Proposal | None = None
    cheapest = float("inf")
    high = len(bounds) - 1
    for after in itertools.combinations(range(1, arch.depth), reducers):
        cost = count_cost(_slimmed(arch, curves, after, bounds[high])).gmac
        cheapest = min(cheapest, cost)
        if cost > gmac:
            continue
        low = 0
        while low < high:
            middle = (low + high) // 2
            fits = count_cost(_slimmed(arch, curves, after, bounds[middle])).gmac <= gmac
            low, high = (low, middle) if fits else (middle + 1, high)
        best = Proposal(_slimmed(arch, curves, after, bounds[high]), float(bounds[high]))
        # The next places must have a smaller bound.
        if high == 0:
            break
        high -= 1
    if best is None:
        raise UserError(
            f"--gmac: {gmac:g} is not possible with {reducers} reducers; the least is {cheapest * 1.001:.4g}"
        )
    return best


def _slimmed(
    arch: Architecture, curves: Float[np.ndarray, "depth tokens"], after: tuple[int, ...], bound: float
) -> Architecture:
    """Returns the architecture with the fewest tokens after some blocks whose errors are within a bound."""
    fewest = [int(np.argmax(curves[block - 1] <= bound + 1e-12)) + 1 for block in after]
    # What a later reducer needs, the earlier ones must keep.
    counts = [arch.num_patches, *np.maximum.accumulate(fewest[::-1])[::-1].tolist()]
    stages = tuple(later - earlier for earlier, later in itertools.pairwise((0, *after, arch.depth)))
    return dataclasses.replace(arch, stage_blocks=stages, kept_tokens=tuple(counts))


def write_config(path: pathlib.Path, proposal: Proposal, model: Model, data: DataConfig) -> None:
    """Writes a config file that trains a proposal by distillation, as the model was trained if that is known.

    The teacher is `model.source`: a run, one of its checkpoints (`RUN/checkpoints/STEP`), or a model folder.

    Raises:
        UserError: The file exists or cannot be written.
    """
    base = model.config or Config(model=ModelConfig(architecture=model.vit), data=data)
    section = dataclasses.replace(base.model, architecture=model.vit, name="")
    uses_head = model.vit.num_classes > 0 and base.loss.uses_labels
    # The paper's weight is for teachers that divide their residual branches; see configs/digits.py.
    token = 2.0 if model.vit.residual_scale > 1 else 0.1
    loss = LossConfig(token=token, logits=2.0, hard=base.loss.hard, label_smoothing=base.loss.label_smoothing)
    source = pathlib.Path(model.source).absolute()
    cnn = base.cnn_teacher
    if cnn is not None and not cnn.run:
        # The one that was trained within the model's run.
        cnn = dataclasses.replace(cnn, run=str(find_checkpoint(source)[0] / "cnn_teacher"))
    config = dataclasses.replace(
        base,
        data=data,
        model=dataclasses.replace(section, architecture=proposal.arch),
        teacher=TeacherConfig(model=section, run=str(source)),
        cnn_teacher=cnn if uses_head else None,
        init="teacher",
        loss=loss if uses_head else LossConfig(classification=0.0, token=token, feature=1.0),
    )
    values = pprint.pformat(_with_tuples(to_dict(config)), width=112, sort_dicts=False)
    words = (
        f"after blocks {', '.join(map(str, proposal.after))}: {'/'.join(map(str, proposal.arch.token_counts))} tokens"
    )
    text = f'''"""Reducers that `sit tune --before_training` proposes, {words}.

    sit train --config {path.name} --workdir runs/{path.stem}
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(VALUES)


VALUES = {values}
'''
    with atomic_create(path) as part:
        part.write_text(text)


def _with_tuples(value: Any) -> Any:
    """Returns JSON values with tuples for lists: ml_collections overrides only those on the command line."""
    if isinstance(value, dict):
        return {key: _with_tuples(x) for key, x in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def print_proposal(proposal: Proposal, curves: Float[np.ndarray, "depth tokens"], arch: Architecture) -> None:
    """Prints the redundancy curves and the proposal as tables."""
    tokens = [max(1, int(arch.num_patches * part)) for part in _FRACTIONS]
    rows = [
        (str(block + 1), *(f"{curve[count - 1]:.1%}" for count in tokens), str(proposal.arch.slimming.get(block, "")))
        for block, curve in enumerate(curves)
    ]
    headings = ("block", *(f"error of {count} tokens" for count in tokens), "proposed tokens")
    print_table(headings, rows, title=f"Error of recovering {arch.num_patches} tokens from fewer, at least")
    cost, whole = count_cost(proposal.arch).gmac, count_cost(arch).gmac
    words = ", ".join(map(str, proposal.after))
    counts = "/".join(map(str, proposal.arch.token_counts))
    print(f"Proposed: reducers after blocks {words}, {counts} tokens, {cost:.4g} GMAC ({cost / whole:.0%})")
