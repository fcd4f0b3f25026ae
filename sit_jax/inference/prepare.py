"""From a model's variables to a compiled function from images to logits."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sit_jax.compiling import cpu_options
from sit_jax.inference.fold import fold
from sit_jax.inference.forward import Attend, attention, forward
from sit_jax.models import build_model
from sit_jax.models.architecture import Architecture
from sit_jax.models.regnet import RegNetArchitecture

# From so many rows on, XLA's own products in float32 are faster on CPU.
_MANY_ROWS = 1024
# Blocks of so few tokens gain on CPU from products in two halves.
_CPU_HALVES_BELOW = 64


class Prepared(NamedTuple):
    """A model that is ready to run.

    Attributes:
        apply: `(weights, images) -> logits`: normalised images (batch, height, width, channels) to float32
            (batch, classes). Pure, not jitted.
        weights: What it takes, in the layout that it wants: a tree of arrays, NumPy's unless placed;
            kernels in the type of the products, all else float32.
        tokens: Rows that an image adds to the first products.
        sharding: Where the weights that it was made from lay, if they were put there on purpose.
        dtype: Type of the products, by its name.
    """

    apply: Callable[[Any, Array], Array]
    weights: Any
    tokens: int = 1
    sharding: jax.sharding.Sharding | None = None
    dtype: str = "float32"

    def jitted(self, batch: int) -> Any:
        """`apply`, jitted as so many images at a time want it; weights are an argument, and can be lowered with."""
        return jax.jit(self.apply, compiler_options=_options(_by_library(self.dtype, batch * self.tokens)))

    def jit(self, before: Callable[[Any], Array] | None = None) -> Callable[[Any], Array]:
        """The compiled function from images to logits, its weights on the device.

        Args:
            before: What turns the function's input into normalised images, compiled with it: pixels, say.
        """
        # Nothing below holds on to `self`: the weights would stay in memory twice.
        apply, weights, tokens, dtype = self.apply, self.weights, self.tokens, self.dtype
        traced = _any_traced(weights)
        if not traced:
            with jax.ensure_compile_time_eval():  # The first call may come from within a trace.
                weights = jax.device_put(weights, self.sharding)

        def run(weights: Any, inputs: Any) -> Array:
            return apply(weights, inputs if before is None else before(inputs))

        plain = jax.jit(run)
        programs = {chosen: jax.jit(run, compiler_options=_options(chosen)) for chosen in (True, False)}

        def call(inputs: Any) -> Array:
            if traced or _any_traced(inputs):
                return plain(weights, inputs)
            try:
                return programs[_by_library(dtype, len(inputs) * tokens)](weights, inputs)
            except ValueError as error:
                # Options belong to the outermost compilation alone, and something around this is being compiled.
                if "compiler_options" not in str(error):
                    raise
                return plain(weights, inputs)

        return call


def _any_traced(tree: Any) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


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
    if isinstance(arch, RegNetArchitecture) or not _readable(variables):
        module = build_model(arch, dtype=dtype)

        def apply_module(weights: Any, images: Any) -> Array:
            logits: Array = module.apply(jax.tree.map(jnp.asarray, weights), images)[0]
            return logits

        return Prepared(apply_module, variables, dtype=dtype)
    platform = platform or jax.default_backend()
    folded = fold(
        arch, variables["params"], variables.get("batch_stats", {}), _CPU_HALVES_BELOW if platform == "cpu" else 0
    )
    if dtype != "float32":
        folded = _cast_kernels(folded, jnp.dtype(dtype))
    attend = _attention_for(platform, dtype, arch.num_heads, arch.dim // arch.num_heads)

    def apply(weights: Any, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        return forward(arch, weights, images, jnp.dtype(dtype), attend)

    return Prepared(apply, folded, arch.num_patches, _placed(variables), dtype)


def _readable(variables: Any) -> bool:
    """Whether there are numbers to fold: not while a function is traced, nor where other processes have a part."""
    if _any_traced(variables):
        return False
    return all(x.is_fully_addressable for x in jax.tree.leaves(variables) if isinstance(x, jax.Array))


def _placed(variables: Any) -> jax.sharding.Sharding | None:
    """Where all of the folded weights go: to the device that some of the variables were put on, or all of its mesh."""
    for x in jax.tree.leaves(variables):
        if isinstance(x, jax.Array) and x.committed:
            if isinstance(x.sharding, jax.sharding.NamedSharding):
                return jax.sharding.NamedSharding(x.sharding.mesh, jax.sharding.PartitionSpec())
            return x.sharding if len(x.sharding.device_set) == 1 else None
    return None


def _cast_kernels(tree: Any, dtype: Any) -> Any:
    """The kernels in the type of the products, once; biases and positions stay float32."""

    def cast(path: tuple[Any, ...], x: Any) -> Any:
        return x.astype(dtype) if any(getattr(part, "key", "") == "kernel" for part in path) else x

    return jax.tree_util.tree_map_with_path(cast, tree)


def _by_library(dtype: str, rows: int) -> bool:
    """Whether products of so many rows are better left to XLA's library for CPUs (see `compiling`)."""
    return rows < _MANY_ROWS or dtype != "float32"


def _options(library_products: bool) -> dict[str, str] | None:
    """What XLA is told; None where there is nothing to tell."""
    return cpu_options(library_products) if jax.default_backend() == "cpu" else None


@functools.cache
def _attention_for(platform: str, dtype: str, heads: int, size: int) -> Attend:
    """cuDNN's attention where there is a GPU that has it for this type and size, else XLA's."""
    if platform != "gpu" or dtype != "bfloat16":
        return attention

    def fused(query: Array, key: Array, value: Array) -> Array:
        return jax.nn.dot_product_attention(query, key, value, scale=1.0, implementation="cudnn")

    try:
        example = jax.ShapeDtypeStruct((2, 197, heads, size), jnp.bfloat16)
        jax.jit(fused).lower(example, example, example).compile()
    except (RuntimeError, ValueError, NotImplementedError):  # No cuDNN, too old a one, or too old a GPU for it.
        return attention
    return fused
