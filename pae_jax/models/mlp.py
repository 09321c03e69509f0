"""A plain multi-layer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from flax import linen as nn

from pae_jax.models.scaling import scaled


class MLP(nn.Module):
    """Dense layers with ReLU; the backbone of the shortest examples.

    `x <- relu(x W + b)`, once per hidden layer, on the flattened input.

    Attributes:
      width: channel factor; a layer of nominal size c has `floor(c * width)` units.
      hidden: nominal sizes of the layers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = MLP(width=1.5, hidden=(8, 4))
      >>> variables = model.init(jax.random.key(0), jnp.zeros((2, 5)), train=False)
      >>> model.apply(variables, jnp.zeros((2, 5)), train=False).shape
      (2, 6)
    """

    width: float = 1.0
    hidden: Sequence[int] = (16, 16)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map inputs (batch, ...) to features (batch, floor(hidden[-1] * width))."""
        x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
        for units in self.hidden:
            x = nn.relu(nn.Dense(scaled(units, self.width))(x))
        return x
