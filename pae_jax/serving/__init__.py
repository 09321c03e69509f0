"""Serving of frozen tasks."""

from pae_jax.serving.export import TaskProgram as TaskProgram
from pae_jax.serving.export import export as export
from pae_jax.serving.server import Inference as Inference
from pae_jax.serving.server import Server as Server
from pae_jax.serving.slim import SlimNet as SlimNet
from pae_jax.serving.slim import slim as slim
