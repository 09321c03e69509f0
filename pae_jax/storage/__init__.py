"""States on disk."""

from pae_jax.storage.checkpoint import load as load
from pae_jax.storage.checkpoint import read_metadata as read_metadata
from pae_jax.storage.checkpoint import save as save
