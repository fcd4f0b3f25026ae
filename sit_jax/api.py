"""The Python interface: models by name, from files, and slimmed. `import sit_jax` offers all of it."""

import dataclasses
import itertools
import pathlib
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

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
                pixels, which are normalised as `metadata` says (as for ImageNet where it is silent), or normalised floats.
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


def slim(teacher: Model, keep_ratio: float = 0.5, after: Sequence[int] = (3, 6, 9), seed: int = 0) -> Model:
    """A student: the teacher with token slimming modules between its blocks, ready to be distilled.

    It has the teacher's weights; those of the slimming modules are random. For N patch tokens, the stages work on
    N, `int(N * keep_ratio)`, `int(N * keep_ratio**2)`, ... of them.

    Args:
        teacher: A model without slimming.
        keep_ratio: Share of the patch tokens that each slimming module keeps.
        after: The slimming modules stand behind these blocks, counted from 1.
        seed: Decides the slimming modules' weights.

    Raises:
        ConfigError: The teacher is slimmed already, or it has no such blocks.
    """
    arch, ends = teacher.arch, [0, *after, teacher.arch.depth]
    if arch.is_slimmed:
        raise ConfigError("teacher", "is slimmed already")
    if len(after) == 0 or any(later <= earlier for earlier, later in itertools.pairwise(ends)):
        raise ConfigError("after", f"{tuple(after)} must be rising block numbers from 1 to {arch.depth - 1}")
    stages = tuple(later - earlier for earlier, later in itertools.pairwise(ends))
    student = dataclasses.replace(arch, stage_blocks=stages, keep_ratio=keep_ratio)
    params = teacher.variables["params"]
    return Model(
        student,
        {**teacher.variables, "params": {**params, **_draw(student, seed, given=params)["params"]}},
        teacher.metadata,
    )


def _draw(arch: Architecture, seed: int, given: Collection[str] = ()) -> dict[str, Any]:
    """Random variables, without the parameters that are given; these are then not computed either."""

    def init(key: Array, images: Array) -> dict[str, Any]:
        variables = build_model(arch).init(key, images)
        return {**variables, "params": {name: x for name, x in variables["params"].items() if name not in given}}

    images = jnp.zeros((1, arch.image_size, arch.image_size, arch.in_channels))
    return jax.jit(init)(jax.random.key(seed), images)


def _without_empty(variables: dict[str, Any]) -> dict[str, Any]:
    return {name: tree for name, tree in variables.items() if tree}
