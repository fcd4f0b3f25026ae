"""The Python interface: models by name, from files, and slimmed. `import sit_jax` offers all of it."""

import dataclasses
import itertools
import pathlib
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Shaped
from ml_collections import ConfigDict

from sit_jax.config import Config
from sit_jax.config.config_dict import from_config_dict, with_defaults
from sit_jax.data.sources import Source
from sit_jax.errors import ConfigError
from sit_jax.io.export.forward import normalize_with
from sit_jax.io.inference import inference_model
from sit_jax.io.model_folder import save_folder
from sit_jax.io.predictor import open_weights
from sit_jax.io.preprocessing import settled
from sit_jax.io.weights import Weights
from sit_jax.models import build_model
from sit_jax.models.architecture import Architecture
from sit_jax.models.variants import get_architecture
from sit_jax.training.loop import Callback, Extensions, run
from sit_jax.training.step import Loss


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with its weights.

    Attributes:
        arch: Its shape.
        variables: `{'params': ...}`, and `batch_stats` where it has BatchNorm; float32.
        metadata: What is known about it: `class_names`, `preprocessing`, `provenance`, `licence`; any may be missing.
    """

    arch: Architecture
    variables: dict[str, Any]
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    @cached_property
    def module(self) -> Any:
        """The Linen module: `module.apply(variables, images)` gives logits and `sit_jax.models.Outputs`."""
        return build_model(self.arch)

    def __call__(
        self, images: Shaped[Array | np.ndarray, "batch height width channels"]
    ) -> Float[Array, "batch classes"]:
        """Logits in evaluation mode, float32 (batch, classes).

        Args:
            images: Of the model's size and channels (`arch.image_size`, `arch.in_channels`), channels last: uint8
                pixels, which are normalised as `metadata` says (as for ImageNet where it is silent), or normalised
                floats.
        """
        if jnp.issubdtype(images.dtype, jnp.integer) and images.dtype != jnp.uint8:
            raise ValueError(f"pixels are {images.dtype}; give uint8 pixels or normalised floats")
        return self._forward(jnp.asarray(images))

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes a model folder, which `sit_jax.load`, the `sit` commands and PyTorch read.

        Raises:
            UserError: The folder is there already, or cannot be written.
        """
        stats = self.variables.get("batch_stats", {})
        save_folder(pathlib.Path(folder), Weights(self.arch, self.variables["params"], stats, {}, self.metadata))

    @cached_property
    def _forward(self) -> Any:
        preprocessing = settled(self.metadata, self.arch.in_channels)["preprocessing"]

        def normalized(images: Array) -> Array:
            return normalize_with(images, preprocessing) if images.dtype == jnp.uint8 else images.astype(jnp.float32)

        return inference_model(self.arch, self.variables).jit(before=normalized)


def create_model(name: str, seed: int = 0, **changes: Any) -> Model:
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


def load(path: str | pathlib.Path, ema: bool = False, step: int | None = None) -> Model:
    """The model of a model folder, or of a run's folder.

    Args:
        path: The folder.
        ema: A run's moving average instead of its weights.
        step: Which of a run's checkpoints; the newest where None.

    Raises:
        UserError: There is no such model, or its files are damaged.
    """
    weights = open_weights(pathlib.Path(path), ema, step)
    variables = {"params": weights.params, "batch_stats": weights.batch_stats}
    return Model(weights.arch, jax.tree.map(jnp.asarray, _without_empty(variables)), weights.metadata)


def slim(
    teacher: Model,
    keep_ratio: float = 0.5,
    after: Sequence[int] = (3, 6, 9),
    seed: int = 0,
    reducer: str = "slim",
) -> Model:
    """A student: the teacher with token slimming modules between its blocks, ready to be distilled.

    It has the teacher's weights; those of the slimming modules are random. For N patch tokens, the stages work on
    N, `int(N * keep_ratio)`, `int(N * keep_ratio**2)`, ... of them.

    Args:
        teacher: A model without slimming.
        keep_ratio: Fraction of the patch tokens that each slimming module keeps.
        after: The slimming modules stand behind these blocks, counted from 1.
        seed: Decides the slimming modules' weights.
        reducer: What reduces the tokens: `slim`, another registered name, or `MODULE:CLASS`.

    Raises:
        ConfigError: The teacher is slimmed already, or it has no such blocks.
    """
    arch, ends = teacher.arch, [0, *after, teacher.arch.depth]
    if arch.is_slimmed:
        raise ConfigError("teacher", "is slimmed already")
    if len(after) == 0 or any(later <= earlier for earlier, later in itertools.pairwise(ends)):
        raise ConfigError("after", f"{tuple(after)} must be rising block numbers from 1 to {arch.depth - 1}")
    stages = tuple(later - earlier for earlier, later in itertools.pairwise(ends))
    student = dataclasses.replace(arch, stage_blocks=stages, keep_ratio=keep_ratio, reducer=reducer)
    given = flatten_dict(teacher.variables["params"])
    params = {**flatten_dict(_draw(student, seed, given)["params"]), **given}
    return Model(student, {**teacher.variables, "params": unflatten_dict(params)}, teacher.metadata)


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
    return run(checked, pathlib.Path(workdir), resume, extensions=Extensions(model, losses, source, callbacks))


def _draw(arch: Architecture, seed: int, given: Collection[tuple[str, ...]] = ()) -> dict[str, Any]:
    """Random variables, without the parameters whose paths are given; these are then not computed either."""

    def init(key: Array, images: Array) -> dict[str, Any]:
        variables = build_model(arch).init(key, images)
        left = {path: x for path, x in flatten_dict(variables["params"]).items() if path not in given}
        return {**variables, "params": unflatten_dict(left)}

    images = jnp.zeros((1, arch.image_size, arch.image_size, arch.in_channels))
    return jax.jit(init)(jax.random.key(seed), images)


def _without_empty(variables: dict[str, Any]) -> dict[str, Any]:
    return {name: tree for name, tree in variables.items() if tree}
