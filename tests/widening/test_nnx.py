"""NNX models: variables as pure dicts through nnx.merge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx


class Cnn(nnx.Module):
    def __init__(self, width, rngs):
        self.conv = nnx.Conv(3, width, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(width, use_running_average=True, rngs=rngs)
        self.skip = nnx.Conv(3, width + 1, (1, 1), rngs=rngs)
        self.out = nnx.Linear(4 * 4 * (2 * width + 1), 3, rngs=rngs)

    def __call__(self, x):
        y = jnp.concatenate([nnx.relu(self.bn(self.conv(x))), self.skip(x)], -1)
        return self.out(nnx.max_pool(y, (2, 2), (2, 2)).reshape(x.shape[0], -1))


class Attention(nnx.Module):
    def __init__(self, heads, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, 8, 4 * heads, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(8, 5 * heads, rngs=rngs), nnx.Linear(5 * heads, 8, rngs=rngs)

    def __call__(self, x):
        x = x.reshape(x.shape[0], -1, 8)
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class Recurrent(nnx.Module):
    def __init__(self, width, rngs):
        self.up = nnx.Linear(3, width, rngs=rngs)
        self.rnn = nnx.RNN(nnx.GRUCell(width, width + 1, rngs=rngs), rngs=rngs)
        self.out = nnx.Linear(width + 1, 2, rngs=rngs)

    def __call__(self, x):
        x = x.reshape(x.shape[0], -1, 3)
        return self.out(self.rnn(self.up(x)))


@pytest.mark.parametrize(
    ("model", "widths", "channels"), [(Cnn, (3, 5, 6), 3), (Attention, (2, 3, 5), 1), (Recurrent, (3, 4, 6), 3)]
)
def test_nnx_models_are_preserved(model, widths, channels, network, check_preserved):
    def make(width):
        graph, state = nnx.split(nnx.eval_shape(lambda: model(width, rngs=nnx.Rngs(0))))
        shapes = nnx.to_pure_dict(state)

        def apply(variables, x):
            return nnx.merge(graph, variables)(x)

        return network(apply, shapes)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, channels)), jnp.float32)
    x = x[:, :, :6] if model is Recurrent else x
    jax.block_until_ready(x)
    check_preserved([make(width) for width in widths], x)
