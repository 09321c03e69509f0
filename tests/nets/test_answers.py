"""A model whose answer for an example depends on the other examples, or on random numbers, is refused at pack."""

import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import pae_jax as pae
from pae_jax.nets import answers

VECTOR = np.zeros((1, 8), np.float32)
SERIES = np.zeros((1, 4, 3), np.float32)
NEIGHBOURS = "depends on the other examples of the batch"


def packed(call, sample, head=2, **options):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return call(self, x)

    net = pae.linen(lambda width: Model(), sample, **options)
    return pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=head, key=jax.random.key(1))


def recurrent_over_the_batch(self, x):
    return nn.RNN(nn.SimpleCell(6), time_major=True)(x)[:, -1]


def sum_of_earlier_examples(self, x):
    return jnp.cumsum(nn.Dense(6)(x), 0)


def sum_of_later_examples(self, x):
    return jnp.cumsum(nn.Dense(6)(x)[::-1], 0)[::-1]


def example_before(self, x):
    return jnp.roll(nn.Dense(6)(x), 1, 0)


def experts_of_limited_capacity(self, x):
    n, experts = x.shape[0], 4
    gates = jax.nn.softmax(nn.Dense(experts)(x))
    expert = gates.argmax(1)
    chosen = jax.nn.one_hot(expert, experts)
    keep = (jnp.cumsum(chosen, 0) * chosen).sum(1) <= max(4, n // experts)
    kernel = self.param("experts_kernel", nn.initializers.lecun_normal(), (experts, 8, 16))
    out = jnp.einsum("nd,edh->neh", x, kernel)[jnp.arange(n), expert]
    return nn.relu(out * keep[:, None] * gates.max(1)[:, None])


@pytest.mark.parametrize(
    ("call", "sample"),
    [
        (recurrent_over_the_batch, SERIES),
        (sum_of_earlier_examples, VECTOR),
        (sum_of_later_examples, VECTOR),
        (example_before, VECTOR),
        (experts_of_limited_capacity, VECTOR),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_an_answer_that_depends_on_earlier_or_later_or_many_examples_is_refused(call, sample):
    with pytest.raises(pae.StructureError, match=NEIGHBOURS):
        packed(call, sample)


def norm_over_the_batch(self, x):
    h = nn.Embed(7, 6)(x.astype(jnp.int32)).mean(axis=1)
    return nn.BatchNorm(use_running_average=False)(h)


@pytest.mark.parametrize(
    "sample",
    [
        np.zeros((1, 5), np.int32),
        np.full((1, 5), 3, np.int8),
        np.ones((2, 5), bool),
        jax.ShapeDtypeStruct((1, 5), jnp.int32),
    ],
    ids=str,
)
def test_a_dependence_on_other_examples_is_seen_with_integers_that_are_all_the_same(sample):
    with pytest.raises(pae.StructureError, match=NEIGHBOURS):
        packed(norm_over_the_batch, sample)


@pytest.mark.parametrize(
    ("known", "values"),
    [
        ([[3, 5]], {0, 1, 3, 4, 5}),
        ([[0, 0]], {0, 1}),
        ([[-2, 2]], {-2, -1, 0, 1, 2}),
        ([[True, True]], {False, True}),
        (np.asarray([[2**64 - 1, 2**64 - 2]], np.uint64), {0, 1, 2**64 - 2, 2**64 - 1}),
    ],
    ids=str,
)
def test_drawn_integers_are_in_the_range_of_the_sample_or_0_or_1(known, values):
    known = np.asarray(known)
    drawn = answers._others(np.random.default_rng(0), (40, 9), known.dtype, known)
    assert drawn.dtype == known.dtype
    assert set(drawn.ravel().tolist()) == values


class RandomFeatures(nn.Module):
    seed: int | None = None

    def setup(self):
        self.matrix = np.random.default_rng(self.seed).normal(size=(8, 6)).astype(np.float32)
        self.dense = nn.Dense(6)

    def __call__(self, x):
        return self.dense(jnp.cos(x @ self.matrix))


class NnxScaled(nnx.Module):
    def __init__(self, width, rngs):
        self.dense = nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x):
        return random.random() * self.dense(x)


TURN = itertools.count()


def shifted_otherwise(self, x):
    return nn.Dense(6)(jnp.roll(x, next(TURN), axis=1))


CHANGING = {
    "Linen": lambda **o: pae.linen(lambda width: RandomFeatures(), VECTOR, **o),
    "NNX": lambda **o: pae.nnx(NnxScaled, VECTOR, **o),
    "build": lambda **o: pae.linen(lambda width: RandomFeatures(seed=next(TURN)), VECTOR, **o),
}
CHANGES = "a constant that changes from trace to trace.*fixed seed"


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("name", CHANGING)
def test_random_numbers_drawn_when_a_model_is_traced_are_refused(name, coupled):
    net = CHANGING[name](couples_examples=coupled)
    with pytest.raises(pae.StructureError, match=CHANGES):
        pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))


def test_changing_settings_of_an_operation_are_refused_too():
    with pytest.raises(pae.StructureError, match=CHANGES):
        packed(shifted_otherwise, VECTOR)


def test_random_numbers_drawn_in_a_head_are_refused():
    net = pae.linen(lambda width: nn.Dense(8), VECTOR)
    with pytest.raises(pae.StructureError, match=f"head RandomFeatures.*{CHANGES}"):
        pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=RandomFeatures(), key=jax.random.key(1))


def test_random_numbers_from_a_fixed_seed_are_accepted():
    net = pae.linen(lambda width: RandomFeatures(seed=3), VECTOR)
    pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
