"""The Python interface: models by name, from files, and slimmed. `import sit_jax` offers all of it."""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array
from ml_collections import ConfigDict

from sit_jax.config import Config
from sit_jax.config.config_dict import from_config_dict, with_defaults
from sit_jax.data.sources import Source
from sit_jax.errors import ConfigError
from sit_jax.io.model import Model
from sit_jax.models import build_model, reducer_params
from sit_jax.models.architecture import Architecture
from sit_jax.models.trees import Variables
from sit_jax.models.variants import get_architecture
from sit_jax.training.loop import Callback, Extensions, run
from sit_jax.training.step import Loss


def create_model(name: str, seed: int = 0, **changes: object) -> Model:
    """A named model with random weights.

    Args:
        name: One of `list_models()`.
        seed: Decides the weights.
        **changes: Fields of its `Architecture` to change, such as `num_classes=10` or `image_size=64`.

    Raises:
        ConfigError: Unknown name or field, or an impossible combination.
    """
    arch = get_architecture(name, **changes)
    return Model(arch, _draw(arch, seed))


def slim(
    teacher: Model,
    keep_ratio: float | None = None,
    after: Sequence[int] | None = None,
    seed: int = 0,
    reducer: str = "slim",
    *,
    kept_tokens: Sequence[int] = (),
    r: int = 0,
) -> Model:
    """Makes a student: the teacher with token reducers between its blocks.

    It has the teacher's weights. Reducers with parameters, such as `slim`, are random until the student is distilled;
    `tome`, `topk` and `evit` have none. The number of tokens follows from one of `keep_ratio`, `kept_tokens` and `r`.

    Args:
        teacher: A model without slimming.
        keep_ratio: Fraction of the patch tokens that each reducer keeps: for N patch tokens, the stages have N,
            `int(N * keep_ratio)`, `int(N * keep_ratio**2)`, ...; 0.5 if nothing else is given.
        after: Blocks, counted from 1, that the reducers are after, or in (`inside_block`). By default, after each
            quarter of the blocks (3, 6 and 9 of 12); with `r`, every block except the last.
        seed: Seed of the random parameters.
        reducer: Name of the reducer: `slim`, `tome`, `topk`, `evit`, another registered name, or `MODULE:CLASS`.
        kept_tokens: Patch tokens of each stage; the first is the whole grid.
        r: Number of tokens that each reducer removes, at most half of them (ToMe's r).

    Raises:
        ConfigError: The teacher is slimmed already, there is no such block, or the numbers of tokens are not possible.
    """
    arch = teacher.vit
    if arch.is_slimmed:
        raise ConfigError("teacher", f"{teacher.source} is slimmed already; give the model that it was made from")
    if (keep_ratio is not None) + (len(kept_tokens) > 0) + (r != 0) > 1:
        raise ConfigError("keep_ratio", "give only one of keep_ratio, kept_tokens and r")
    student = dataclasses.replace(arch, **_stages(arch, keep_ratio, after, kept_tokens, r), reducer=reducer)
    given = flatten_dict(teacher.variables["params"])
    new = flatten_dict(_draw(student, seed, given)["params"]) if reducer_params(student) else {}
    params = {**new, **given}
    return Model(
        student, {**teacher.variables, "params": unflatten_dict(params)}, teacher.metadata, dtype=teacher.dtype
    )


def _stages(
    arch: Architecture, keep_ratio: float | None, after: Sequence[int] | None, kept_tokens: Sequence[int], r: int
) -> dict[str, Any]:
    """Returns the fields of `Architecture` for the arguments of `slim`."""
    depth = arch.depth
    if after is None:
        after = range(1, depth) if r else sorted({depth * quarter // 4 for quarter in (1, 2, 3)} - {0})
    ends = [0, *after, depth]
    if len(after) == 0 or any(later <= earlier for earlier, later in itertools.pairwise(ends)):
        raise ConfigError("after", f"{tuple(after)} must be rising block numbers from 1 to {depth - 1}")
    if r:
        if r < 0:
            raise ConfigError("r", f"must be at least 1, got {r}")
        kept_tokens = tuple(
            itertools.accumulate(after, lambda count, _: max(count - r, count - count // 2), initial=arch.num_patches)
        )
    stages = tuple(later - earlier for earlier, later in itertools.pairwise(ends))
    ratio = 0.5 if keep_ratio is None and not kept_tokens else keep_ratio
    return {"stage_blocks": stages, "keep_ratio": ratio, "kept_tokens": tuple(kept_tokens)}


def train(
    config: Config | ConfigDict,
    workdir: str | pathlib.Path,
    *,
    resume: bool = False,
    model: nn.Module | None = None,
    losses: Mapping[str, Loss] | None = None,
    source: Source | Mapping[str, Source] | None = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, float]:
    """Trains a run from Python, as `sit train` does: the teacher first where the configuration names none.

    Args:
        config: What to do; a `ConfigDict` as config files make it, or a checked `Config`.
        workdir: The run's folder.
        resume: Go on with the run in the folder, if there is one.
        model: A Flax module to train in the place of the configuration's. It is called as `sit_jax.ViT` is, and returns
            logits and `sit_jax.models.Outputs`; image size and classes are still those of `config.model`.
        losses: Loss terms of one's own: name -> function of `sit_jax.training.step.LossInputs` that returns a scalar.
            `config.loss.extra` has their weights.
        source: Images and labels in the place of the data set that the configuration names: one
            `sit_jax.data.sources.Source` to train and evaluate on, or one for each split.
        callbacks: Called with the step, `train` or `eval`, and the metrics, whenever these are written down.

    Returns:
        The metrics of the last evaluation.

    Raises:
        UserError: As `sit train` would say it.
    """
    checked = from_config_dict(with_defaults(config)) if isinstance(config, ConfigDict) else config
    if source is not None and not isinstance(source, Mapping):
        source = dict.fromkeys((checked.data.train_split, checked.data.eval_split), source)
    folder = pathlib.Path(os.path.expanduser(workdir))
    return run(checked, folder, resume, extensions=Extensions(model, losses, source, callbacks))


def _draw(arch: Architecture, seed: int, given: Collection[tuple[str, ...]] = ()) -> Variables:
    """Random variables, without the parameters whose paths are given; these are then not computed either."""

    def init(key: Array, images: Array) -> Variables:
        variables = build_model(arch).init(key, images)
        left = {path: x for path, x in flatten_dict(variables["params"]).items() if path not in given}
        return {**variables, "params": unflatten_dict(left)}

    images = jnp.zeros((1, *arch.image_shape, arch.in_channels))
    return jax.jit(init)(jax.random.key(seed), images)
