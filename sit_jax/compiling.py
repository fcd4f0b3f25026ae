"""What XLA is told when it compiles for CPUs; the libraries of GPUs and TPUs need no telling."""

import functools

import jax

# XLA uses half of an AVX-512 register where it is not told to use all of it; other CPUs do not mind.
_WIDTH = ("xla_cpu_prefer_vector_width", "512")

# On CPU, XLA gives products, convolutions and sums to a library (YNNPACK in jax 0.10). It is faster for sums and for
# products of few rows, and has products in bfloat16: XLA's own are float32 ones between two conversions. But its
# convolutions take up to twice as long as XLA's own, and large products in float32 a little longer.
_LIBRARY = "xla_cpu_experimental_ynn_fusion_type"
_SUMS = "LIBRARY_FUSION_TYPE_REDUCE"
_PRODUCTS = f"LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,{_SUMS}"


def cpu_options(library_products: bool = True) -> dict[str, str]:
    """`jax.jit`'s `compiler_options` for CPUs: full vectors, convolutions by XLA itself.

    They are no part of XLA's interface, and may be gone later: what this jaxlib does not know is left out.

    Args:
        library_products: Whether products are its library's, or XLA's own, too.
    """
    options = [_WIDTH, (_LIBRARY, _PRODUCTS if library_products else _SUMS)]
    return {name: value for name, value in options if _known(name, value)}


@functools.cache
def _known(name: str, value: str) -> bool:
    try:
        jax.jit(lambda x: x + 1, compiler_options={name: value}).lower(1.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
