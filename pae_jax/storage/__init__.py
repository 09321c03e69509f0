"""States on disk."""

from pae_jax.storage.background import Saving as Saving
from pae_jax.storage.bundle import bundle_header as bundle_header
from pae_jax.storage.bundle import open_any as open_any
from pae_jax.storage.bundle import read_bundle as read_bundle
from pae_jax.storage.bundle import refuse_onto as refuse_onto
from pae_jax.storage.bundle import write_bundle as write_bundle
from pae_jax.storage.bundle import write_state as write_state
from pae_jax.storage.certificate import Certificate as Certificate
from pae_jax.storage.certificate import TaskProof as TaskProof
from pae_jax.storage.certificate import certificate as certificate
from pae_jax.storage.checkpoint import load as load
from pae_jax.storage.checkpoint import read_metadata as read_metadata
from pae_jax.storage.checkpoint import save as save
from pae_jax.storage.stage import digests as digests
