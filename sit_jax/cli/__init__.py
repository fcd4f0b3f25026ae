"""The command line: one module per verb."""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; see `sit_jax.cli.app.main`. The console script `sit` calls this function."""
    from sit_jax.cli import app

    return app.main(argv)
