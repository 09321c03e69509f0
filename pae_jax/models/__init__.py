"""Backbones: plain Flax Linen modules of features, with a channel factor `width`."""

from pae_jax.models.mlp import MLP as MLP
