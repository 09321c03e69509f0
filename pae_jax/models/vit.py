"""The vision transformer."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pae_jax.errors import ArgumentError, StructureError
from pae_jax.models.attention import TransformerBlock
from pae_jax.models.conv import Conv


class ViT(nn.Module):
    """ViT-B/16 unless told otherwise: patches of an image and a class token, processed by attention blocks.

    The features are the normed class token, or the mean over the normed patches. The token size does not depend on the
    width. A block has floor(heads · width) heads and floor(hidden · width) hidden units.

    Call it as `module(images, train)`.

    Attributes:
      width: factor of heads and hidden units, above 0.
      size: channels of a token.
      depth: blocks.
      heads: attention heads at width 1.
      hidden: hidden units of a block at width 1; None means four times the size.
      patch: pixels along the side of a patch.
      pool: "token" or "mean".
      epsilon: of the layer norms.
      dropout: share of the branches' outputs that training drops, in [0, 1).
      dtype: dtype of the computation and of the features; None means float32. Parameters are always float32.

    Args:
      images: (batch, height, width, channels), floating point, standardised; height and width multiples of the patch.
      train: whether dropout is on.

    Returns:
      (batch, size).

    Example:
      >>> backbone = ViT(size=32, depth=2, heads=2, patch=8)
      >>> images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
      >>> jax.eval_shape(lambda x: backbone.init_with_output(jax.random.key(0), x, train=False)[0], images).shape
      (2, 32)

    Reference: Dosovitskiy et al., ICLR 2021. ViT-B/16 for 224×224 has 85,798,656 parameters without its classifier;
    `pae.models.load_weights` reads those of timm and of torchvision.
    """

    width: float = 1.0
    size: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int | None = None
    patch: int = 16
    pool: Literal["token", "mean"] = "token"
    epsilon: float = 1e-6
    dropout: float = 0.0
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Return the features of `images`."""
        if images.ndim != 4 or any(side % self.patch for side in images.shape[1:3]):
            wanted = f"(batch, height, width, channels), sides that are multiples of the patch, {self.patch}"
            raise StructureError("images", "", images.shape, wanted)
        if self.pool not in ("token", "mean") or self.size % self.heads:
            raise ArgumentError(
                f"ViT: found pool {self.pool!r}, size {self.size} and {self.heads} heads; expected the pool 'token' or "
                "'mean' and a size that is a multiple of the heads."
            )
        window = (self.patch, self.patch)
        patches = Conv(self.size, window, window, "VALID", dtype=self.dtype, name="Conv_patch")(images)
        x = patches.reshape(images.shape[0], -1, self.size)
        token = self.param("token", nn.initializers.zeros, (1, 1, self.size)).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.size)), x], axis=1)
        position = self.param("position", nn.initializers.normal(0.02), (1, x.shape[1], self.size))
        x = x + position.astype(x.dtype)
        for number in range(1, self.depth + 1):
            x = TransformerBlock(
                self.width, self.heads, self.size // self.heads, self.hidden or 4 * self.size,
                norm_last=False, epsilon=self.epsilon, dropout=self.dropout, dtype=self.dtype, name=f"Block_{number}",
            )(x, None, train)  # fmt: skip
        x = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="LayerNorm_last")(x)
        return x[:, 0] if self.pool == "token" else x[:, 1:].mean(axis=1)
