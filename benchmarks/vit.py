"""A small vision transformer: a backbone with attention and layer norms for the step benchmarks."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class Block(nn.Module):
    """Attention and a two-layer network, each on normed features and with a residual connection.

    Attributes:
      heads: attention heads of 64 channels each.
      dtype: dtype of the computation.
    """

    heads: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return tokens of the same shape."""
        size = tokens.shape[-1]
        x = nn.LayerNorm(dtype=self.dtype)(tokens)
        tokens = tokens + nn.MultiHeadDotProductAttention(self.heads, use_bias=False, dtype=self.dtype)(x)
        x = nn.LayerNorm(dtype=self.dtype)(tokens)
        x = nn.gelu(nn.Dense(4 * size, dtype=self.dtype)(x))
        return tokens + nn.Dense(size, dtype=self.dtype)(x)


class ViT(nn.Module):
    """ViT of 64 channels per head without a class token: 2.7 million shared weights on 32×32 RGB images.

    Attributes:
      width: factor of the number of heads.
      heads: attention heads at width 1.
      depth: blocks.
      patch: pixels along the side of a patch.
      dtype: dtype of the computation; None means float32. Parameters are always float32.

    Reference: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; the mean over tokens in place of the
    class token follows Beyer et al., "Better plain ViT baselines for ImageNet-1k", 2022.
    """

    width: float = 1.0
    heads: int = 3
    depth: int = 6
    patch: int = 4
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Return the features of (batch, height, width, channels) images, (batch, 64 * heads)."""
        batch, height, width, channels = images.shape
        rows, columns, heads = height // self.patch, width // self.patch, int(self.heads * self.width)
        patches = images.reshape(batch, rows, self.patch, columns, self.patch, channels)
        tokens = jnp.swapaxes(patches, 2, 3).reshape(batch, rows * columns, -1)
        x = nn.Dense(64 * heads, dtype=self.dtype)(tokens)
        position = self.param("position", nn.initializers.normal(0.02), (1, rows * columns, 64 * heads))
        x = x + position.astype(x.dtype)
        for _ in range(self.depth):
            x = Block(heads, self.dtype)(x)
        return nn.LayerNorm(dtype=self.dtype)(x).mean(axis=1)
