"""Compiler options of XLA for CPUs. GPUs and TPUs need none."""

import importlib.metadata

# These options are no part of XLA's interface; other versions may not know them.
_KNOWN = importlib.metadata.version("jaxlib").startswith("0.10.")
# XLA uses half of an AVX-512 register unless it is told to use all of it; other CPUs are not affected.
_WIDTH = {"xla_cpu_prefer_vector_width": "512"}
# By default XLA gives products, convolutions and sums to a library (YNNPACK in jax 0.10). It is faster for sums, for
# products of few rows and for all products in bfloat16. Its convolutions take up to twice as long as XLA's own, and
# large products in float32 a little longer.
_LIBRARY = "xla_cpu_experimental_ynn_fusion_type"
_SUMS = "LIBRARY_FUSION_TYPE_REDUCE"
_PRODUCTS = f"LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,{_SUMS}"


def cpu_options(library_products: bool = True) -> dict[str, str] | None:
    """`jax.jit`'s `compiler_options` for CPUs; None for a jaxlib whose options are not known.

    Args:
        library_products: Whether products are computed by the library, or by XLA itself.
    """
    return {**_WIDTH, _LIBRARY: _PRODUCTS if library_products else _SUMS} if _KNOWN else None
