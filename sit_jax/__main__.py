"""`python -m sit_jax` is `sit`."""

import sys

from sit_jax.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
