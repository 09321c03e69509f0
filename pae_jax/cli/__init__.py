"""The command line, `python -m pae_jax`."""

from pae_jax.cli.command_line import main as main
