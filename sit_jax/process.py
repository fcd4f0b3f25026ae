"""How a command's process behaves: what libraries may print, and which devices it takes."""

import os


def quiet_libraries() -> None:
    """Leaves only warnings of what libraries log."""
    from absl import logging

    logging.set_verbosity(logging.WARNING)


def take_cpu(devices: int = 1) -> None:
    """Leaves accelerators to whoever uses them; must come before JAX is asked for anything.

    Args:
        devices: Virtual devices that the CPU stands for.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")
    if devices > 1 and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", devices)
    quiet_libraries()
