"""What XLA is told when it compiles for CPUs; the libraries of GPUs and TPUs need no telling."""

import functools

import jax

# XLA uses half of an AVX-512 register where it is not told to use all of it; other CPUs do not mind.
_WIDTH = ("xla_cpu_prefer_vector_width", "512")


@functools.cache
def cpu_options(*more: tuple[str, str]) -> dict[str, str] | None:
    """`jax.jit`'s `compiler_options` for CPUs: full vectors, and more options by name and value.

    None where this jaxlib does not know one of them: they are no part of XLA's interface, and may be gone later.
    """
    options = dict([_WIDTH, *more])
    try:
        jax.jit(lambda x: x + 1, compiler_options=options).lower(1.0).compile()
    except jax.errors.JaxRuntimeError:
        return None
    return options
