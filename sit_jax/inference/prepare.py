"""From a model's variables to a compiled function from images to logits."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sit_jax.inference.fold import fold
from sit_jax.inference.forward import Attend, attention, forward
from sit_jax.models import build_model
from sit_jax.models.architecture import Architecture
from sit_jax.models.regnet import RegNetArchitecture

# On CPU, XLA gives products, convolutions and sums to a library (YNNPACK in jax 0.10) that is faster for sums and for
# products of few rows; its convolutions take twice as long as XLA's own, and large products a tenth longer.
_CPU_OPTION = "xla_cpu_experimental_ynn_fusion_type"
_FEW_ROWS, _MANY_ROWS = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE", "LIBRARY_FUSION_TYPE_REDUCE"
_ROWS = 1024
# Blocks of so few tokens gain on CPU from products in two halves.
_CPU_PARTS_BELOW = 64


class Prepared(NamedTuple):
    """A model that is ready to run.

    Attributes:
        apply: `(weights, images) -> logits`: normalised images (batch, height, width, channels) to float32
            (batch, classes). Pure, not jitted.
        weights: What it takes, in the layout that it wants: a tree of float32 arrays, NumPy's unless placed.
        tokens: Rows that an image adds to the first products.
    """

    apply: Callable[[Any, Array], Array]
    weights: Any
    tokens: int = 1

    def options(self, batch: int) -> dict[str, str] | None:
        """What to compile `apply` with for so many images: `jax.jit`'s `compiler_options` for the default backend."""
        return _options(batch * self.tokens)

    def jit(self, before: Callable[[Any], Array] | None = None) -> Callable[[Any], Array]:
        """The compiled function from images to logits, its weights on the default device.

        Args:
            before: What turns the function's input into normalised images, compiled with it: pixels, say.
        """
        weights = jax.device_put(self.weights)

        def run(weights: Any, inputs: Any) -> Array:
            return self.apply(weights, inputs if before is None else before(inputs))

        few, many = (jax.jit(run, compiler_options=_options(rows)) for rows in (1, _ROWS))

        def call(inputs: Any) -> Array:
            if isinstance(inputs, jax.core.Tracer):  # Options belong to the outermost compilation alone.
                return run(weights, inputs)
            return (few if len(inputs) * self.tokens < _ROWS else many)(weights, inputs)

        return call


def prepare(
    arch: Architecture | RegNetArchitecture,
    variables: dict[str, Any],
    dtype: str = "float32",
    platform: str | None = None,
) -> Prepared:
    """Folds and lays out a model's weights for inference; the numbers stay those of the model but for rounding.

    Args:
        arch: The model's shape.
        variables: `{'params': ..., 'batch_stats': ...}` as the model's `init` and checkpoints have them.
        dtype: Type of the products, `float32` or `bfloat16`.
        platform: `cpu`, `gpu` or `tpu`, for which weights are laid out; `any` for none in particular; JAX's default
            backend where None.
    """
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(variables))
    if isinstance(arch, RegNetArchitecture) or traced:  # What is being traced has no numbers to fold yet.
        module = build_model(arch, dtype=dtype)

        def apply_module(weights: Any, images: Any) -> Array:
            logits: Array = module.apply(jax.tree.map(jnp.asarray, weights), images)[0]
            return logits

        return Prepared(apply_module, variables)
    platform = platform or jax.default_backend()
    folded = fold(
        arch, variables["params"], variables.get("batch_stats", {}), _CPU_PARTS_BELOW if platform == "cpu" else 0
    )
    attend = _attention_for(platform, dtype)

    def apply(weights: Any, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        return forward(arch, weights, images, jnp.dtype(dtype), attend)

    return Prepared(apply, folded, arch.num_patches)


@functools.cache
def _options(rows: int) -> dict[str, str] | None:
    """What XLA is told; None where there is nothing to tell."""
    if jax.default_backend() != "cpu":
        return None
    options = {_CPU_OPTION: _FEW_ROWS if rows < _ROWS else _MANY_ROWS, "xla_cpu_prefer_vector_width": "512"}
    try:
        # An experimental option may be gone in a later jaxlib.
        jax.jit(lambda x: x + 1, compiler_options=options).lower(1.0).compile()
    except jax.errors.JaxRuntimeError:
        return None
    return options


@functools.cache
def _attention_for(platform: str, dtype: str) -> Attend:
    """cuDNN's attention where there is a GPU that has it for this type, else XLA's."""
    if platform != "gpu" or dtype != "bfloat16":
        return attention

    def fused(query: Array, key: Array, value: Array) -> Array:
        return jax.nn.dot_product_attention(query, key, value, scale=1.0, implementation="cudnn")

    try:
        example = jax.ShapeDtypeStruct((2, 197, 6, 64), jnp.bfloat16)
        jax.jit(fused).lower(example, example, example).compile()
    except (RuntimeError, ValueError, NotImplementedError):  # No cuDNN, too old a one, or too old a GPU for it.
        return attention
    return fused
