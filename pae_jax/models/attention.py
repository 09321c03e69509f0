"""The transformer block that the ViT and BERT backbones are made of."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from pae_jax.models.scaling import scaled

exact_gelu = functools.partial(nn.gelu, approximate=False)


class TransformerBlock(nn.Module):
    """Attention and a two-layer network, each with a residual connection.

    Norms first, `x <- x + f(norm(x))`, as in ViT; or last, `x <- norm(x + f(x))`, as in BERT. The token size is the
    same at every width, since a layer norm over more channels would be another function. The number of heads (of a
    fixed size) and of hidden units scales with the width.

    Attributes:
      width: factor of heads and hidden units.
      heads: attention heads at width 1.
      head_size: channels per head.
      hidden: units of the two-layer network at width 1.
      norm_last: whether norms come last.
      epsilon: of the layer norms.
      dropout: share of the branches' outputs that training drops, in [0, 1).
      dtype: dtype of the computation.
    """

    width: float
    heads: int
    head_size: int
    hidden: int
    norm_last: bool
    epsilon: float
    dropout: float
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        """Map tokens (batch, length, size) to tokens; mask (batch, 1, 1, length) is True where a token may be seen."""
        size, heads = tokens.shape[-1], scaled(self.heads, self.width)

        def branch(name: str, x: jax.Array) -> jax.Array:
            if name == "attention":
                return nn.MultiHeadDotProductAttention(
                    heads, qkv_features=heads * self.head_size, out_features=size, dtype=self.dtype, name=name
                )(x, mask=mask)
            x = exact_gelu(nn.Dense(scaled(self.hidden, self.width), dtype=self.dtype, name="Dense_in")(x))
            return nn.Dense(size, dtype=self.dtype, name="Dense_out")(x)

        for name in ("attention", "network"):
            norm = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name=f"LayerNorm_{name}")
            added = branch(name, tokens if self.norm_last else norm(tokens))
            tokens = tokens + nn.Dropout(self.dropout, deterministic=not train)(added)
            tokens = norm(tokens) if self.norm_last else tokens
        return tokens
