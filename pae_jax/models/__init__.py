"""Backbones: plain Flax Linen modules of features, with a channel factor `width`."""
