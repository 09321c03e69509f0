"""Linen builders that imitate public models: how they are called, which variables they keep, what they compute."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

IMAGE, TOKENS, VECTOR = ("image", (8, 8, 3)), ("tokens", (6,)), ("vector", (6,))
ids = lambda vocabulary=11: nn.Embed(vocabulary, 8)  # noqa: E731


class PlainCnn(nn.Module):
    """No argument for training mode (flax mnist)."""

    width: float

    @nn.compact
    def __call__(self, x):
        for features in (4, 8):
            x = nn.avg_pool(nn.relu(nn.Conv(int(features * self.width), (3, 3))(x)), (2, 2), (2, 2))
        return nn.relu(nn.Dense(16)(x.reshape((x.shape[0], -1))))


class MappedBatchNorm(nn.Module):
    """Batch norm over a mapped axis, `train=True` by default (flax imagenet)."""

    width: float

    @nn.compact
    def __call__(self, x, train: bool = True):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, axis_name="batch")
        x = nn.relu(norm()(nn.Conv(int(4 * self.width), (3, 3), use_bias=False)(x)))
        y = norm(scale_init=nn.initializers.zeros_init())(nn.Conv(int(4 * self.width), (3, 3), use_bias=False)(x))
        return jnp.mean(nn.relu(x + y), axis=(1, 2))


class Vae(nn.Module):
    """Several methods, a key as an argument (flax vae): the encoder is the backbone."""

    width: float

    def setup(self):
        self.body = nn.Dense(int(16 * self.width))
        self.mean, self.log_variance = nn.Dense(4), nn.Dense(4)

    def encode(self, x):
        h = nn.relu(self.body(x))
        return self.mean(h), self.log_variance(h)

    def __call__(self, x, z_rng):
        mean, log_variance = self.encode(x)
        return mean + jnp.exp(0.5 * log_variance) * jax.random.normal(z_rng, mean.shape)


class SamplingDecoder(nn.Module):
    """Samples in evaluation too, from its own random stream (flax seq2seq)."""

    width: float

    @nn.compact
    def __call__(self, tokens):
        x = jax.nn.one_hot(tokens, 11)
        encoder = nn.RNN(nn.LSTMCell(int(6 * self.width)), return_carry=True)
        carry, _ = encoder(x, seq_lengths=jnp.argmax(tokens, -1) + 1)
        logits = nn.Dense(11)(carry[1])
        return logits + jax.nn.one_hot(jax.random.categorical(self.make_rng("lstm"), logits[:1]), 11)


@jax.vmap
def flip_sequences(inputs, lengths):
    return jnp.flip(jnp.roll(inputs, inputs.shape[0] - lengths, axis=0), axis=0)


class ScannedLstm(nn.Module):
    size: int

    @functools.partial(
        nn.transforms.scan, variable_broadcast="params", in_axes=1, out_axes=1, split_rngs={"params": False}
    )
    @nn.compact
    def __call__(self, carry, x):
        return nn.OptimizedLSTMCell(self.size)(carry, x)

    def start(self, shape):
        return nn.OptimizedLSTMCell(self.size, parent=None).initialize_carry(jax.random.key(0), shape)


class TextClassifier(nn.Module):
    """A bidirectional LSTM, attention with a mask of -inf, sown intermediates, two inputs (flax sst2)."""

    width: float
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, tokens, lengths, deterministic: bool | None = None):
        deterministic = nn.module.merge_param("deterministic", self.deterministic, deterministic)
        x = nn.Dropout(0.2)(ids()(tokens), deterministic=deterministic)
        size = int(6 * self.width)
        ahead, back = ScannedLstm(size), ScannedLstm(size)
        _, forward = ahead(ahead.start(x[:, 0].shape), x)
        turned = flip_sequences(x, lengths)
        _, backward = back(back.start(turned[:, 0].shape), turned)
        x = jnp.concatenate([forward, flip_sequences(backward, lengths)], -1)
        scores = nn.Dense(1, use_bias=False)(nn.tanh(nn.Dense(int(8 * self.width), use_bias=False)(x))).squeeze(-1)
        scores = jnp.where(jnp.arange(x.shape[1])[None] < lengths[:, None], scores, -jnp.inf)
        attention = nn.softmax(scores, axis=-1)
        self.sow("intermediates", "attention", attention)
        return (jnp.expand_dims(attention, 1) @ x).squeeze(1)


@struct.dataclass
class Config:
    size: int = 8
    hidden: int = 16
    heads: int = 2
    deterministic: bool = True
    decode: bool = False


class SelfAttention(nn.Module):
    """Norm, causal attention with a cache, a two-layer network."""

    config: Config

    @nn.compact
    def __call__(self, x, mask=None):
        c = self.config
        attention = nn.MultiHeadDotProductAttention(
            c.heads, qkv_features=4 * c.heads, out_features=c.size, decode=c.decode, deterministic=c.deterministic
        )
        x = x + attention(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(c.size)(nn.gelu(nn.Dense(c.hidden)(nn.LayerNorm()(x))))


class ConfiguredLm(nn.Module):
    """Mode in a configuration, sinusoids as constants, logits by the embedding (flax lm1b, wmt)."""

    config: Config

    @nn.compact
    def __call__(self, inputs, inputs_positions=None, inputs_segmentation=None):
        embed = ids()
        x = embed(inputs.astype("int32"))
        waves = np.sin(np.arange(inputs.shape[1])[:, None] / 10 ** np.linspace(0, 2, 8)[None])
        x = x + jnp.asarray(waves, jnp.float32)[None]
        mask = nn.make_causal_mask(inputs)
        for _ in range(2):
            x = SelfAttention(self.config)(x, mask)
        return embed.attend(nn.LayerNorm()(x)) / np.sqrt(x.shape[-1])


class KeywordTagger(nn.Module):
    """Inputs and mode by keyword alone (flax nlp_seq)."""

    width: float

    @nn.compact
    def __call__(self, *, inputs, train):
        x = nn.Dropout(0.2)(ids()(inputs), deterministic=not train)
        for _ in range(2):
            x = SelfAttention(Config(heads=int(2 * self.width), hidden=int(16 * self.width)))(x)
        return nn.Dense(5)(x)


class ActorCritic(nn.Module):
    """Pixel values 0..255 as input, two outputs (flax ppo)."""

    width: float

    @nn.compact
    def __call__(self, x):
        x = x.astype(jnp.float32) / 255.0
        x = nn.relu(nn.Conv(int(4 * self.width), (4, 4), (2, 2), name="conv1")(x))
        x = nn.relu(nn.Dense(int(16 * self.width), name="hidden")(x.reshape((x.shape[0], -1))))
        return nn.log_softmax(nn.Dense(4, name="logits")(x)), nn.Dense(1, name="value")(x)


class GraphNet(nn.Module):
    """Messages along edges given as inputs, summed per node, vmapped over graphs (jraph, flax ogbg_molpcba)."""

    width: float

    @nn.compact
    def __call__(self, graph):
        nodes = nn.Dense(8)(graph["nodes"])
        for _ in range(2):
            h = nn.relu(nn.Dense(int(8 * self.width))(nodes))
            sent = jax.vmap(lambda h, s, r: jax.ops.segment_sum(h[s], r, 4))(h, graph["senders"], graph["receivers"])
            nodes = nn.LayerNorm()(nodes + nn.Dense(8)(sent))
        return nodes.mean(1)


class BigVisionViT(nn.Module):
    """Returns features and a dict of all intermediates; layers by scan and remat (big_vision)."""

    width: float

    @nn.compact
    def __call__(self, image, *, train=False):
        out = {}
        x = out["stem"] = nn.Conv(8, (4, 4), strides=(4, 4), padding="VALID", name="embedding")(image)
        n, h, w, c = x.shape
        x = x.reshape(n, h * w, c) + self.param("pos_embedding", nn.initializers.normal(0.1), (1, h * w, c))
        block = nn.scan(
            nn.remat(ScanBlock, prevent_cse=False, static_argnums=(2,)),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast,),  # pyright: ignore[reportArgumentType]  (flax annotates numbers only)
            length=2,
        )
        x, out["layers"] = block(int(2 * self.width), int(16 * self.width), name="encoderblock")(x, not train)
        x = out["encoded"] = nn.LayerNorm(name="encoder_norm")(x)
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, c))
        probe = jnp.tile(probe, [n, 1, 1])
        return nn.MultiHeadDotProductAttention(2)(probe, x)[:, 0], out


class ScanBlock(nn.Module):
    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x, deterministic=True):
        y = nn.MultiHeadDotProductAttention(self.heads, qkv_features=4 * self.heads, out_features=8)(nn.LayerNorm()(x))
        x = x + nn.Dropout(0.1)(y, deterministic)
        y = nn.Dense(8)(nn.gelu(nn.Dense(self.hidden)(nn.LayerNorm()(x))))
        return x + nn.Dropout(0.1)(y, deterministic), {"mlp": y}


class Mixer(nn.Module):
    """Networks over tokens and over channels (MLP-Mixer)."""

    width: float

    @nn.compact
    def __call__(self, image, *, train=False):
        x = nn.Conv(8, (4, 4), strides=(4, 4))(image)
        x = x.reshape(x.shape[0], -1, 8)
        for _ in range(2):
            y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
            y = nn.Dense(y.shape[-1])(nn.gelu(nn.Dense(int(8 * self.width))(y)))
            x = x + jnp.swapaxes(y, 1, 2)
            x = x + nn.Dense(8)(nn.gelu(nn.Dense(int(16 * self.width))(nn.LayerNorm()(x))))
        return jnp.mean(x, axis=1)


class TwoTower(nn.Module):
    """Image and text by one module, with a temperature (CLIP, SigLIP)."""

    width: float

    def setup(self):
        self.image = Mixer(self.width)
        self.text = nn.Sequential([ids(), nn.Dense(int(16 * self.width)), nn.gelu, nn.Dense(8)])
        self.temperature = self.param("t", nn.initializers.ones, (1,))

    def __call__(self, image, text=None):
        def unit(x):
            return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-8)

        zimg = unit(self.image(image))
        ztxt = unit(self.text(text).mean(1)) if text is not None else None
        return zimg, ztxt, {"t": jnp.exp(self.temperature)}


class Partitioned(nn.Module):
    """Weights in partitioning boxes with axis names, relative position bias (T5)."""

    width: float

    @nn.compact
    def __call__(self, encoder_input_tokens, enable_dropout: bool = True):
        boxed = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        x = ids()(encoder_input_tokens)
        heads, length = int(2 * self.width), x.shape[1]
        bias = self.param("rel_embedding", nn.initializers.normal(0.1), (heads, 2 * length))
        gap = np.arange(length)[:, None] - np.arange(length)[None] + length
        qkv = [nn.DenseGeneral((heads, 4), use_bias=False)(x) for _ in range(3)]
        logits = jnp.einsum("bqhd,bkhd->bhqk", *qkv[:2]) + jnp.take(bias, gap, axis=1)[None]
        x = x + nn.DenseGeneral(8, axis=(-2, -1))(jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(logits), qkv[2]))
        h = nn.relu(nn.Dense(int(16 * self.width), use_bias=False, kernel_init=boxed)(nn.RMSNorm()(x)))
        h = nn.Dropout(0.1, deterministic=not enable_dropout)(h)
        return x + nn.Dense(8, use_bias=False)(h)


class SetupBert(nn.Module):
    """Submodules in setup, a tuple as output, five inputs (Hugging Face's Flax BERT)."""

    width: float

    def setup(self):
        self.words, self.places, self.types = ids(), nn.Embed(16, 8), nn.Embed(2, 8)
        self.norm = nn.LayerNorm()
        config = Config(heads=int(2 * self.width), hidden=int(16 * self.width))
        self.layers = [SelfAttention(config, name=str(i)) for i in range(2)]
        self.pooler = nn.Dense(8)

    def __call__(self, input_ids, attention_mask, token_type_ids=None, position_ids=None, deterministic: bool = True):
        places = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        x = self.norm(self.words(input_ids) + self.places(places) + self.types(jnp.zeros_like(input_ids)))
        for layer in self.layers:
            x = layer(x, attention_mask[:, None, None, :] > 0)
        return x, nn.tanh(self.pooler(x[:, 0]))


class DroppedPaths(nn.Module):
    """Squeeze and excitation, stochastic depth, `training=` (EfficientNet and ConvNeXt in Flax)."""

    width: float

    @nn.compact
    def __call__(self, x, training: bool):
        c = int(4 * self.width)
        x = nn.Conv(c, (2, 2), (2, 2))(x)
        for i in range(2):
            y = nn.Conv(c, (7, 7), feature_group_count=c)(x)
            y = nn.BatchNorm(use_running_average=not training)(y)
            y = nn.Dense(c)(nn.gelu(nn.Dense(4 * c)(y)))
            y = y * nn.sigmoid(nn.Dense(c)(nn.relu(nn.Dense(2)(y.mean((1, 2), keepdims=True)))))
            y = y * self.param(f"layer_scale_{i}", nn.initializers.constant(0.1), (c,))[None, None, None]
            if training:
                keep = jax.random.bernoulli(self.make_rng("dropout"), 0.9, (x.shape[0], 1, 1, 1))
                y = y * keep / 0.9
            x = x + y
        return x.mean((1, 2))


class UNet(nn.Module):
    """Image and time as inputs, skip connections, group norms of fixed size (diffusion models)."""

    width: float

    @nn.compact
    def __call__(self, x, t, train):
        c = int(4 * self.width)
        time = nn.Dense(c)(nn.swish(nn.Dense(16)(jnp.sin(t[:, None] * 2.0 ** jnp.arange(4)[None]))))
        a = nn.Conv(c, (3, 3))(x) + time[:, None, None]
        a = nn.swish(nn.GroupNorm(num_groups=None, group_size=2)(a))
        b = nn.swish(nn.Conv(2 * c, (3, 3), (2, 2))(nn.Dropout(0.1)(a, deterministic=not train)))
        up = jax.image.resize(b, (*a.shape[:3], b.shape[-1]), "nearest")
        return nn.Conv(3, (3, 3))(jnp.concatenate([a, up], -1))


class SpectralCritic(nn.Module):
    """Kernels divided by their largest singular value, whose estimate is a running statistic (GAN critics)."""

    width: float

    @nn.compact
    def __call__(self, x, train):
        x = nn.SpectralNorm(nn.Dense(int(12 * self.width)))(x, update_stats=train)
        return nn.SpectralNorm(nn.Dense(8))(nn.leaky_relu(x), update_stats=train)


class WeightNormed(nn.Module):
    """Kernels of unit norm times a scale."""

    width: float

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.WeightNorm(nn.Dense(int(12 * self.width)))(x))
        return nn.WeightNorm(nn.Dense(8))(x)


