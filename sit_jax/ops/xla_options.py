"""XLA compiler options for CPUs. GPUs and TPUs need none."""

import importlib.metadata

# These options are not part of XLA's public interface; other versions may not have them.
_KNOWN = importlib.metadata.version("jaxlib").startswith("0.10.")
# By default, XLA uses only half of an AVX-512 register; this enables all of it and does not affect other CPUs.
_WIDTH = {"xla_cpu_prefer_vector_width": "512"}
# By default, XLA calls a library (YNNPACK in jax 0.10) for matrix products, convolutions and sums. It is faster for
# sums, for products of few rows and for all products in bfloat16. Its convolutions take up to twice as long as XLA's,
# and large products in float32 take slightly longer.
_LIBRARY = "xla_cpu_experimental_ynn_fusion_type"
_SUMS = "LIBRARY_FUSION_TYPE_REDUCE"
_PRODUCTS = f"LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,{_SUMS}"


def cpu_options(library_products: bool = True) -> dict[str, str] | None:
    """Returns `jax.jit`'s `compiler_options` for CPUs, or None for a jaxlib with unknown options.

    Args:
        library_products: Whether the library computes matrix products, instead of XLA.
    """
    return {**_WIDTH, _LIBRARY: _PRODUCTS if library_products else _SUMS} if _KNOWN else None
