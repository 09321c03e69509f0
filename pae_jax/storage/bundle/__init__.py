"""Bundles: compact files of some or all tasks of a network."""

from pae_jax.storage.bundle.opening import open_any as open_any
from pae_jax.storage.bundle.opening import refuse_onto as refuse_onto
from pae_jax.storage.bundle.parts import with_digests as with_digests
from pae_jax.storage.bundle.reading import bundle_header as bundle_header
from pae_jax.storage.bundle.reading import read_bundle as read_bundle
from pae_jax.storage.bundle.writing import write_bundle as write_bundle
from pae_jax.storage.bundle.writing import write_state as write_state