class StateSpace(nn.Module):
    """A diagonal linear recurrence with complex parameters (S5, LRU)."""

    width: float

    @nn.compact
    def __call__(self, tokens):
        x = ids()(tokens)
        size = int(6 * self.width)
        start = jnp.exp(1j * jnp.arange(size) - 0.3).astype(jnp.complex64)
        poles = self.param("Lambda", lambda key: start)
        u = nn.Dense(size)(x).astype(jnp.complex64)
        step = lambda h, u: (poles[None] * h + u, poles[None] * h + u)  # noqa: E731
        _, ys = jax.lax.scan(step, jnp.zeros((x.shape[0], size), jnp.complex64), u.swapaxes(0, 1))
        return nn.Dense(8)(ys.real.swapaxes(0, 1))


class RadianceField(nn.Module):
    """Sinusoidal encoding of the inputs and a skip connection (NeRF)."""

    width: float

    @nn.compact
    def __call__(self, x):
        waves = jnp.concatenate([x, *(f(x * 2.0**i) for i in range(3) for f in (jnp.sin, jnp.cos))], -1)
        h = waves
        for i in range(3):
            h = nn.relu(nn.Dense(int(16 * self.width))(h))
            h = jnp.concatenate([h, waves], -1) if i == 1 else h
        return {"rgb": nn.sigmoid(nn.Dense(3)(h)), "density": nn.softplus(nn.Dense(1)(h))}


