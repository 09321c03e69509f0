"""A budget: how many free weights a task claims, and which."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pae_jax as pae
from pae_jax.trees import flatten

KEY = jax.random.key


def owned(state, task_id):
    return sum(int((np.asarray(o) == task_id).sum()) for o in jax.tree.leaves(state.owner))


@pytest.mark.parametrize(("budget", "count"), [(0.0125, 1), (0.1, 8), (0.2, 16), (0.5, 40), (0.9, 40), (1.0, 40)])
def test_a_task_owns_its_share_of_all_weights_or_all_free_ones_if_they_are_fewer(net, frozen, budget, count):
    """80 weights, of which 40 are free."""
    state = pae.pack(net, frozen, "b", head=2, key=KEY(3), budget=budget)
    assert owned(state, 2) == count
    assert owned(state, 0) == 40 - count
    assert owned(state, 1) == 40
    pae.check(state, net)


def test_weights_outside_the_budget_stay_free_and_untouched_for_the_next_task(net, frozen, quick_fit, assert_same):
    state = pae.pack(net, frozen, "b", head=2, key=KEY(3), budget=0.2, weight_init="fresh")
    trained = pae.freeze(quick_fit(state, "b")[0], "b")
    for path, owner in flatten(trained.owner).items():
        rest = np.asarray(owner) != 2
        for now in (state, trained):
            np.testing.assert_array_equal(
                np.asarray(flatten(now.shared)[path])[rest], np.asarray(flatten(frozen.shared)[path])[rest]
            )
    assert owned(pae.pack(net, trained, "c", head=2, key=KEY(4)), 3) == 24


def test_without_scores_the_key_draws_which_weights(net, empty, assert_same):
    pack = lambda key: pae.pack(net, empty, "a", head=2, key=KEY(key), budget=0.25).owner  # noqa: E731
    assert_same(pack(1), pack(1))
    assert any(
        (np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (pack(1), pack(2))), strict=True)
    )
    taken = np.mean([[np.mean(np.asarray(o)) for o in jax.tree.leaves(pack(key))] for key in range(20)], axis=0)
    np.testing.assert_allclose(taken, 0.25, atol=0.07)


def test_the_key_draws_the_same_weights_whatever_jax_draws_by_default(net, empty, assert_same):
    pack = lambda: pae.pack(net, empty, "a", head=2, key=KEY(1), budget=0.25).owner  # noqa: E731
    wanted = pack()
    with jax.enable_x64(True):
        assert_same(pack(), wanted)


def test_with_scores_the_largest_of_the_free_weights_are_claimed(net, frozen):
    rng = np.random.default_rng(0)
    scores = jax.tree.map(lambda w: jnp.asarray(rng.random(w.shape), jnp.float32), frozen.shared)
    state = pae.pack(net, frozen, "b", head=2, key=KEY(3), budget=0.1, budget_scores=scores)
    pairs = [
        np.asarray(s)[np.asarray(o) != 1] for s, o in zip(*map(jax.tree.leaves, (scores, state.owner)), strict=True)
    ]
    best = np.sort(np.concatenate(pairs))[-8:]
    claimed = [
        np.asarray(s)[np.asarray(o) == 2] for s, o in zip(*map(jax.tree.leaves, (scores, state.owner)), strict=True)
    ]
    np.testing.assert_array_equal(np.sort(np.concatenate(claimed)), best)


def test_a_budget_may_be_traced_around(net, frozen, assert_same):
    pack = lambda state: pae.pack(net, state, "b", head=2, key=KEY(3), budget=0.1, weight_init="zeros")  # noqa: E731
    assert_same(jax.jit(pack)(frozen).owner, pack(frozen).owner)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.5, "budget_scores": {"Dense_0": {"kernel": jnp.ones((4, 8))}}}, "budget_scores"),
        ({"budget_scores": {}}, "give budget= too"),
        ({"budget": 0.001}, "of 80 shared weights is not one weight"),
        ({"budget": 1.5}, r"budget must be a number in \[0, 1\], found 1.5"),
        ({"budget": float("nan")}, "budget must be a number"),
    ],
    ids=str,
)
def test_a_budget_that_says_nothing_about_the_network_is_refused(net, empty, options, message):
    with pytest.raises(pae.PaeError, match=message):
        pae.pack(net, empty, "a", head=2, key=KEY(1), **options)


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_scores_that_have_no_order_of_size_are_refused_by_leaf(net, empty, value):
    scores = jax.tree.map(lambda w: jnp.full(w.shape, value, jnp.float32), empty.shared)
    with pytest.raises(pae.ArgumentError, match="budget_scores/Dense_0/kernel has a value that is negative or not"):
        pae.pack(net, empty, "a", head=2, key=KEY(1), budget=0.5, budget_scores=scores)
