"""Compilation without JAX's persistent cache."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """Compiles anew, and keeps the programs out of JAX's persistent cache.

    It could not load those for unavailable devices again. On CPUs, those that it loads run at another speed than those
    of the process that compiled them: at batch 1, 1.8 times as fast for a small model.
    """
    from jax.experimental.compilation_cache import compilation_cache

    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # The cache reads the setting only once.
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()
