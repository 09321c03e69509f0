"""Finished tasks at work."""

from pae_jax.serving.server import Inference as Inference
from pae_jax.serving.server import Server as Server