class Experts(nn.Module):
    """The two best experts of four, and a sown auxiliary loss (Switch, Mixtral)."""

    width: float

    @nn.compact
    def __call__(self, x, train):
        gates = nn.softmax(nn.Dense(4, name="router")(x))
        self.sow("losses", "balance", (gates.mean(0) ** 2).sum())
        values, chosen = jax.lax.top_k(gates, 2)
        weights = (jax.nn.one_hot(chosen, 4) * values[..., None]).sum(-2)
        layers = functools.partial(
            nn.vmap, in_axes=0, out_axes=0, axis_size=4, variable_axes={"params": 0}, split_rngs={"params": True}
        )
        copies = jnp.broadcast_to(x[None], (4, *x.shape))
        h = nn.relu(layers(nn.Dense)(int(12 * self.width))(copies))
        return jnp.einsum("be,ebd->bd", weights, layers(nn.Dense)(8)(h))


class Recurrent(nn.Module):
    """Stacked recurrent layers, both directions, lengths from padding (speech and text encoders)."""

    width: float

    @nn.compact
    def __call__(self, tokens):
        lengths = (tokens > 0).sum(-1)
        x = ids()(tokens)
        cell = functools.partial(nn.GRUCell, int(6 * self.width))
        x: Any = nn.Bidirectional(nn.RNN(cell()), nn.RNN(cell()))(x, seq_lengths=lengths)
        carry, _ = nn.RNN(nn.LSTMCell(int(5 * self.width)), return_carry=True)(x, seq_lengths=lengths)
        return carry[1]


