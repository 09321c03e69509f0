"""What the weights that a task claims start from: the older function is kept, and what was freed is alive."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import pae_jax as pae
from pae_jax.trees import flatten

KEY = jax.random.key


class Wide(nn.Module):
    """Two hidden layers, so that pruning leaves channels that are 0 on both sides."""

    width: float

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(int(48 * self.width))(x)))
        x = nn.relu(nn.Dense(int(24 * self.width))(x))
        return nn.Dense(16)(x)


@pytest.fixture(scope="module")
def wide():
    return pae.linen(Wide, jnp.zeros((1, 4)))


@pytest.fixture(scope="module")
def pruned(wide):
    """One task, nine tenths of it freed."""
    state = pae.pack(wide, pae.init(wide, KEY(0)), "a", head=2, key=KEY(1))
    return pae.freeze(pae.prune(state, "a", 0.9), "a")


def start(net, state, **options):
    return pae.pack(net, state, "b", **({"head": 2, "key": KEY(5)} | options))


def gradients(net, state, x):
    """Squared features of task "b", differentiated at the weights it sees."""
    backbone = net.program(state.width)
    entry = state.tasks["b"]

    def loss(shared):
        params = {"params": {k: {**shared[k], **entry.local["params"].get(k, {})} for k in shared}}
        local = {"params": entry.local["params"] | params["params"], "batch_stats": entry.local["batch_stats"]}
        return jnp.sum((backbone.apply(local, x, False, None)[0] - 1) ** 2)

    return jax.grad(loss)(state.shared)


def test_preserve_starts_a_task_as_the_function_of_the_older_weights(wide, pruned, data):
    state = start(wide, pruned, local_init="a")
    old, new = (np.asarray(pae.features(wide, s, t, data[0])) for s, t in ((pruned, "a"), (state, "b")))
    np.testing.assert_allclose(new, old, rtol=1e-6, atol=1e-6 * np.abs(old).max())
    for path, owner in flatten(state.owner).items():
        older = np.asarray(owner) == 1
        before, after = (np.asarray(flatten(s.shared)[path])[older] for s in (pruned, state))
        np.testing.assert_array_equal(after, before)


def test_preserve_leaves_hardly_a_weight_without_a_gradient_where_zeros_leave_most(wide, pruned):
    """A weight is dead where neither it nor its gradient moves: at the start, and once the outgoing side has moved."""
    x, dead = jax.random.normal(KEY(9), (512, 4)), {}
    for option in ("preserve", "zeros"):
        state = start(wide, pruned, weight_init=option)
        moved = jax.tree.map(lambda w, g: w - 1e-3 * g, state.shared, gradients(wide, state, x))
        after = gradients(wide, state.replace(shared=moved), x)
        free = [(np.asarray(m) == np.asarray(w)) & (np.asarray(g) == 0) & (np.asarray(o) == 2) for m, w, g, o in zip(
            *map(jax.tree.leaves, (moved, state.shared, after, state.owner)), strict=True)]  # fmt: skip
        owned = sum(int((np.asarray(o) == 2).sum()) for o in jax.tree.leaves(state.owner))
        dead[option] = sum(int(mark.sum()) for mark in free) / owned
    assert dead["preserve"] < 0.05
    assert dead["zeros"] > 0.3


def test_preserve_starts_a_task_on_a_widened_pretrained_network_as_exactly_the_pretrained_function(wide, data):
    """New channels are drawn on their incoming side and 0 on their outgoing one."""
    variables = Wide(1.0).init(KEY(3), jnp.zeros((1, 4)), False)
    variables = jax.tree.map(lambda leaf: leaf + 0.5 if leaf.ndim == 1 else leaf, variables)
    state = pae.from_variables(wide, variables)
    state = pae.freeze(pae.pack(wide, state, "base", head=None, key=KEY(0)), "base")
    grown = start(wide, pae.expand(wide, state, width=1.5, key=KEY(1)))
    np.testing.assert_allclose(
        pae.features(wide, grown, "b", data[0]), pae.features(wide, state, "base", data[0]), rtol=2e-6, atol=1e-5
    )
    first, second, third = (np.asarray(flatten(grown.shared)[f"Dense_{i}/kernel"]) for i in range(3))
    assert first[:, 48:].all()
    assert second[:, 24:].all()
    assert not second[48:, :24].any()
    assert not third[24:].any()


def test_zeros_keep_what_was_freed_at_zero_and_what_expand_made_as_drawn(wide, pruned):
    grown = pae.expand(wide, pruned, width=1.5, key=KEY(1))
    state = start(wide, grown, weight_init="zeros")
    for path, leaf in flatten(state.shared).items():
        np.testing.assert_array_equal(leaf, flatten(grown.shared)[path])


def test_where_older_weights_let_no_input_through_everything_is_drawn(wide, pruned):
    emptied = pae.freeze(pae.prune(pae.pack(wide, pae.init(wide, KEY(0)), "a", head=2, key=KEY(1)), "a", 1.0), "a")
    state = start(wide, emptied)
    assert all(np.asarray(leaf).all() for leaf in jax.tree.leaves(state.shared))


def test_preserve_counts_only_the_older_weights_that_the_task_sees(wide, pruned, data):
    """With sharing "first" the second task's weights are as good as 0 for the third."""
    second = pae.freeze(pae.prune(start(wide, pruned, weight_init="fresh"), "b", 0.5), "b")
    third = pae.pack(wide, second, "c", head=2, key=KEY(7), sharing="first", local_init="a")
    np.testing.assert_allclose(
        pae.features(wide, third, "c", data[0]), pae.features(wide, pruned, "a", data[0]), rtol=1e-5, atol=1e-5
    )


