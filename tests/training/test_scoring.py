"""Scores of free weights by the squared gradient of a coming task."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import pae_jax as pae
from pae_jax.trees import flatten

KEY = jax.random.key(3)
NEW = {"head": 2, "key": KEY}


@pytest.fixture(scope="module")
def scores(net, frozen, data):
    return pae.gradient_scores(net, frozen, "b", data, batch_size=8, batches=3, **NEW)


def test_scores_are_parallel_to_the_weights_float32_and_0_where_another_task_owns(frozen, scores):
    assert jax.tree.structure(scores) == jax.tree.structure(frozen.shared)
    for path, leaf in flatten(scores).items():
        owner = np.asarray(flatten(frozen.owner)[path])
        assert (leaf.shape, leaf.dtype) == (owner.shape, jnp.float32)
        assert (np.asarray(leaf)[owner == 1] == 0).all()
        assert (np.asarray(leaf)[owner == 0] > 0).mean() > 0.5
        assert (np.asarray(leaf) >= 0).all()


def test_scores_are_float32_whatever_zeros_of_jax_are_by_default(data):
    """Of leaves of which a task owns little, a part is trained and made whole."""
    net = pae.linen(lambda width: nn.Dense(int(64 * width)), data[0][:1])
    few = pae.pack(net, pae.init(net, KEY), "a", head=2, key=KEY)
    few = pae.freeze(pae.prune(few, "a", 0.05), "a")
    with jax.enable_x64(True):
        found = pae.gradient_scores(net, few, "b", data, batch_size=8, batches=1, **NEW)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}


def test_a_score_is_the_mean_over_batches_of_the_squared_gradient_of_the_packed_task(net, frozen, data):
    batches = [(data[0][i : i + 8], data[1][i : i + 8]) for i in (0, 8)]
    found = pae.gradient_scores(net, frozen, "b", batches, **NEW)
    trial = pae.pack(net, frozen, "b", weight_init="fresh", **NEW)
    ts = pae.TrainState.create(net, trial, "b", tx=optax.identity())

    def loss(shared, x, y):
        out, _ = ts.apply_fn({**ts.params, "shared": shared}, jnp.asarray(x), train=True)
        return optax.softmax_cross_entropy_with_integer_labels(out, y).mean()

    gradients = [jax.grad(loss)(ts.params["shared"], *batch) for batch in batches]
    for path, leaf in flatten(found).items():
        wanted = np.mean([np.square(flatten(one)[path]) for one in gradients], axis=0)
        np.testing.assert_allclose(leaf, wanted, rtol=1e-4, atol=1e-9)
    first = pae.gradient_scores(net, frozen, "b", batches, batches=1, **NEW)
    np.testing.assert_allclose(
        flatten(first)["Dense_0/kernel"], np.square(flatten(gradients[0])["Dense_0/kernel"]), rtol=1e-4, atol=1e-9
    )


def test_scoring_changes_nothing_and_the_same_key_gives_the_same_scores(
    net, frozen, data, scores, state_facts, assert_same
):
    before = state_facts(frozen)
    again = pae.gradient_scores(net, frozen, "b", data, batch_size=8, batches=3, **NEW)
    assert_same(again, scores)
    assert state_facts(frozen) == before
    other = pae.gradient_scores(net, frozen, "b", data, batch_size=8, batches=3, head=2, key=jax.random.key(4))
    assert (np.asarray(flatten(other)["Dense_0/kernel"]) != np.asarray(flatten(scores)["Dense_0/kernel"])).any()


def test_a_budget_by_these_scores_claims_the_weights_of_the_largest_and_the_task_learns(
    net, frozen, data, scores, quick_fit
):
    state = pae.pack(net, frozen, "b", budget=0.1, budget_scores=scores, **NEW)
    claimed, left = [], []
    for path, leaf in flatten(scores).items():
        owner = np.asarray(flatten(state.owner)[path])
        claimed.extend(np.asarray(leaf)[owner == 2])
        left.extend(np.asarray(leaf)[owner == 0])
    assert len(claimed) == 8
    assert min(claimed) >= max(left)
    before = pae.evaluate(net, state, "b", data)["loss"]
    assert pae.evaluate(net, quick_fit(state, "b", epochs=5)[0], "b", data)["loss"] < before


def test_weights_added_by_an_expansion_are_scored_on_both_sides(net, packed, data):
    """With "preserve" one side of a new channel is 0 at first, so the other side has no gradient."""
    wide = pae.expand(net, pae.freeze(packed, "a"), width=1.5, key=jax.random.key(5))
    found = flatten(pae.gradient_scores(net, wide, "b", data, **NEW))
    for path, owner in flatten(wide.owner).items():
        free = np.asarray(owner) == 0
        assert (np.asarray(found[path])[free] > 0).mean() > 0.9
    one_sided = flatten(pae.gradient_scores(net, wide, "b", data, weight_init="preserve", **NEW))
    incoming = np.asarray(flatten(wide.owner)["Dense_0/kernel"]) == 0
    assert np.asarray(one_sided["Dense_0/kernel"])[incoming].max() < 1e-9 < np.asarray(found["Dense_0/kernel"]).max()


def test_a_second_task_of_equal_head_width_and_loss_traces_nothing_anew(net, frozen, data, scores, traces, assert_same):
    state = pae.freeze(pae.pack(net, frozen, "b", budget=0.1, budget_scores=scores, **NEW), "b")
    found = pae.gradient_scores(net, state, "c", data, batch_size=8, batches=3, **NEW)
    again = pae.gradient_scores(net, frozen, "b", data, batch_size=8, batches=3, **NEW)
    assert traces == []
    assert_same(again, scores)
    for path, leaf in flatten(found).items():
        taken = np.asarray(flatten(state.owner)[path]) == 2
        assert not np.asarray(leaf)[taken].any()


def own_loss(logits, y):
    return optax.softmax_cross_entropy(logits, jax.nn.one_hot(y, 2))


def test_an_own_loss_over_examples_or_the_batch_and_an_augmentation_take_part(net, frozen, data, scores):
    same = pae.gradient_scores(net, frozen, "b", data, loss=own_loss, batch_size=8, batches=3, **NEW)
    scaled = pae.gradient_scores(
        net,
        frozen,
        "b",
        data,
        loss=lambda out, y: 2.0 * own_loss(out, y).mean(),
        loss_per="batch",
        augment=lambda key, x: x,
        batch_size=8,
        batches=3,
        **NEW,
    )
    for path, leaf in flatten(scores).items():
        np.testing.assert_allclose(flatten(same)[path], leaf, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(flatten(scaled)[path], 4 * np.asarray(leaf), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": lambda out, y: 0.0 * own_loss(out, y)}, pae.DataError, "gradient 0 at every free weight"),
        ({"loss": lambda out, y: own_loss(out, y) * jnp.inf}, pae.DataError, "squared gradient of .* is not finite"),
        ({"loss": lambda out, y: out[:, None] - out[None, :, 0, None]}, pae.DataError, "the loss"),
        ({"batches": 0}, pae.ArgumentError, "batches must"),
        ({"batch_size": 0}, pae.ArgumentError, "batch_size must"),
        ({"weight_init": "ones"}, pae.ArgumentError, "weight_init must"),
    ],
    ids=["constant", "infinite", "mixing", "no batch", "no example", "weight_init"],
)
def test_what_gives_no_order_of_weights_is_refused(net, frozen, data, options, error, message):
    with pytest.raises(error, match=message):
        pae.gradient_scores(net, frozen, "b", data, **(NEW | options))


def test_labels_out_of_range_a_taken_name_and_a_full_network_are_refused_as_by_pack_and_fit(net, frozen, packed, data):
    with pytest.raises(pae.DataError, match="labels lie in"):
        pae.gradient_scores(net, frozen, "b", (data[0], data[1] + 1), **NEW)
    with pytest.raises(pae.ArgumentError, match="task 'a' exists already"):
        pae.gradient_scores(net, frozen, "a", data, **NEW)
    with pytest.raises(pae.CapacityError, match="no free weight is left for task 'b'"):
        pae.gradient_scores(net, pae.freeze(packed, "a"), "b", data, **NEW)