class QuantizedStatistics(nn.Module):
    """Statistics of other kinds: integers, a mask, half precision, a cache written in evaluation (quantised models)."""

    width: float

    @nn.compact
    def __call__(self, x, train):
        h = nn.relu(nn.Dense(int(12 * self.width), dtype=jnp.bfloat16)(x))
        top = self.variable("quant", "top", lambda: jnp.zeros((), jnp.float16))
        steps = self.variable("quant", "steps", lambda: jnp.zeros((), jnp.int32))
        allowed = self.variable("quant", "allowed", lambda: jnp.ones((2,), bool))
        seen = self.variable("cache", "seen", lambda: jnp.zeros((), jnp.int32))
        if train:
            top.value = jnp.maximum(top.value, jax.lax.stop_gradient(jnp.abs(h).max()).astype(jnp.float16))
            steps.value = steps.value + 1
        seen.value = seen.value + 1
        return nn.Dense(8)(h) * allowed.value[0]


class AuxiliaryInTraining(nn.Module):
    """A second output, whose layers exist only in training (Inception's and GoogLeNet's auxiliary head)."""

    width: float

    @nn.compact
    def __call__(self, x, train):
        h = nn.relu(nn.Dense(int(12 * self.width))(x))
        aux = nn.Dense(3, name="aux")
        if train or self.is_initializing():
            self.sow("intermediates", "early_answer", aux(h))
        return nn.Dense(8)(h)


