"""Every architecture of the list is preserved, once and twice in a row, with any allowed entries in the new area."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pae_jax.trees import flatten
from pae_jax.widening import find_cuts, find_influence, trace

ARCHITECTURES = {}


def architecture(*shape, widths=(4, 6, 9), dtype=np.float32, tolerance=1e-5):
    """Register a model: called as model(width) on inputs of `shape` (several: a list of shapes)."""

    def register(model):
        ARCHITECTURES[model.__name__] = (model, shape, widths, dtype, tolerance)
        return model

    return register


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_widening_preserves_the_function(name, linen, check_preserved):
    model, shape, widths, dtype, tolerance = ARCHITECTURES[name]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 7, shape) if dtype is int else rng.normal(size=shape), dtype)
    check_preserved([linen(model(width), x) for width in widths], x, tolerance=tolerance)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_entries_without_influence_may_have_any_values_all_at_once(name, linen):
    """Nine weights of ten are 0, as after pruning; the others that cannot reach the output are then drawn."""
    model, shape, widths, dtype, _ = ARCHITECTURES[name]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 7, shape) if dtype is int else rng.normal(size=shape), dtype)
    network = linen(model(widths[0]), x)
    program, paths = trace(network.apply, network.shapes, x), flatten(network.shapes)
    weights = [path for path, leaf in paths.items() if leaf.ndim >= 2 and path.startswith("params")]
    values = {path: rng.uniform(0.5, 1, leaf.shape).astype(leaf.dtype) for path, leaf in paths.items()}
    nonzero = {path: rng.random(paths[path].shape) < 0.1 for path in weights}
    marks, _ = find_influence(program, network.shapes, nonzero)
    pruned = values | {path: values[path] * mark for path, mark in nonzero.items()}
    drawn = pruned | {path: np.where(marks[path], pruned[path], values[path]) for path in weights}
    drawn, pruned = (jax.tree.unflatten(jax.tree.structure(network.shapes), list(v.values())) for v in (drawn, pruned))
    jax.tree.map(np.testing.assert_array_equal, network(drawn, x), network(pruned, x))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_the_channels_that_it_does_not_use_a_network_computes_the_same(name, linen, random_variables):
    """A third of the output and of the input channels of every weight is 0, as after structured pruning."""
    model, shape, widths, dtype, tolerance = ARCHITECTURES[name]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 7, shape) if dtype is int else rng.normal(size=shape), dtype)
    network = linen(model(widths[0]), x)

    def pruned(leaf):
        if leaf.ndim < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        kept = (rng.random(leaf.shape[-1]) > 0.33) & (rng.random(leaf.shape[-2]) > 0.33)[:, None]
        return leaf * jnp.asarray(kept.reshape((1,) * (leaf.ndim - 2) + kept.shape), leaf.dtype)

    variables = jax.tree.map(pruned, random_variables(network.shapes))
    larger = jax.ShapeDtypeStruct((shape[0] + 1, *shape[1:]), x.dtype)
    cuts = find_cuts(network.apply, variables, [x, larger])
    small = jax.jit(cuts.apply, compiler_options=network.compiler_options)(cuts.take(variables), x)
    for wanted, found in zip(jax.tree.leaves(network(variables, x)), jax.tree.leaves(small), strict=True):
        wanted, found = np.asarray(wanted, np.float64), np.asarray(found, np.float64)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * max(np.abs(wanted).max(), 1e-30))


def norm(x):
    return nn.BatchNorm(use_running_average=True)(x)


def conv(width, kernel=3, **kwargs):
    return nn.Conv(width, (kernel, kernel), use_bias=False, **kwargs)


@architecture(2, 5)
class Mlp(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width)(x))
        x = nn.gelu(nn.Dense(2 * self.width)(x))
        return nn.Dense(3)(nn.sigmoid(nn.Dense(self.width + 1)(x)))


@architecture(2, 5)
class GrowingFeatures(nn.Module):
    """Outputs that grow, one of them a concatenation."""

    width: int

    @nn.compact
    def __call__(self, x):
        a, b = nn.relu(nn.Dense(self.width)(x)), nn.tanh(nn.Dense(self.width + 2)(x))
        return {"both": jnp.concatenate([a, x, b], -1), "each": [a, (b,)]}


@architecture(2, 6, 6, 3)
class FlattenNhwc(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(self.width, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(2 * self.width)(x.reshape(x.shape[0], -1)))
        return nn.Dense(3)(x)


@architecture(2, 6, 6, 3)
class FlattenNchw(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.avg_pool(nn.relu(nn.Conv(self.width, (3, 3))(x)), (2, 2), (2, 2))
        x = jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1)
        return nn.Dense(3)(x)


@architecture(2, 8, 8, 3)
class ResNet(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(norm(conv(self.width)(x)))
        for i, factor in enumerate((1, 2)):
            strides = (1 + i, 1 + i)
            y = nn.relu(norm(conv(self.width * factor, strides=strides)(x)))
            y = norm(conv(self.width * factor)(y))
            if y.shape != x.shape:
                x = norm(conv(self.width * factor, 1, strides=strides)(x))
            x = nn.relu(x + y)
        return nn.Dense(5)(x.mean((1, 2)))


@architecture(2, 8, 8, 3)
class PaddedShortcut(nn.Module):
    """The parameter-free shortcut of the first ResNets: new channels of the block are padded with zeros."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(norm(conv(self.width)(x)))
        y = norm(conv(2 * self.width, strides=(2, 2))(x))
        missing = 2 * self.width - x.shape[-1]
        x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))
        return nn.Dense(5)(nn.relu(x + y).mean((1, 2)))


