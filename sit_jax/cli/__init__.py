"""The command line: one module per verb, each with `add_parser` and `run`."""

from sit_jax.cli.app import main

__all__ = ["main"]
