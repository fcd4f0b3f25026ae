"""A model and its weights as a function from images to logits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from sit_jax.errors import NotFiniteError
from sit_jax.models import build_model
from sit_jax.models.architecture import Architecture
from sit_jax.models.regnet import RegNetArchitecture
from sit_jax.models.stems import fold_batch_norm
from sit_jax.ops.attention import choose
from sit_jax.ops.linear import cast_kernels
from sit_jax.ops.xla_options import cpu_options

# From so many rows on, XLA's own products in float32 are faster than its library's on a CPU.
_MANY_ROWS = 1024


class InferenceModel(NamedTuple):
    """A model in evaluation mode.

    Attributes:
        apply: `(weights, images) -> logits`: normalized images (batch, height, width, channels) to float32
            (batch, classes). Pure, not jitted.
        weights: What it takes: the model's variables with BatchNorm folded, kernels in the type of the products.
        tokens: Patch tokens of an image.
        dtype: Type of the products, by its name.
    """

    apply: Callable[[Any, Array], Array]
    weights: Any
    tokens: int
    dtype: str

    def jitted(self, batch: int, before: Callable[[Any], Array] | None = None) -> Any:
        """The jitted `(weights, inputs) -> logits` for so many images at a time.

        Args:
            batch: Images.
            before: Turns the inputs into normalized images, compiled with the model.
        """

        def run(weights: Any, inputs: Any) -> Array:
            return self.apply(weights, inputs if before is None else before(inputs))

        library = self.dtype != "float32" or batch * self.tokens < _MANY_ROWS
        return jax.jit(run, compiler_options=cpu_options(library) if jax.default_backend() == "cpu" else None)

    def jit(self, before: Callable[[Any], Array] | None = None) -> Callable[[Any], Array]:
        """The jitted function from inputs to logits, its weights on the device.

        Args:
            before: See `jitted`.
        """
        apply, weights = self.apply, self.weights
        if not _traced(weights):
            with jax.ensure_compile_time_eval():  # The first call may be inside a trace.
                weights = jax.device_put(weights)
        many, few = (self._replace(weights=None).jitted(batch, before) for batch in (_MANY_ROWS, 0))
        rows = self.tokens

        def call(inputs: Any) -> Array:
            # Compiler options belong to the outermost compilation, which is another one inside a trace.
            if _traced(weights) or _traced(inputs):
                return apply(weights, inputs if before is None else before(inputs))
            with jax.ensure_compile_time_eval():
                return (many if len(inputs) * rows >= _MANY_ROWS else few)(weights, inputs)

        return call


def inference_model(
    arch: Architecture | RegNetArchitecture, variables: dict[str, Any], dtype: str = "float32", attention: str = "auto"
) -> InferenceModel:
    """Prepares a model for inference.

    Args:
        arch: The model's shape.
        variables: `{'params': ..., 'batch_stats': ...}` as `init` gives and checkpoints hold them.
        dtype: Type of the products, `float32` or `bfloat16`.
        attention: Name of the softmax attention, `auto` for the fastest of this process's default device.
    """
    if isinstance(arch, RegNetArchitecture):
        module = build_model(arch, dtype=dtype)
        return InferenceModel(lambda weights, images: module.apply(weights, images)[0], variables, 1, dtype)
    if attention == "auto":
        # Without a backward pass, derivatives by hand have no use.
        fastest = choose(attention, dtype, arch.num_heads, arch.dim // arch.num_heads)
        attention = "plain" if fastest == "xla" else fastest
    module = build_model(arch, dtype=dtype, attention=attention).clone(batch_norm=False)
    params = fold_batch_norm(variables["params"], variables.get("batch_stats", {}))
    params = cast_kernels(params, dtype)

    def apply(weights: Any, images: Array) -> Array:
        logits: Array = module.apply({"params": weights}, images, logits_only=True)[0]
        return logits

    return InferenceModel(apply, params, arch.num_patches, dtype)


def _traced(tree: Any) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities (batch, classes) of logits, in float64.

    Raises:
        NotFiniteError: A logit is not finite.
    """
    if not np.isfinite(logits).all():
        raise NotFiniteError("the model's outputs are not finite, so they say nothing about the images")
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    weights = np.exp(shifted)
    return weights / weights.sum(axis=1, keepdims=True)