class Positions(nn.Module):
    """Sequences of up to 40 numbers, whose positions are rows of a table, read through a narrow layer."""

    width: float

    @nn.compact
    def __call__(self, x, train):
        table = self.param("table", nn.initializers.normal(), (40, 6))
        x = x[:, :, None] + table[None, : x.shape[1]]
        return nn.Dense(4)(nn.relu(nn.Dense(int(16 * self.width))(x))).mean(1)


def test_preserve_keeps_the_older_function_for_inputs_longer_than_the_sample():
    net = pae.linen(Positions, jnp.zeros((1, 6)), free_axes=(1,))
    state = pae.pack(net, pae.init(net, KEY(0)), "a", head=2, key=KEY(1))
    state = pae.freeze(pae.prune(state, "a", 0.7), "a")
    after = start(net, state)
    for length in (6, 9, 37, 40):
        x = jax.random.normal(KEY(length), (3, length))
        old, new = (pae.features(net, s, t, x) for s, t in ((state, "a"), (after, "b")))
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-6)


def relu_of_dense(x, size):
    return nn.relu(nn.Dense(size)(x))


def weight_norm(x, size):
    return nn.relu(nn.WeightNorm(nn.Dense(size))(relu_of_dense(x, size)))


def step(x, size):
    return (nn.Dense(size, use_bias=False)(relu_of_dense(x, size)) > 0).astype(jnp.float32)


def tokens(x, size):
    return nn.LayerNorm()(nn.LayerNorm()(nn.Embed(40, size)(x))).mean(1)


class Small(nn.Module):
    """Some layers under a last one."""

    layers: Callable
    width: float

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(self.layers(x, int(16 * self.width)))


@pytest.mark.parametrize(("layers", "share"), [(weight_norm, 0.9), (step, 0.9), (tokens, 0.95)])
def test_preserve_keeps_the_older_function_where_a_rounding_error_would_grow(layers, share):
    """A step, and norms of nearly nothing, also of tokens that are not in the sample."""
    x = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
    if layers is tokens:
        x = np.arange(40, dtype=np.int32).reshape(40, 1).repeat(5, 1)
    net = pae.linen(functools.partial(Small, layers), x[:1])
    state = pae.pack(net, pae.init(net, KEY(0)), "a", head=None, key=KEY(1))
    state = pae.freeze(pae.prune(state, "a", share), "a")
    after = start(net, state, local_init="a")
    old, new = (np.asarray(pae.features(net, s, t, x)) for s, t in ((state, "a"), (after, "b")))
    np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-4 * np.abs(old).max())
    assert small(after) > 0  # layers where they do not matter keep them


def test_preserve_leaves_small_weights_in_layers_that_hardly_enlarge_them():
    net = pae.linen(functools.partial(Small, relu_of_dense), jnp.zeros((1, 5)))
    state = pae.pack(net, pae.init(net, KEY(0)), "a", head=None, key=KEY(1))
    state = pae.freeze(pae.prune(state, "a", 0.9), "a")
    assert small(start(net, state)) >= 5


def small(state):
    """How many weights are next to 0."""
    return sum(int(((leaf != 0) & (jnp.abs(leaf) < 1e-6)).sum()) for leaf in jax.tree.leaves(state.shared))


def test_preserve_looks_at_values_so_a_second_task_packed_inside_jit_says_how_else(wide, pruned):
    with pytest.raises(pae.ArgumentError, match="outside jit and vmap, or with weight_init='zeros' or 'fresh'"):
        jax.jit(lambda state: start(wide, state))(pruned)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap])
def test_a_second_task_is_packed_for_a_traced_key_unless_it_has_to_preserve(net, frozen, transform):
    def pack(key, weight_init):
        return pae.pack(net, frozen, "b", head=2, key=key, weight_init=weight_init)

    key = KEY(3) if transform is jax.jit else jax.random.split(KEY(3), 2)
    with pytest.raises(pae.ArgumentError, match="call pack outside jit and vmap"):
        transform(lambda key: pack(key, "preserve"))(key)
    for weight_init in ("zeros", "fresh"):
        assert transform(lambda key, how=weight_init: pack(key, how))(key).tasks["b"].id == 2
