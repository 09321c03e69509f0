"""Objects and functions of the user are known by what they hold."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pae_jax.lifelong.describing import code_of
from pae_jax.lifelong.recipe import plain
from pae_jax.lifelong.recipes import Phase, Rate


class Momentum:
    """An own optimizer, which is no dataclass."""

    def __init__(self, momentum, **others):
        self.momentum = momentum
        vars(self).update(others)

    def transformation(self):
        return optax.chain(optax.trace(self.momentum), optax.scale(-1.0))


class Unset:
    def transformation(self):
        return optax.scale(-1.0)


def test_an_own_optimizer_is_known_by_what_it_holds():
    def text(optimizer):
        return plain(Phase(1, Rate(0.1), optimizer))["optimizer"]

    assert text(Momentum(0.5)) == text(Momentum(0.5)) != text(Momentum(0.9))
    assert text(Momentum(0.5, parts=[Momentum(0.1)])) != text(Momentum(0.5, parts=[Momentum(0.2)]))
    assert text(Momentum(0.5, names=np.array(["a", None]))) != text(Momentum(0.5, names=np.array(["b", None])))
    assert text(Momentum(0.5, key=jax.random.key(1))) != text(Momentum(0.5, key=jax.random.key(2)))
    assert text(Momentum(0.5, func=1)) != text(Momentum(0.9, func=1))
    assert text(Momentum(0.5)).startswith("Momentum ")
    assert text(Unset()) == "Unset"


def test_an_own_optimizer_that_holds_itself_is_described_in_the_end():
    one = Momentum(0.5)
    vars(one).update({name: [one, {name: one}] for name in "abcdefghij"})
    before = plain(Phase(1, Rate(0.1), one))["optimizer"]
    one.momentum = 0.9
    assert plain(Phase(1, Rate(0.1), one))["optimizer"] != before


def weighted(weights):
    return lambda outputs, y: jnp.asarray(list(weights), jnp.float32).sum() * outputs[:, 0]


KINDS = {
    "list": ([1.0, 2.0], [1.0, 2.0], [2.0, 1.0]),
    "nested": ([[1.0], [2.0]], [[1.0], [2.0]], [[1.0, 2.0]]),
    "dict": ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 2, "b": 1}),
    "set": ({"a", "b", "c"}, {"c", "b", "a"}, {"a", "b"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_captured_lists_dicts_and_sets_are_known_by_what_they_hold(kind):
    one, same, other = (code_of(weighted(weights)) for weights in KINDS[kind])
    assert one == same != other


def test_a_captured_object_may_change_between_the_calls_of_a_run():
    results = Momentum(0.5)
    before = code_of(weighted(results))
    results.momentum = 0.9
    assert code_of(weighted(results)) == before
