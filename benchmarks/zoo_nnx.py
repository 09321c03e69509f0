"""NNX builders that imitate public models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Modes(nnx.Module):
    """Batch norm and dropout whose mode `.train()` and `.eval()` set (the NNX tutorials)."""

    def __init__(self, width, rngs):
        c = int(4 * width)
        self.conv, self.norm = nnx.Conv(3, c, (3, 3), rngs=rngs), nnx.BatchNorm(c, rngs=rngs)
        self.dropout, self.out = nnx.Dropout(0.2, rngs=rngs), nnx.Linear(c, 8, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean(axis=(1, 2))
        return self.out(self.dropout(x))


class Block(nnx.Module):
    def __init__(self, width, *, rngs):
        heads = int(2 * width)
        self.norm1, self.norm2 = nnx.RMSNorm(8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, 8, 4 * heads, 8, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(8, int(16 * width), rngs=rngs), nnx.Linear(int(16 * width), 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x, mask=None):
        x = x + self.dropout(self.attention(self.norm1(x), mask=mask))
        return x + self.dropout(self.down(nnx.gelu(self.up(self.norm2(x)))))


class Gemma(nnx.Module):
    """A list of layers, tables as constants, logits by the embedding (Gemma in NNX)."""

    def __init__(self, width, rngs):
        self.embedder = nnx.Embed(11, 8, rngs=rngs)
        self.layers = nnx.List([Block(width, rngs=rngs) for _ in range(2)])
        self.waves = np.sin(np.arange(16)[:, None] / 10 ** np.linspace(0, 2, 8)[None]).astype(np.float32)
        self.scale = jnp.sqrt(jnp.asarray(8.0))

    def __call__(self, tokens):
        x = self.embedder(tokens) * self.scale + jnp.asarray(self.waves)[None, : tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, nnx.make_causal_mask(tokens))
        return self.embedder.attend(x)


class VisionTransformer(nnx.Module):
    """Class token and positions as plain parameters, a Sequential of blocks (the NNX ViT tutorial)."""

    def __init__(self, width, *, rngs):
        self.patch = nnx.Conv(3, 8, (4, 4), (4, 4), padding="VALID", rngs=rngs)
        self.position = nnx.Param(0.1 * jax.random.normal(rngs.params(), (1, 5, 8)))
        self.token = nnx.Param(jnp.zeros((1, 1, 8)))
        self.encoder = nnx.Sequential(*[Block(width, rngs=rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, x):
        x = self.patch(x).reshape(x.shape[0], -1, 8)
        x = jnp.concatenate([jnp.tile(self.token[...], (x.shape[0], 1, 1)), x], axis=1)
        return self.norm(self.encoder(x + self.position[...]))[:, 0]


class ScannedBlock(nnx.Module):
    def __init__(self, hidden, rngs):
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.up, self.down = nnx.Linear(8, hidden, rngs=rngs), nnx.Linear(hidden, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(self.down(nnx.relu(self.up(self.norm(x)))))


class ScanOverLayers(nnx.Module):
    """Layers stacked by vmap and run by scan (flax nnx_toy_examples)."""

    def __init__(self, width, rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: ScannedBlock(int(12 * width), rngs), in_axes=(0,)))
        self.layers = make(rngs)

    def __call__(self, x):
        run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return run(self.first(x), self.layers)


class LowRank(nnx.Module):
    """Adapters beside a frozen layer (NNX LoRA)."""

    def __init__(self, width, rngs):
        hidden = int(12 * width)
        self.base = nnx.Linear(6, hidden, rngs=rngs)
        self.adapter = nnx.LoRA(6, 2, hidden, rngs=rngs)
        self.out = nnx.LoRALinear(hidden, 8, lora_rank=2, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.base(x) + self.adapter(x)))


class Vae(nnx.Module):
    """Samples only in training, sows its loss (NNX VAE)."""

    def __init__(self, width, rngs):
        hidden = int(16 * width)
        self.body, self.mean = nnx.Linear(6, hidden, rngs=rngs), nnx.Linear(hidden, 8, rngs=rngs)
        self.std, self.rngs = nnx.Linear(hidden, 8, rngs=rngs), rngs
        self.deterministic = False

    def __call__(self, x):
        h = nnx.relu(self.body(x))
        mean, std = self.mean(h), jnp.exp(self.std(h))
        if self.deterministic:
            return mean
        return mean + std * jax.random.normal(self.rngs.noise(), mean.shape)


class Rnn(nnx.Module):
    """A recurrent layer over embeddings (NNX RNN)."""

    def __init__(self, width, rngs):
        size = int(6 * width)
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(8, size, rngs=rngs), rngs=rngs)

    def __call__(self, tokens):
        return self.rnn(self.embed(tokens))


class Buffers(nnx.Module):
    """Constants as arrays and as variables of a custom type, a shared layer used twice (ported models)."""

    def __init__(self, width, rngs):
        self.one, self.mean = nnx.Linear(6, 6, rngs=rngs), nnx.Variable(jnp.zeros((6,)))
        self.table, self.offset = nnx.data(jnp.arange(6.0)), nnx.data(np.ones(6, np.float32))
        self.two, self.tied = nnx.Linear(6, int(12 * width), rngs=rngs), self.one
        self.nothing = None

    def __call__(self, x, training=False):
        x = (x - self.mean[...][None] + self.table[None]) / jnp.asarray(self.offset)[None]
        return self.two(self.tied(nnx.relu(self.one(x))))
