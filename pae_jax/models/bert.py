"""A BERT encoder of sentences."""

from __future__ import annotations

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pae_jax.errors import ArgumentError, StructureError
from pae_jax.models.attention import TransformerBlock


class Bert(nn.Module):
    """An encoder of token sequences, all-MiniLM-L6-v2 unless told otherwise: 6 layers of 384 channels.

    Embeddings of word, position and type are added and normed; attention blocks over the tokens that are not padding
    follow, with layer norms last. The features are the mean over those tokens, the first token, or all tokens. A
    sentence embedding is the mean divided by its L2 norm. The token size does not depend on the width. A layer has
    floor(heads · width) heads and floor(hidden · width) hidden units.

    Call it as `module(batch, train)`.

    Attributes:
      width: factor of heads and hidden units, above 0.
      vocabulary: number of token ids.
      size: channels of a token.
      depth: layers.
      heads: attention heads at width 1.
      hidden: hidden units of a layer at width 1; None means four times the size.
      positions: longest sequence.
      types: number of token types.
      pool: "mean", "first" or "none".
      epsilon: of the layer norms.
      dropout: share of the embeddings and of the branches' outputs that training drops, in [0, 1).
      dtype: dtype of the computation and of the features; None means float32. Parameters are always float32.

    Args:
      batch: `{"ids": (batch, length) integers, "mask": (batch, length), 1 where a token counts and 0 for padding}`, and
        optionally "types" (batch, length) integers; they are 0 otherwise.
      train: whether dropout is on.

    Returns:
      (batch, size), or (batch, length, size) with the pool "none".

    Example:
      >>> backbone = Bert(vocabulary=50, size=32, depth=2, heads=2)
      >>> batch = {"ids": jnp.ones((2, 7), jnp.int32), "mask": jnp.ones((2, 7), jnp.int32)}
      >>> backbone.init_with_output(jax.random.key(0), batch, train=False)[0].shape
      (2, 32)

    Reference: Devlin et al., NAACL 2019 (BERT); Reimers and Gurevych, EMNLP 2019 (mean pooling); Wang et al., NeurIPS
    2020 (MiniLM). `pae.models.load_weights` reads the weights of Hugging Face's BERT models.
    """

    width: float = 1.0
    vocabulary: int = 30522
    size: int = 384
    depth: int = 6
    heads: int = 12
    hidden: int | None = None
    positions: int = 512
    types: int = 2
    pool: Literal["mean", "first", "none"] = "mean"
    epsilon: float = 1e-12
    dropout: float = 0.1
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, batch: dict[str, Any], train: bool) -> jax.Array:
        """Return the features of a batch of token sequences."""
        ids, mask = self._read(batch)
        init = nn.initializers.normal(0.02)
        embed = functools.partial(nn.Embed, features=self.size, dtype=self.dtype, embedding_init=init)
        x = embed(self.vocabulary, name="Embed_word")(ids)
        x = x + embed(self.positions, name="Embed_position")(jnp.arange(ids.shape[1])[None])
        types = batch.get("types", jnp.zeros((1, ids.shape[1]), ids.dtype))
        x = x + embed(self.types, name="Embed_type")(types)
        x = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="LayerNorm_embed")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        seen = (mask > 0)[:, None, None, :]
        for number in range(1, self.depth + 1):
            x = TransformerBlock(
                self.width, self.heads, self.size // self.heads, self.hidden or 4 * self.size,
                norm_last=True, epsilon=self.epsilon, dropout=self.dropout, dtype=self.dtype, name=f"Block_{number}",
            )(x, seen, train)  # fmt: skip
        if self.pool == "none":
            return x
        if self.pool == "first":
            return x[:, 0]
        counted = (mask > 0).astype(x.dtype)[..., None]
        return (x * counted).sum(axis=1) / jnp.maximum(counted.sum(axis=1), 1e-9)

    def _read(self, batch: Any) -> tuple[jax.Array, jax.Array]:
        if self.pool not in ("mean", "first", "none") or self.size % self.heads:
            raise ArgumentError(
                f"Bert: found pool {self.pool!r}, size {self.size} and {self.heads} heads; expected the pool 'mean', "
                "'first' or 'none' and a size that is a multiple of the heads."
            )
        if not isinstance(batch, dict) or not {"ids", "mask"} <= batch.keys() <= {"ids", "mask", "types"}:
            found = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
            raise StructureError("batch", "", found, '{"ids": ..., "mask": ...}, and optionally "types"')
        ids, mask = batch["ids"], batch["mask"]
        if ids.ndim != 2 or mask.shape != ids.shape or not jnp.issubdtype(ids.dtype, jnp.integer):
            found = f"ids {ids.dtype}{list(ids.shape)} and mask {list(mask.shape)}"
            raise StructureError("batch", "", found, "integer ids and a mask of one shape (batch, length)")
        if ids.shape[1] > self.positions:
            hint = "Cut the sequences, or give the model more positions."
            raise StructureError("batch", "ids", f"length {ids.shape[1]}", f"at most {self.positions} tokens", hint)
        return ids, mask
