"""Models: an architecture with its weights, or the function of an exported file."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from sit_jax.config import Config, DataConfig, JsonObject
from sit_jax.data.preprocess import normalize
from sit_jax.errors import NotFiniteError, UserError
from sit_jax.io.inference import features_model, inference_model
from sit_jax.io.metadata import data_config, evaluated_on
from sit_jax.io.model_folder import write_folder
from sit_jax.models import build_model
from sit_jax.models.architecture import Architecture
from sit_jax.models.cut import cut_architecture, cut_params, cut_rtsm
from sit_jax.models.features import Features, Grid
from sit_jax.models.regnet import RegNetArchitecture
from sit_jax.models.trees import Params, Variables


class Exported(NamedTuple):
    """The function of an ONNX file or a StableHLO artifact.

    Attributes:
        run: Inputs (batch, ...) -> outputs by name: `logits`, or the fields of `Features` without a head.
        input: `pixels`, uint8 and channels last, or `images`, normalized float32.
        channels_last: Whether `images` are (batch, height, width, channels), and not (batch, channels, height, width).
    """

    run: Callable[[np.ndarray], Mapping[str, np.ndarray | Array]]
    input: Literal["pixels", "images"]
    channels_last: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model with its weights.

    Attributes:
        arch: The architecture.
        variables: `{'params': ...}`, and `batch_stats` where it has BatchNorm; float32. Empty for an exported file.
        metadata: JSON values: `class_names`, `preprocessing` (`mean`, `std`, `interpolation`, `crop_fraction`,
            `resize`), `provenance`, `licence`, `num_batches_tracked` (of BatchNorm in PyTorch); each is optional.
        rtsm: Parameters of the reverse modules, which only training needs; empty if there are none.
        dtype: Type of the matrix products, `float32` or `bfloat16`.
        config: The configuration of the run that trained it; None for other models.
        exported: The function of an exported file; None for models with variables.
        source: The path that it was loaded from, for messages.
    """

    arch: Architecture | RegNetArchitecture
    variables: Variables
    metadata: JsonObject = dataclasses.field(default_factory=dict)
    rtsm: Params = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    config: Config | None = None
    exported: Exported | None = None
    source: str = "the model"

    def __call__(
        self, images: Shaped[Array | np.ndarray, "batch height width channels"]
    ) -> Float[Array | np.ndarray, "batch classes"]:
        """Returns the logits in evaluation mode, float32 (batch, classes); the pooled features without a head.

        Args:
            images: Of the model's size and channels (`arch.image_size`, `arch.in_channels`), channels last: uint8
                pixels, which are normalized as `metadata` says (as for ImageNet where it is silent), or normalized
                floats.

        Raises:
            ValueError: The images have another integer type, or are floats for an exported file that takes pixels.
        """
        _check_type(images)
        return self._forward(images)

    def features(
        self, images: Shaped[Array | np.ndarray, "batch height width channels"], grid: Grid | None = None
    ) -> Features:
        """Returns the features in evaluation mode: pooled, prefix tokens and patch tokens, float32.

        Args:
            images: As those of a call.
            grid: How a slimmed model's patch tokens are brought back to the full grid of patches: `rtsm`, by the last
                block's reverse module (load the model with `with_rtsm`), or `spread`: a patch gets the mean of the
                tokens that it was merged into. None returns the kept tokens. An exported file has its own choice.

        Raises:
            ValueError: The images are not possible, as for a call, or the grid is unknown.
            UserError: The model is not a vision transformer, has no reverse modules for `rtsm`, or is a file that was
                exported without features.
        """
        if grid not in (None, *get_args(Grid)):
            raise ValueError(f"grid must be one of {', '.join(get_args(Grid))} or None, got {grid!r}")
        if self.exported is None and grid == "rtsm" and self.vit.is_slimmed and not self.rtsm:
            raise UserError(f"{self.source}: has no reverse modules, or they were not loaded (with_rtsm)")
        if self.exported is not None and (grid or self.arch.num_classes):
            raise UserError(f"{self.source}: gives what it was exported for; see sit export --features and --grid")
        _check_type(images)
        if grid not in self._features:
            model = features_model(self.vit, self.variables, self.dtype, grid=grid, rtsm=self.rtsm)
            self._features[grid] = model.jit(before=self._normalized)
        return self._features[grid](images)

    def logits(self, pixels: Shaped[np.ndarray, "batch height width channels"]) -> Float[np.ndarray, "batch classes"]:
        """Returns the logits of uint8 pixels as a NumPy array.

        Raises:
            UserError: The model has no head.
            NotFiniteError: A logit is not finite.
        """
        self.require_head()
        values = np.asarray(self(pixels))
        if not np.isfinite(values).all():
            raise NotFiniteError(f"{self.source}: the model's outputs are not finite, so they say nothing about images")
        return values

    def require_head(self) -> None:
        """Raises a UserError if the model has no head, and so predicts no classes."""
        if not self.arch.num_classes:
            raise UserError(f"{self.source}: is a backbone without a head, which predicts no classes")

    def is_labelled(self, named: bool = False) -> bool:
        """Returns whether the model is evaluated by its head and labels.

        Args:
            named: Whether the data set was named by the user; then a head that was trained without labels is, too.
        """
        return self.arch.num_classes > 0 and (named or self.config is None or self.config.loss.uses_labels)

    @property
    def params(self) -> Params:
        """The parameters, without those of the reverse modules."""
        return self.variables["params"]

    @property
    def batch_stats(self) -> Params:
        """The running statistics of BatchNorm; empty if the model has none."""
        return self.variables.get("batch_stats", {})

    @cached_property
    def module(self) -> nn.Module:
        """The Linen module: `module.apply(variables, images)` gives logits and `sit_jax.models.Outputs`."""
        return build_model(self.arch, dtype=self.dtype)

    @property
    def vit(self) -> Architecture:
        """The architecture of a vision transformer whose weights are known.

        Raises:
            UserError: The model is an exported file, or not a vision transformer.
        """
        if self.exported is not None:
            raise UserError(
                f"{self.source}: is an exported file; give the run or model folder that it was exported from"
            )
        if not isinstance(self.arch, Architecture):
            raise UserError(f"{self.source}: is a {self.arch.family}; only vision transformers have tokens")
        return self.arch

    @property
    def class_names(self) -> list[str]:
        """The class names, by index; the indices as text if no names are known."""
        return self.metadata.get("class_names") or [str(index) for index in range(self.arch.num_classes)]

    @cached_property
    def data(self) -> DataConfig:
        """How images are read: as in the run that trained it, or as `metadata` says."""
        return data_config(self.metadata, self.source) if self.config is None else self.config.data

    def evaluation_data(self, changes: Mapping[str, Any]) -> DataConfig:
        """Returns the data section to evaluate the model with: that of its training, with some fields changed.

        Raises:
            UserError: The model does not store what it was trained on, and the changes name no data set.
        """
        if self.config is None and not evaluated_on(self.metadata) and "name" not in changes:
            raise UserError("--name: which data set? The model does not say what it was trained on")
        return dataclasses.replace(self.data, **changes)

    def cut(self, kept_tokens: Sequence[int]) -> "Model":
        """Returns the model cut to fewer tokens, without training: reducers give only their first tokens.

        Args:
            kept_tokens: Patch tokens of each stage, at most as many as in `arch.token_counts`. For one of
                `arch.kept_tokens_choices`, the model was trained; for others, expect a loss of accuracy.

        Raises:
            ConfigError: `kept_tokens` does not fit the model, or its reducers cannot be cut.
            UserError: The model is an exported file or not a vision transformer.
        """
        arch = self.vit
        return dataclasses.replace(
            self,
            arch=cut_architecture(arch, kept_tokens),
            variables={**self.variables, "params": cut_params(arch, self.params, kept_tokens)},
            rtsm=cut_rtsm(arch, self.rtsm, kept_tokens),
        )

    def save(self, folder: str | pathlib.Path, with_rtsm: bool = False) -> None:
        """Writes a model folder, which `sit_jax.load`, the `sit` commands and PyTorch read.

        Args:
            folder: The folder; must not exist.
            with_rtsm: Also write the reverse modules.

        Raises:
            UserError: The folder exists or cannot be written, the model is an exported file or not a vision
                transformer, or it has no reverse modules and `with_rtsm` is set.
        """
        if with_rtsm and not self.rtsm:
            raise UserError(f"{folder}: the model has no reverse modules to write")
        rtsm = self.rtsm if with_rtsm else {}
        write_folder(pathlib.Path(os.path.expanduser(folder)), self.vit, self.variables, rtsm, self.metadata)

    @cached_property
    def _forward(self) -> Callable[[Array | np.ndarray], Array | np.ndarray]:
        exported = self._exported
        if exported is None:
            return inference_model(self.arch, self.variables, self.dtype).jit(before=self._normalized)
        name = "logits" if self.arch.num_classes else "pooled"
        return lambda images: exported(images)[name]

    @cached_property
    def _features(self) -> dict[Grid | None, Callable[[Array | np.ndarray], Features]]:
        exported = self._exported
        if exported is None:
            return {}

        def run(images: Array | np.ndarray) -> Features:
            found: dict[str, Any] = dict(exported(images))
            patches = found["patch_tokens"]
            return Features(**{"prefix_tokens": patches[:, :0], **found})  # ONNX has no empty outputs.

        return {None: run}

    def _normalized(self, images: Array | np.ndarray) -> Array:
        x = jnp.asarray(images)
        return normalize(x, self.data) if x.dtype == jnp.uint8 else x.astype(jnp.float32)

    @cached_property
    def _exported(self) -> Callable[[Array | np.ndarray], Mapping[str, np.ndarray | Array]] | None:
        exported = self.exported
        if exported is None:
            return None

        def run(images: Array | np.ndarray) -> Mapping[str, np.ndarray | Array]:
            if exported.input == "pixels":
                if images.dtype != np.uint8:
                    raise ValueError(f"{self.source}: takes uint8 pixels, got {images.dtype}")
                return exported.run(np.asarray(images))
            x = np.asarray(self._normalized(images))
            return exported.run(x if exported.channels_last else np.ascontiguousarray(x.transpose(0, 3, 1, 2)))

        return run


def _check_type(images: Array | np.ndarray) -> None:
    if jnp.issubdtype(images.dtype, jnp.integer) and images.dtype != jnp.uint8:
        raise ValueError(f"pixels are {images.dtype}; give uint8 pixels or normalized floats")