@architecture(2, 8, 8, 3)
class DenseNet(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = conv(2 * self.width)(x)
        for block in range(2):
            for _ in range(2):
                y = conv(self.width)(nn.relu(norm(x)))
                x = jnp.concatenate([x, y], -1)
            if block == 0:
                x = nn.avg_pool(conv(x.shape[-1] // 2, 1)(nn.relu(norm(x))), (2, 2), (2, 2))
        return nn.Dense(5)(nn.relu(norm(x)).mean((1, 2)))


@architecture(2, 9, 9, 3)
class InceptionResNet(nn.Module):
    """A residual block of branches and a reduction, with uneven growth per branch."""

    width: int

    @nn.compact
    def __call__(self, x):
        w = self.width
        unit = lambda size, kernel, x, **kw: nn.relu(norm(conv(size, kernel, **kw)(x)))  # noqa: E731
        x = unit(2 * w, 3, x)
        branches = [unit(w, 1, x), unit(w + 1, 3, unit(w, 1, x)), unit(w // 2, 3, unit(w + 2, 3, x))]
        x = nn.relu(x + 0.17 * nn.Conv(2 * w, (1, 1))(jnp.concatenate(branches, -1)))
        down = {"strides": (2, 2), "padding": "VALID"}
        x = jnp.concatenate(
            [unit(w, 3, x, **down), unit(w, 3, unit(w, 1, x), **down), nn.max_pool(x, (3, 3), (2, 2))], -1
        )
        branches = [unit(w, 1, x), unit(w, 3, x)]
        x = nn.relu(x + 0.1 * nn.Conv(x.shape[-1], (1, 1))(jnp.concatenate(branches, -1)))
        x = norm(nn.Dense(5, use_bias=False)(x.mean((1, 2))))
        return x / jnp.sqrt(jnp.maximum(jnp.sum(x**2, -1, keepdims=True), 1e-10))


@architecture(2, 8, 8, 3)
class MobileNet(nn.Module):
    """Inverted residuals: expansion, depthwise convolution, squeeze and excitation."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.hard_swish(norm(conv(self.width)(x)))
        for _ in range(2):
            y = nn.hard_swish(norm(conv(3 * self.width, 1)(x)))
            y = nn.hard_swish(norm(conv(3 * self.width, feature_group_count=3 * self.width)(y)))
            s = nn.relu(nn.Dense(self.width)(y.mean((1, 2), keepdims=True)))
            y = y * nn.hard_sigmoid(nn.Dense(3 * self.width)(s))
            x = x + norm(conv(self.width, 1)(y))
        return nn.Dense(5)(x.mean((1, 2)))


@architecture(2, 6, 6, 3)
class DepthwiseMultiplier(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(conv(self.width)(x))
        x = nn.relu(nn.Conv(2 * self.width, (3, 3), feature_group_count=self.width)(x))
        return nn.Dense(5)(x.mean((1, 2)))


def resnext(groups, per_group):
    """Blocks of grouped convolutions; either number may grow."""

    class ResNeXt(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            g, c = groups(self.width), per_group(self.width)
            x = nn.relu(norm(conv(2 * self.width)(x)))
            y = nn.relu(norm(conv(g * c, 1)(x)))
            y = nn.relu(norm(conv(g * c, 3, feature_group_count=g)(y)))
            return nn.Dense(5)(nn.relu(x + norm(conv(2 * self.width, 1)(y))).mean((1, 2)))

    return ResNeXt


ARCHITECTURES["ResNeXt with more groups"] = (
    resnext(lambda w: w, lambda w: 2),
    (2, 6, 6, 3),
    (4, 6, 9),
    np.float32,
    1e-5,
)
ARCHITECTURES["ResNeXt with wider groups"] = (
    resnext(lambda w: 2, lambda w: w),
    (2, 6, 6, 3),
    (4, 6, 9),
    np.float32,
    1e-5,
)
ARCHITECTURES["ResNeXt with more and wider groups"] = (
    resnext(lambda w: w - 1, lambda w: w), (2, 6, 6, 3), (3, 4, 6), np.float32, 1e-5,
)  # fmt: skip


@architecture(2, 8, 8, 3)
class UNet(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        w = self.width
        a = nn.relu(norm(conv(w)(x)))
        b = nn.relu(norm(conv(2 * w)(nn.max_pool(a, (2, 2), (2, 2)))))
        c = nn.relu(norm(conv(3 * w)(nn.max_pool(b, (2, 2), (2, 2)))))
        up = nn.ConvTranspose(2 * w, (2, 2), strides=(2, 2))(c)
        b = nn.relu(norm(conv(2 * w)(jnp.concatenate([up, b], -1))))
        up = jax.image.resize(b, (*a.shape[:3], b.shape[-1]), "nearest")
        a = nn.relu(norm(conv(w)(jnp.concatenate([a, up], -1))))
        return nn.Conv(2, (1, 1))(a)


@architecture(2, 8, 8, 3)
class Vgg(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        for factor in (1, 2):
            x = nn.relu(nn.Conv(factor * self.width, (3, 3))(x))
            x = nn.max_pool(nn.relu(norm(conv(factor * self.width)(x))), (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.Dropout(0.5, deterministic=True)(nn.relu(nn.Dense(3 * self.width)(x)))
        return nn.Dense(5)(x)


@architecture(2, 8, 8, 3, widths=(2, 3, 5))
class Vit(nn.Module):
    """More heads of one size and a wider MLP; the residual stream stays."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (4, 4), strides=(4, 4))(x)
        x = x.reshape(x.shape[0], -1, 8)
        token = self.param("token", nn.initializers.zeros, (1, 1, 8))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, 8)), x], 1)
        x = x + self.param("position", nn.initializers.normal(), (1, x.shape[1], 8))
        for _ in range(2):
            y = nn.MultiHeadDotProductAttention(self.width, qkv_features=4 * self.width, out_features=8)(
                nn.LayerNorm()(x)
            )
            x = x + y
            y = nn.Dense(8)(nn.gelu(nn.Dense(5 * self.width)(nn.LayerNorm()(x))))
            x = x + y
        return nn.Dense(3)(nn.LayerNorm()(x)[:, 0])


@architecture(2, 6, 8, widths=(2, 3, 5))
class FusedQkv(nn.Module):
    """One projection for query, key and value, split afterwards; causal mask; heads grow."""

    width: int
    layout: str = "split"

    @nn.compact
    def __call__(self, x):
        batch, time, _ = x.shape
        heads, size = self.width, 4
        qkv = nn.Dense(3 * heads * size)(x)
        q, k, v = (part.reshape(batch, time, heads, size) for part in jnp.split(qkv, 3, -1))
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(size)
        mask = jnp.tril(jnp.ones((time, time), bool))
        weights = nn.softmax(jnp.where(mask, logits, jnp.finfo(logits.dtype).min))
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, time, heads * size)
        return nn.Dense(3)(x + nn.Dense(8)(y))


