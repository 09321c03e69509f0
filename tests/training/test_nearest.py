"""Which older task is most like a new one, by nearest neighbours among its features."""

import jax
import numpy as np
import pytest

import pae_jax as pae
from pae_jax.training import feed, form, nearest_of
from pae_jax.training.nearest import neighbour_accuracy

KEY = jax.random.key(7)


def test_points_of_their_own_class_nearby_are_classified_and_points_without_a_pattern_are_not():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    apart = rng.normal(size=(300, 4)).astype(np.float32)
    apart[:, 0] += 20 * labels
    assert neighbour_accuracy(apart, labels) == 1.0
    assert neighbour_accuracy(rng.normal(size=(300, 4)).astype(np.float32), labels) < 0.5
    assert neighbour_accuracy(apart, labels * 7 - 3) == 1.0  # class numbers of any kind
    assert neighbour_accuracy(apart[:1], labels[:1]) == 0.0


@pytest.fixture(scope="module")
def two(net, empty):
    """Task "blind" sees nothing of its inputs, task "seeing" does."""
    state = pae.pack(net, empty, "blind", head=None, key=KEY)
    state = pae.freeze(pae.prune(state, "blind", 1.0), "blind")
    return pae.freeze(pae.pack(net, state, "seeing", head=None, key=KEY, weight_init="fresh"), "seeing")


def of(net, data, augment=None):
    shape = form(net, 1.0, 2, True, augment)
    return shape, feed(data, shape, 8)


def test_the_task_whose_features_tell_the_classes_apart_is_the_nearest(net, two, data):
    x = np.random.default_rng(0).normal(size=(400, 4)).astype(np.float32)
    labels = (x[:, 0] > 0).astype(np.int32)
    assert pae.nearest_task(net, two, (x, labels), head=2, key=KEY) == "seeing"
    assert pae.nearest_task(net, two, (x, labels), head=labels.max() + 1, key=KEY) == "seeing"
    in_order = np.argsort(labels)
    assert pae.nearest_task(net, two, (x[in_order], labels[in_order]), head=2, key=KEY) == "seeing"
    shifted = of(net, (x - 50.0, labels), augment=lambda key, x: x + 50.0)
    assert nearest_of(two, *shifted, KEY) == "seeing"


def test_where_no_task_is_better_than_chance_there_is_no_nearest(net, two, empty):
    x, labels = np.zeros((9, 4), np.float32), np.int32([0, 0, 0, 0, 0, 0, 1, 1, 1])
    in_order = [(x, labels)]  # one batch, not shuffled: all voters have class 0, all others class 1
    assert nearest_of(two, *of(net, in_order), KEY) is None
    assert nearest_of(two, *of(net, [(x, np.zeros_like(labels))]), KEY) is None
    assert nearest_of(empty, *of(net, in_order), KEY) is None


def test_labels_that_are_no_class_numbers_are_refused(net, two):
    shape = form(net, 1.0, 2, False)
    y = np.zeros((40, 2), np.float32)
    with pytest.raises(pae.ArgumentError, match="need one class number per example"):
        nearest_of(two, shape, feed((np.zeros((40, 4), np.float32), y), shape, 8), KEY)
    with pytest.raises(pae.DataError, match="label"):
        pae.nearest_task(net, two, (np.zeros((2, 4), np.float32), np.int32([0, 5])), head=2, key=KEY)
