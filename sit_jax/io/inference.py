"""Inference: converts a model and its weights to a function from images to logits or features."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array

from sit_jax.errors import NotFiniteError
from sit_jax.models import build_model, choose_attention
from sit_jax.models.architecture import Architecture
from sit_jax.models.features import Features, Grid, select_features
from sit_jax.models.regnet import RegNetArchitecture
from sit_jax.models.stems import fold_batch_norm
from sit_jax.models.trees import Params
from sit_jax.ops.linear import cast_kernels
from sit_jax.ops.xla_options import cpu_options

# From this number of rows on, XLA's own float32 matrix products are faster on CPU than those of its library.
_MANY_ROWS = 1024


class InferenceModel(NamedTuple):
    """A model in evaluation mode.

    `apply` is pure and not jitted: `(weights, images) -> outputs`, from normalized images (batch, height, width,
    channels) to logits or to `Features`. `weights` are the model's variables with BatchNorm folded and kernels cast to
    `dtype`, the type of the matrix products; `tokens` is the number of patch tokens of an image.
    """

    apply: Callable[[Any, Array], Any]
    weights: Any
    tokens: int
    dtype: str

    def jitted(self, batch: int, before: Callable[[Any], Array] | None = None) -> Any:
        """Returns the jitted `(weights, inputs) -> outputs`; `before` converts the inputs to normalized images."""

        def run(weights: Any, inputs: Any) -> Any:
            return self.apply(weights, inputs if before is None else before(inputs))

        library = self.dtype != "float32" or batch * self.tokens < _MANY_ROWS
        return jax.jit(run, compiler_options=cpu_options(library) if jax.default_backend() == "cpu" else None)

    def jit(self, before: Callable[[Any], Array] | None = None) -> Callable[[Any], Any]:
        """Returns the jitted function from inputs to outputs, with the weights on the device; see `jitted`."""
        apply, weights = self.apply, self.weights
        if not _traced(weights):
            with jax.ensure_compile_time_eval():  # The first call may be inside a trace.
                weights = jax.device_put(weights)
        many, few = (self._replace(weights=None).jitted(batch, before) for batch in (_MANY_ROWS, 0))
        rows = self.tokens

        def call(inputs: Any) -> Array:
            # Compiler options apply only to the outermost compilation, which inside a trace is another one.
            if _traced(weights) or _traced(inputs):
                return apply(weights, inputs if before is None else before(inputs))
            with jax.ensure_compile_time_eval():
                return (many if len(inputs) * rows >= _MANY_ROWS else few)(weights, inputs)

        return call


def inference_model(
    arch: Architecture | RegNetArchitecture, variables: dict[str, Any], dtype: str = "float32", attention: str = "auto"
) -> InferenceModel:
    """Prepares a model, whose variables are `{'params': ..., 'batch_stats': ...}`, for inference.

    Its outputs are the logits, float32 (batch, classes); without a head, the pooled features. `attention` is the name
    of the softmax attention; `auto` selects the fastest one for the default device.
    """
    if isinstance(arch, RegNetArchitecture):
        module = build_model(arch, dtype=dtype)
        return InferenceModel(lambda weights, images: module.apply(weights, images)[0], variables, 1, dtype)
    module = _module(arch, dtype, attention)

    def apply(weights: Any, images: Array) -> Array:
        found: Any = module.apply({"params": weights}, images, logits_only=True)
        logits, outputs = found
        result: Array = logits if arch.num_classes else outputs.features
        return result

    return InferenceModel(apply, _weights(variables, dtype), arch.num_patches, dtype)


def features_model(
    arch: Architecture,
    variables: dict[str, Any],
    dtype: str = "float32",
    attention: str = "auto",
    grid: Grid | None = None,
    rtsm: Params | None = None,
) -> InferenceModel:
    """Prepares a vision transformer whose outputs are `Features`; see `inference_model` and `select_features`."""
    module, params = _module(arch, dtype, attention), _weights(variables, dtype)
    last = f"blocks_{arch.depth - 1}"
    recovery = {last: cast_kernels(rtsm[last], dtype)} if grid == "rtsm" and rtsm and arch.is_slimmed else {}

    def apply(weights: Any, images: Array) -> Features:
        params, recovery = weights
        found: Any = module.apply({"params": params}, images)
        return select_features(arch, found[1], grid, params=params, rtsm=recovery, dtype=dtype)

    return InferenceModel(apply, (params, recovery), arch.num_patches, dtype)


def _module(arch: Architecture, dtype: str, attention: str) -> nn.Module:
    if attention == "auto":
        # Without a backward pass, the custom derivatives are not needed.
        fastest = choose_attention(attention, arch, dtype)
        attention = "plain" if fastest == "xla" else fastest
    return build_model(arch, dtype=dtype, attention=attention).clone(batch_norm=False)


def _weights(variables: dict[str, Any], dtype: str) -> Params:
    """Returns the parameters with BatchNorm folded and kernels cast."""
    # The weights outlive a trace that this may be called in.
    with contextlib.nullcontext() if _traced(variables) else jax.ensure_compile_time_eval():
        params = fold_batch_norm(variables["params"], variables.get("batch_stats", {}))
        return cast_kernels(params, dtype)


def _traced(tree: Any) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the probabilities (batch, classes), in float64; raises a NotFiniteError if a logit is not finite."""
    if not np.isfinite(logits).all():
        raise NotFiniteError("the model's outputs are not finite, so they say nothing about the images")
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True, initial=-np.inf)
    weights = np.exp(shifted)
    return weights / weights.sum(axis=1, keepdims=True)