@struct.dataclass
class Answer:
    logits: Any
    hidden: Any


class Decoder(nn.Module):
    """Rotary positions, gated units, grouped queries, a dataclass as output (Llama in Flax)."""

    width: float

    @nn.compact
    def __call__(self, input_ids, deterministic=True):
        x = ids()(input_ids)
        length, groups = x.shape[1], int(2 * self.width)
        angles = np.arange(length)[:, None] / 100.0 ** (np.arange(2)[None] / 2)
        waves = (np.concatenate([f(angles)] * 2, -1) for f in (np.cos, np.sin))
        cos, sin = (jnp.asarray(wave, jnp.float32)[None, :, None] for wave in waves)

        def rotate(h):
            return h * cos + jnp.concatenate([-h[..., 2:], h[..., :2]], -1) * sin

        q, k, v = (nn.DenseGeneral((n * groups, 4), use_bias=False)(nn.RMSNorm()(x)) for n in (2, 1, 1))
        k, v = (jnp.repeat(h, 2, axis=2) for h in (k, v))
        logits = jnp.einsum("bqhd,bkhd->bhqk", rotate(q), rotate(k)) / 2
        logits = jnp.where(jnp.tril(jnp.ones((length, length), bool))[None, None], logits, -jnp.inf)
        x = x + nn.DenseGeneral(8, axis=(-2, -1), use_bias=False)(jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(logits), v))
        h = nn.RMSNorm()(x)
        hidden = int(16 * self.width)
        x = x + nn.Dense(8, use_bias=False)(nn.silu(nn.Dense(hidden, use_bias=False)(h)) * nn.Dense(hidden)(h))
        return Answer(nn.Dense(5)(x), x)