@architecture(2, 6, 8, widths=(2, 3, 5))
class InterleavedQkv(nn.Module):
    """Query, key and value of a head side by side, as timm lays them out: (3, heads, size) in one axis."""

    width: int

    @nn.compact
    def __call__(self, x):
        batch, time, _ = x.shape
        qkv = nn.Dense(12 * self.width)(x).reshape(batch, time, 3, self.width, 4).transpose(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = nn.softmax(q @ k.transpose(0, 1, 3, 2) * 4**-0.5)
        return nn.Dense(8)((weights @ v).transpose(0, 2, 1, 3).reshape(batch, time, -1))


@architecture(2, 6, 8, widths=(2, 3, 5))
class FlashStyleAttention(nn.Module):
    """jax.nn.dot_product_attention with more heads."""

    width: int

    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.DenseGeneral((self.width, 4))(x) for _ in range(3))
        return nn.DenseGeneral(8, axis=(-2, -1))(jax.nn.dot_product_attention(q, k, v, is_causal=True))


@architecture(2, 5, dtype=int)
class EmbedLstm(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Embed(7, self.width)(x)
        x = nn.RNN(nn.LSTMCell(self.width + 1))(x)
        x = nn.RNN(nn.OptimizedLSTMCell(self.width))(x)
        return nn.Dense(3)(x[:, -1])


@architecture(2, 5, dtype=int)
class EmbedGru(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Embed(7, self.width)(x)
        x = nn.Bidirectional(nn.RNN(nn.GRUCell(self.width)), nn.RNN(nn.GRUCell(self.width)))(x)
        return nn.Dense(3)(x[:, 0])


@architecture(2, 5, dtype=int)
class TiedEmbedding(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        embed = nn.Embed(7, self.width)
        x = embed(x)
        x = x + nn.Dense(self.width)(nn.relu(nn.Dense(2 * self.width)(x)))
        return embed.attend(x)


@architecture(2, 5)
class ScanWithRemat(nn.Module):
    """A stack of residual layers as one scanned, rematerialised layer."""

    width: int

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            width: int

            @nn.compact
            def __call__(self, x, _):
                y = nn.relu(nn.Dense(self.width + 1)(norm(x)))
                return x + nn.Dense(self.width)(y), None

        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = layers(self.width)(nn.Dense(self.width)(x), None)
        return nn.Dense(3)(x)


@architecture(2, 5)
class Glu(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.glu(nn.Dense(2 * self.width)(x))
        gate, up = jnp.split(nn.Dense(2 * self.width)(x), 2, -1)
        x = jnp.concatenate([x, nn.silu(gate) * up], -1)
        return nn.Dense(3)(x)


@architecture(2, 6, 6, 3)
class MoreGroupsOfOneSize(nn.Module):
    """GroupNorm whose groups keep their size."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(num_groups=None, group_size=2)(conv(2 * self.width)(x)))
        x = nn.relu(nn.GroupNorm(num_groups=self.width)(conv(3 * self.width)(x)))
        x = nn.relu(nn.InstanceNorm()(conv(self.width)(x)))
        return nn.Dense(3)(x.mean((1, 2)))


@architecture(2, 6, 6, 3, dtype=jnp.bfloat16, tolerance=4e-2)
class Bfloat16(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        x = nn.relu(nn.BatchNorm(use_running_average=True, **dtypes)(nn.Conv(self.width, (3, 3), **dtypes)(x)))
        x = jnp.concatenate([x, nn.gelu(nn.Conv(self.width, (1, 1), **dtypes)(x))], -1)
        return nn.Dense(3, **dtypes)(x.reshape(x.shape[0], -1))


@architecture(2, 6, 6, 3)
class PixelShuffle(nn.Module):
    """Depth to space and back."""

    width: int

    @nn.compact
    def __call__(self, x):
        b, h, w, _ = x.shape
        x = nn.relu(conv(4 * self.width)(x)).reshape(b, h, w, 2, 2, self.width)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, self.width)
        x = nn.relu(conv(self.width)(x))
        x = x.reshape(b, h, 2, w, 2, self.width).transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, 4 * self.width)
        return conv(2, 1)(x)


@architecture(2, 6, 6, 3)
class ShuffleWithGrowingGroups(nn.Module):
    """Channel shuffle after a grouped convolution whose number of groups grows with its output."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(conv(2 * self.width)(x))
        x = nn.relu(conv(2 * self.width, 3, feature_group_count=self.width)(x))
        x = x.reshape(*x.shape[:-1], self.width, 2).swapaxes(-1, -2).reshape(x.shape)
        return nn.Dense(3)(nn.relu(conv(self.width)(x)).mean((1, 2)))


@architecture(2, 5)
class Assorted(nn.Module):
    """Maxout, PReLU, a stack, a tile, a slice of fixed size, one channel, and a feature that is added to all."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(2 * self.width)(x)
        x = nn.PReLU()(x.reshape(x.shape[0], self.width, 2).max(-1))
        x = jnp.stack([x, jnp.tanh(x)], -1).reshape(x.shape[0], -1)
        x = nn.Dense(2 * self.width)(jnp.tile(x, (1, 2)))
        x = x * nn.softplus(self.param("temperature", nn.initializers.ones, (1, 1)))
        first, rest = x[:, :3], x[:, 3:]
        y = nn.elu(nn.Dense(self.width)(rest) + first[:, 2:3] + x[:, 0][:, None])
        return nn.Dense(3)(jnp.concatenate([first, y], -1))


@architecture(2, 6, 6, 3)
class MixtureOfExperts(nn.Module):
    """A fixed number of experts whose hidden layers grow, chosen softly and by a one-hot of the winner."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        gate = nn.softmax(nn.Dense(3)(x))
        experts = nn.vmap(
            nn.Dense, in_axes=None, out_axes=1, axis_size=3, variable_axes={"params": 0}, split_rngs={"params": True}
        )
        hidden = nn.relu(experts(self.width)(x))
        winner = jax.nn.one_hot(jnp.argmax(gate, -1), 3)
        return nn.Dense(4)(jnp.einsum("be,beh->bh", gate * winner, hidden))
