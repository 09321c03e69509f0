"""A new but equal optimizer reuses a compiled step, and nothing different ever does."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pae_jax.fingerprint import fingerprint

GLOBAL = 0.5


def make(value, other=None):
    def loss(logits, y):
        def inner(z):
            return z * value

        return inner(logits) + (0 if other is None else other)

    return loss


def uses_global(logits, y):
    return logits * GLOBAL


def with_default(rate=0.1, *, decay=0.2):
    return lambda g, r=rate: g * r * decay


def counts_itself(n):
    def count(k):
        return 0 if k == 0 else count(k - 1) + n

    return count


EQUAL = {
    "closures": lambda: make(0.5),
    "nested closures": lambda: make(make(0.5), (1, [2.0, {"a": None}])),
    "defaults": lambda: with_default(),
    "partial": lambda: partial(make(1), 3, y=4),
    "recursive": lambda: counts_itself(2),
    "adam": lambda: optax.adam(1e-3),
    "adamw with a schedule": lambda: optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 50), weight_decay=0.1),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.lamb(0.1), optax.ema(0.9)),
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "piecewise": lambda: optax.sgd(optax.piecewise_constant_schedule(0.1, {5: 0.1})),
    "exponential decay": lambda: optax.sgd(optax.exponential_decay(0.1, 5, 0.5)),
    "masked": lambda: optax.masked(optax.adam(0.1), {"shared": True, "local": False, "head": True}),
}


@pytest.mark.parametrize("name", EQUAL)
def test_what_is_built_alike_has_equal_fingerprints(name):
    one, two = EQUAL[name](), EQUAL[name]()
    assert one is not two
    assert fingerprint(one) == fingerprint(two)
    assert hash(fingerprint(one)) == hash(fingerprint(two))


def test_the_globals_of_a_function_belong_to_its_fingerprint(monkeypatch):
    before = fingerprint(uses_global)
    assert fingerprint(uses_global) == before
    monkeypatch.setitem(globals(), "GLOBAL", 0.75)
    assert fingerprint(uses_global) != before


def nested_global():
    return lambda x: [GLOBAL * v for v in x]


def test_so_do_the_globals_of_functions_inside_it(monkeypatch):
    before = fingerprint(nested_global())
    monkeypatch.setitem(globals(), "GLOBAL", 0.75)
    assert fingerprint(nested_global()) != before


DIFFERENT = {
    "another number": (make(0.5), make(0.25)),
    "int and float": (make(1), make(1.0)),
    "bool and int": (make(True), make(1)),
    "NumPy and Python numbers, which promote differently": (make(np.float64(0.5)), make(0.5)),
    "a NumPy and a Python complex number": (make(np.complex128(1j)), make(1j)),
    "zero and negative zero": (make(0.0), make(-0.0)),
    "another default": (with_default(), with_default(0.2)),
    "another keyword default": (with_default(), with_default(decay=0.3)),
    "tuple and list": (make((1, 2)), make([1, 2])),
    "another order": (make({"a": 1, "b": 2}), make({"b": 2, "a": 1})),
    "longer": (make((1,)), make((1, 2))),
    "text and bytes": (make("a"), make(b"a")),
    "partial argument": (partial(make(1), 3), partial(make(1), 4)),
    "another body": (lambda logits, y: logits + 1, lambda logits, y: logits + 2),
    "learning rate": (optax.adam(1e-3), optax.adam(2e-3)),
    "epsilon": (optax.adam(1e-3, eps=1e-8), optax.adam(1e-3, eps=0.1)),
    "optimizer": (optax.adam(1e-3), optax.adamw(1e-3)),
    "nesterov": (optax.sgd(0.1, momentum=0.9, nesterov=True), optax.sgd(0.1, momentum=0.9, nesterov=False)),
    "schedule": (optax.sgd(optax.linear_schedule(0.1, 0.0, 5)), optax.sgd(optax.linear_schedule(0.1, 0.0, 6))),
    "equal arrays": (make(jnp.ones(2)), make(jnp.zeros(2))),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_has_another_fingerprint(name):
    one, two = DIFFERENT[name]
    assert fingerprint(one) != fingerprint(two)


class WeightedLoss:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, logits, y):
        return self.weight * logits

    def method(self, logits, y):
        return self.weight * logits


def change_array(array):
    array[0] = 5.0


def test_an_array_changed_in_place_changes_the_fingerprint_of_the_closure_over_it():
    """Class weights in a NumPy array, edited between two fits, are compiled in as constants."""
    weights = np.ones(2)
    loss = make(weights)
    before = fingerprint(loss)
    weights[0] = 5.0
    assert fingerprint(loss) != before


@pytest.mark.parametrize("of", ["object", "method"])
def test_an_attribute_changed_in_place_changes_the_fingerprint_of_the_object(of):
    loss = WeightedLoss(1.0)
    value = loss if of == "object" else loss.method
    before = fingerprint(value)
    loss.weight = 2.0
    assert fingerprint(loss if of == "object" else loss.method) != before


def test_a_loss_object_changed_between_two_fits_trains_with_its_new_value(packed, quick_fit, data):
    class Scaled:
        scale = 1.0

        def __call__(self, logits, y):
            return self.scale * (logits[:, 0] - y) ** 2

    loss, target = Scaled(), (data[0], data[1].astype(np.float32))
    _, one = quick_fit(packed, "a", target, loss=loss, optimizer=optax.sgd(0.0), epochs=1)
    loss.scale = 100.0
    _, two = quick_fit(packed, "a", target, loss=loss, optimizer=optax.sgd(0.0), epochs=1)
    assert two.rows[0]["loss"] == pytest.approx(100 * one.rows[0]["loss"], rel=1e-4)


def test_two_arrays_of_one_closure_each_equal_only_themselves():
    array = jnp.ones(2)
    assert fingerprint(make(array)) == fingerprint(make(array))
