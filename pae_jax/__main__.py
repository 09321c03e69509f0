"""`python -m pae_jax`: see `python -m pae_jax --help`."""

import sys

from pae_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
