"""How a model is called: its mode, its mapped axes, and what it needs besides x."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import pae_jax as pae

VECTOR = np.zeros((1, 4), np.float32)
X = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)


def packed(net, head=None):
    return pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=head, key=jax.random.key(1))


class Replicated(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=not train, momentum=0.5, axis_name="replica")(nn.Dense(3)(x))


class NnxReplicated(nnx.Module):
    def __init__(self, width, rngs):
        self.dense = nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, momentum=0.5, axis_name="replica", rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(x))


class Centred(nn.Module):
    """Uses the mapped axis in evaluation too."""

    @nn.compact
    def __call__(self, x, train):
        mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(3))
        h = nn.Dense(3)(x)
        seen = jax.lax.pmean(h.mean(0), "replica")
        if train:
            mean.value = seen
        return h - mean.value[None]


REPLICATED = {
    "Linen": lambda: pae.linen(lambda width: Replicated(), VECTOR),
    "NNX": lambda: pae.nnx(NnxReplicated, VECTOR),
    "pmean": lambda: pae.linen(lambda width: Centred(), VECTOR),
}


@pytest.mark.parametrize("kind", REPLICATED)
def test_statistics_are_of_all_replicas_of_a_users_loop_also_after_a_call_outside_of_it(kind):
    net = REPLICATED[kind]()
    ts = pae.TrainState.create(net, packed(net), "a", tx=optax.sgd(0.1))

    def means(x):
        statistics = ts.apply_fn(ts.params, x, train=True)[1]["backbone"]["batch_stats"]
        return next(leaf for path, leaf in jax.tree_util.tree_leaves_with_path(statistics) if "mean" in str(path))

    alone = means(X[:6])
    both = jax.vmap(means, axis_name="replica")(X.reshape(2, 6, 4))
    np.testing.assert_array_equal(both[0], both[1])
    assert (np.abs(both[0] - alone) > 1e-3).any()
    np.testing.assert_allclose(both[0], means(X), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(means(X[:6]), alone)
