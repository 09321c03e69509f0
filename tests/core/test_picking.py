"""Picks of older weights: what they hide and turn, how they learn and are kept; the bit laws are in test_laws.py."""

import hashlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import pae_jax as pae
from pae_jax.core import integrity, picking
from pae_jax.nets import heads
from pae_jax.trees import flatten

SCORES = hnp.arrays(np.float32, 12, elements=st.floats(-1, 1, width=32, allow_subnormal=False))
TERNARY = pae.Picking(ternary=True)


@pytest.fixture(scope="module")
def make_picked(net, frozen):
    """Pack a task that picks on top of a state, by default the one of "a"; its name is "b"."""

    def make(state=frozen, task="b", **options):
        return pae.pack(net, state, task, **({"head": 2, "key": jax.random.key(3), "sharing": "picked"} | options))

    return make


@pytest.fixture(scope="module")
def picked(make_picked):
    """Task "a" frozen, task "b" packed with picks, not trained; both own half of the weights."""
    return make_picked()


def with_picks(weights, picks):
    """One optimizer that trains the scores of picks by another chain than everything else."""
    label = lambda params: {part: "pick" if part == "pick" else "rest" for part in params}  # noqa: E731
    return optax.partition({"rest": weights, "pick": picks}, label)


def with_scores(state, change, task="b"):
    """Return the state with other scores, made of each leaf's path, scores and owners on the host."""
    entry, owner = state.tasks[task], flatten(state.owner)
    flat = {path: jnp.asarray(change(path, np.array(p), np.asarray(owner[path]))) for path, p in pick_of(entry).items()}
    pick = jax.tree.unflatten(jax.tree.structure(entry.pick), list(flat.values()))
    return state.replace(tasks={**state.tasks, task: entry.replace(pick=pick)})


def some_hidden(path, scores, owner, hidden=0.0):
    """Every third of the older weights gets a score below the threshold."""
    where = np.flatnonzero(owner == 1)[::3]
    scores.ravel()[where] = hidden
    return scores


def pick_of(entry):
    return flatten(entry.pick)


def number_of(tree):
    return sum(int(np.asarray(leaf).sum()) for leaf in jax.tree.leaves(tree))


# Picking


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": -0.001},
        {"threshold": math.nan},
        {"threshold": math.inf},
        {"threshold": "low"},
        {"initial": 0.005},
        {"initial": -1.0},
        {"initial": math.nan},
        {"initial": math.inf},
        {"initial": None},
        {"initial": True},
        {"own": 1},
        {"own": True, "ternary": True},
    ],
    ids=str,
)
def test_picking_refuses_values_out_of_range_by_name(change):
    with pytest.raises(pae.ArgumentError, match=f"^{next(iter(change))} must"):
        pae.Picking(**change)


def test_a_score_at_the_threshold_is_not_picked_and_one_of_zero_is_not_turned():
    scores = {"w": np.float32([-0.0, 0.0, 0.25, np.nextafter(np.float32(0.25), 1), np.nan, -1e-30])}
    tree = jax.tree.map(jnp.asarray, scores)
    binary, ternary = pae.Picking(0.25, 1.0), pae.Picking(0.25, 1.0, ternary=True)
    assert binary.signs(tree)["w"].tolist() == [False, False, False, True, False, False]
    assert ternary.signs(tree)["w"].tolist() == [0, 0, 0, 1, 0, -1]


@given(SCORES, st.booleans())
@settings(max_examples=40, deadline=None)
def test_straight_through_factors_are_the_signs_and_pass_the_gradient_unchanged(scores, ternary):
    rule = pae.Picking(0.1, 0.2, ternary)
    tree = {"w": jnp.asarray(scores)}
    signs = np.asarray(rule.signs(tree)["w"])
    np.testing.assert_array_equal(signs, (scores > 0.1).astype(int) - (ternary & (scores < 0)))
    assert signs.dtype == (np.int8 if ternary else np.bool_)
    assert rule.signs({"w": jnp.asarray(signs)})["w"].tolist() == signs.tolist()
    weights = jnp.arange(1.0, len(scores) + 1)
    gradient = jax.grad(lambda p: jnp.sum(rule.straight_through(p)["w"] * weights))(tree)["w"]
    np.testing.assert_array_equal(rule.straight_through(tree)["w"], signs.astype(np.float32))
    np.testing.assert_array_equal(gradient, weights)


@given(st.data(), st.booleans(), st.integers(2, 4))
@settings(max_examples=60, deadline=None)
def test_signs_are_stored_in_one_bit_per_older_weight_or_two_if_ternary_and_come_back(data, ternary, task_id):
    shapes = data.draw(st.lists(hnp.array_shapes(max_dims=3, max_side=6), min_size=1, max_size=3))
    owner, signs = {}, {}
    for i, shape in enumerate(shapes):
        owner[f"l{i}"] = data.draw(hnp.arrays(np.int8, shape, elements=st.integers(0, task_id)))
        kind, low = (np.int8, -1) if ternary else (np.bool_, 0)
        values = data.draw(hnp.arrays(np.int8, shape, elements=st.integers(low, 1))).astype(kind)
        signs[f"l{i}"] = np.where((owner[f"l{i}"] > 0) & (owner[f"l{i}"] < task_id), values, 0).astype(kind)
    older = sum(int(((o > 0) & (o < task_id)).sum()) for o in owner.values())
    bits = picking.to_bits(signs, owner, task_id)
    assert bits.dtype == np.uint8
    assert bits.shape == (max(1, math.ceil(older / 8) * (2 if ternary else 1)),)
    back = picking.from_bits(bits, owner, task_id, ternary)
    for name, leaf in signs.items():
        assert back[name].dtype == leaf.dtype
        np.testing.assert_array_equal(back[name], leaf)
    for wrong in (bits[:-1], np.append(bits, bits[-1]), bits[None], bits.astype(np.int16)):
        with pytest.raises(pae.CheckpointError, match=f"the picks of task {task_id} are .* {older} older weights"):
            picking.from_bits(wrong, owner, task_id, ternary)


# pack, masks, report


def test_with_a_top_share_the_highest_scores_of_each_leaf_are_picked_and_no_other():
    """Highest, not largest in magnitude; ties by index; half a weight goes to the even number."""
    rule = pae.Picking(top=0.5)
    assert rule.signs({"w": jnp.asarray([-0.9, 0.1, 0.3, -0.2])})["w"].tolist() == [False, True, True, False]
    assert pae.Picking(top=0.1).signs({"w": jnp.arange(4.0)})["w"].tolist() == [False, False, False, True]
    assert rule.signs({"w": jnp.zeros(5)})["w"].tolist() == [False, False, False, True, True]
    scores = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(7, 9)), jnp.float32)}
    for share in (0.1, 0.37, 1.0):
        marks = np.asarray(jax.jit(pae.Picking(top=share).signs)(scores)["w"])
        assert marks.sum() == round(share * 63)
        assert np.asarray(scores["w"])[marks].min() >= np.max(np.asarray(scores["w"])[~marks], initial=-np.inf)


def test_with_a_top_share_scores_start_uniform_by_fan_in_drawn_by_the_key(make_picked):
    one, same, other = (
        pick_of(make_picked(picking=pae.Picking(top=0.3), key=key).tasks["b"]) for key in map(jax.random.key, (3, 3, 4))
    )
    for path, fan_in in (("Dense_0/kernel", 4), ("Dense_1/kernel", 8)):
        scores = np.asarray(one[path])
        assert 0.5 * fan_in**-0.5 < np.abs(scores).max() <= fan_in**-0.5
        np.testing.assert_array_equal(scores, same[path])
        assert (scores != np.asarray(other[path])).all()


def test_with_a_top_share_scores_are_float32_whatever_jax_draws_by_default(net, make_picked, assert_same):
    rule = pae.Picking(top=0.3)
    wanted = make_picked(picking=rule)
    with jax.enable_x64(True):
        found = make_picked(picking=rule)
        pae.check(found, net)
    assert_same(found.tasks["b"].pick, wanted.tasks["b"].pick)


def test_the_digest_of_settings_without_a_top_share_is_that_of_before_there_was_one(make_picked):
    """Tasks that pick and were frozen by an earlier version still verify."""
    entry = make_picked().tasks["b"]
    rule = {"threshold": 0.005, "initial": 0.01, "ternary": False}
    known = json.dumps([2, 1.0, "picked", heads.describe(2), rule])
    assert integrity._settings_digest(entry) == hashlib.sha256(known.encode()).hexdigest()


def test_a_new_task_picks_every_older_weight_and_its_scores_start_at_the_initial_value(net, frozen, picked):
    entry = picked.tasks["b"]
    assert entry.picking == pae.Picking()
    for path, scores in pick_of(entry).items():
        assert scores.dtype == jnp.float32
        np.testing.assert_array_equal(scores, np.full(flatten(picked.shared)[path].shape, 0.01, np.float32))
    plain = pae.pack(net, frozen, "b", head=2, key=jax.random.key(3))
    for mask, expected in zip(*map(jax.tree.leaves, (pae.masks(picked, "b"), pae.masks(plain, "b"))), strict=True):
        np.testing.assert_array_equal(mask, expected)
    pae.check(picked)


@pytest.mark.parametrize("rule", [pae.Picking(), TERNARY], ids=["binary", "ternary"])
def test_masks_and_report_count_the_picked_older_weights_and_the_own_ones(make_picked, rule):
    scored = with_scores(pae.prune(make_picked(picking=rule), "b", 0.25), some_hidden)
    for state in (scored, pae.freeze(scored, "b")):
        masks, sees = flatten(pae.masks(state, "b")), 0
        for path, owner in flatten(state.owner).items():
            owner = np.asarray(owner)
            expected = owner == 2
            older = np.flatnonzero(owner == 1)
            expected.ravel()[np.setdiff1d(older, older[::3])] = True
            np.testing.assert_array_equal(masks[path], expected)
            sees += int(expected.sum())
        row = pae.report(state).rows[1]
        assert (row["sharing"], row["sees"]) == ("picked", sees)
        assert sees < 80 - 10


def test_a_picked_older_weight_that_is_used_with_its_sign_turned_is_seen(make_picked):
    state = make_picked(picking=TERNARY)
    turned = with_scores(state, lambda path, scores, owner: some_hidden(path, scores, owner, -0.1))
    assert pae.report(turned).rows[1]["sees"] == pae.report(state).rows[1]["sees"] == 80


def test_a_task_that_does_not_pick_has_no_picks_to_train_and_refuses_a_picking(net, frozen, empty, quick_fit):
    plain = pae.pack(net, frozen, "b", head=2, key=jax.random.key(3))
    first = pae.pack(net, empty, "b", head=2, key=jax.random.key(3), sharing="picked")
    for state in (plain, first):
        with pytest.raises(pae.ArgumentError, match="names what the task does not have: nothing would be trained"):
            quick_fit(state, "b", parts=("pick",))
        _, history = quick_fit(state, "b", optimizer=with_picks(optax.adam(0.01), optax.adam(1e-3)), epochs=1)
        assert set(history.end.params) == {"shared", "local", "head"}
    with pytest.raises(pae.ArgumentError, match=r"picking needs sharing='picked', found sharing='all'"):
        pae.pack(net, frozen, "b", head=2, key=jax.random.key(3), picking=pae.Picking())


def test_dropping_a_task_drops_its_picks_and_the_next_one_starts_afresh(make_picked, quick_fit, picked):
    state, _ = quick_fit(picked, "b")
    dropped = pae.drop(state, "b")
    assert set(dropped.tasks) == {"a"}
    again = make_picked(dropped, "c")
    assert all((np.asarray(p) == np.float32(0.01)).all() for p in jax.tree.leaves(again.tasks["c"].pick))
    pae.check(again)
    pae.verify(again)


# What a pick hides and turns


@pytest.mark.parametrize("rule", [pae.Picking(), TERNARY], ids=["binary", "ternary"])
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_an_older_weight_below_the_threshold_takes_part_in_no_forward_pass(
    net, make_picked, quick_fit, edit_leaf, data, rule, value
):
    """A NaN in a hidden older weight reaches neither logits nor loss, and the task trains on, scores and all."""
    state = with_scores(make_picked(picking=rule), some_hidden)
    spoilt = state
    for path, owner in flatten(state.owner).items():
        where = np.flatnonzero(np.asarray(owner) == 1)[::3]

        def spoil(w):
            w.ravel()[where] = value
            return w

        spoilt = spoilt.replace(shared=edit_leaf(spoilt.shared, path, spoil))
    np.testing.assert_array_equal(pae.predict(net, spoilt, "b", data[0]), pae.predict(net, state, "b", data[0]))
    assert pae.evaluate(net, spoilt, "b", data) == pae.evaluate(net, state, "b", data)
    batches = [(data[0][:8], data[1][:8])]
    tx = with_picks(optax.adam(0.01), optax.sgd(0.01))
    losses = [quick_fit(s, "b", batches, optimizer=tx, epochs=1)[1].rows[0]["loss"] for s in (spoilt, state)]
    assert losses[0] == losses[1]
    trained, _ = quick_fit(spoilt, "b", optimizer=tx)
    for path, scores in pick_of(trained.tasks["b"]).items():
        older = np.asarray(scores).ravel()[np.flatnonzero(np.asarray(flatten(state.owner)[path]) == 1)]
        assert not older[::3].any()
        assert (np.delete(older, np.s_[::3]) != np.float32(0.01)).mean() > 0.5
    assert np.isfinite(pae.predict(net, pae.freeze(trained, "b"), "b", data[0])).all()


def test_a_negative_score_turns_the_sign_of_an_older_weight_if_ternary(net, make_picked, edit_leaf, data, assert_same):
    state = make_picked(picking=TERNARY)
    turned = with_scores(state, lambda path, scores, owner: some_hidden(path, scores, owner, -0.1))
    by_hand = state
    for path, owner in flatten(state.owner).items():
        where = np.flatnonzero(np.asarray(owner) == 1)[::3]

        def turn(w):
            w.ravel()[where] *= -1
            return w

        by_hand = by_hand.replace(shared=edit_leaf(by_hand.shared, path, turn))
    found, expected = (pae.predict(net, s, "b", data[0]) for s in (turned, by_hand))
    assert_same(found, expected)
    assert (np.asarray(found) != np.asarray(pae.predict(net, state, "b", data[0]))).any()


# Learning


def logits_by_hand(module, entry, weights, x):
    params = {**entry.local["params"]}
    params = {name: {**params.get(name, {}), **weights.get(name, {})} for name in params.keys() | weights.keys()}
    out = module.apply({"params": params, "batch_stats": entry.local["batch_stats"]}, x, train=False)
    head = entry.head["params"]
    return out @ head["kernel"] + head["bias"][None]


@pytest.mark.parametrize("rule", [pae.Picking(), TERNARY], ids=["binary", "ternary"])
def test_the_gradient_of_a_score_is_that_of_the_effective_weight_times_the_weight_and_zero_where_nothing_is_older(
    make_picked, quick_fit, vector_module, data, rule
):
    """One step of rate 1 in evaluation mode writes both gradients into scores and own weights."""
    draw = np.random.default_rng(1)
    scores = lambda path, p, owner: draw.choice([-0.1, 0.0, 0.1], p.shape).astype(np.float32)  # noqa: E731
    state = with_scores(pae.prune(make_picked(picking=rule), "b", 0.25), scores)
    entry, (x, y) = state.tasks["b"], (data[0][:8], data[1][:8])
    trained, _ = quick_fit(state, "b", [(x, y)], epochs=1, parts=("shared", "pick"), optimizer=optax.sgd(1.0))

    def factor(p, o):
        sign = (p > 0.005).astype(np.float32) - (p < 0 if rule.ternary else 0)
        return np.where(o == 2, 1.0, np.where(o == 1, sign, 0.0)).astype(np.float32)

    host = jax.tree.map(np.asarray, (entry.pick, state.owner, state.shared))
    used = jax.tree.map(lambda p, o, w: w * factor(p, o), *host)

    def loss(weights):
        logits = logits_by_hand(vector_module(), entry, weights, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    gradient = flatten(jax.grad(loss)(used))
    for path, before in pick_of(entry).items():
        owner, w = (np.asarray(flatten(tree)[path]) for tree in (state.owner, state.shared))
        moved = np.asarray(before) - np.asarray(pick_of(trained.tasks["b"])[path])
        expected = np.where(owner == 1, gradient[path] * w, 0.0)
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(moved, expected, atol=2e-7)
        np.testing.assert_array_equal(moved[owner != 1], 0.0)
        step = w - np.asarray(flatten(trained.shared)[path])
        np.testing.assert_allclose(step, np.where(owner == 2, gradient[path], 0.0), atol=2e-7)


def test_training_picks_alone_lowers_the_loss_and_changes_nothing_but_scores_of_older_weights(
    net, picked, quick_fit, data, assert_same
):
    state, history = quick_fit(picked, "b", epochs=20, parts=("pick",), optimizer=optax.adam(0.002))
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]
    assert pae.evaluate(net, state, "b", data)["loss"] < pae.evaluate(net, picked, "b", data)["loss"]
    old, new = picked.tasks["b"], state.tasks["b"]
    assert_same((state.shared, state.owner, new.local, new.head), (picked.shared, picked.owner, old.local, old.head))
    assert_same(state.tasks["a"].local, picked.tasks["a"].local)
    for path, scores in pick_of(new).items():
        older = np.asarray(flatten(picked.owner)[path]) == 1
        np.testing.assert_array_equal(np.asarray(scores)[~older], np.float32(0.01))
        assert (np.asarray(scores)[older] != np.float32(0.01)).mean() > 0.5
    assert 40 < pae.report(state).rows[1]["sees"] < 80


def test_piggyback_is_a_pretrained_network_whose_second_task_trains_picks_and_head_alone(
    net, vector_module, quick_fit, data, assert_same
):
    variables = vector_module().init(jax.random.key(9), jnp.zeros((1, 4)), train=False)
    state = pae.freeze(pae.pack(net, pae.from_variables(net, variables), "old", head=2, key=jax.random.key(0)), "old")
    options = {"sharing": "picked", "local_init": "old", "allow_empty": True}
    state = pae.pack(net, state, "new", head=2, key=jax.random.key(1), **options)
    tx = with_picks(optax.adam(0.01), optax.adam(1e-3))
    trained, history = quick_fit(state, "new", epochs=20, parts=("head", "pick"), optimizer=tx)
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]
    entry = trained.tasks["new"]
    assert_same((trained.shared, entry.local), (net.split(variables)[0], state.tasks["old"].local))
    frozen = pae.freeze(trained, "new")
    assert_same(pae.predict(net, frozen, "new", data[0]), pae.predict(net, trained, "new", data[0]))
    pae.verify(frozen)
    row = pae.report(frozen).rows[1]
    assert (row["weights"], row["sees"]) == (0, number_of(pae.masks(frozen, "new")))


def test_a_fit_goes_on_with_the_states_of_both_optimizers(picked, quick_fit, data, assert_same):
    batches = [(data[0][i : i + 8], data[1][i : i + 8]) for i in range(0, 32, 8)]
    tx = with_picks(optax.adam(0.01), optax.adam(0.002))
    whole, _ = quick_fit(picked, "b", batches, optimizer=tx, epochs=2)
    part, history = quick_fit(picked, "b", batches, optimizer=tx, epochs=1)
    fresh, _ = quick_fit(part, "b", batches, optimizer=tx, epochs=1)
    rest, _ = quick_fit(part, "b", batches, optimizer=tx, epochs=1, resume=history)
    assert_same((rest.shared, rest.tasks["b"].pick), (whole.shared, whole.tasks["b"].pick))
    first = jax.tree.leaves(fresh.tasks["b"].pick)[0]
    assert (np.asarray(first) != np.asarray(jax.tree.leaves(whole.tasks["b"].pick)[0])).any()
    with pytest.raises(pae.StructureError, match=r"opt_state.*resume= goes on with the same optimizer"):
        quick_fit(part, "b", batches, optimizer=optax.adam(0.01), epochs=1, resume=history)


def test_picks_that_are_no_part_or_get_updates_of_zero_stay_as_they_are(picked, quick_fit, assert_same):
    state, adam = with_scores(picked, some_hidden), optax.adam(0.01)
    still, _ = quick_fit(state, "b", parts=("shared", "local", "head"))
    zero, _ = quick_fit(state, "b", optimizer=with_picks(adam, optax.chain(adam, optax.set_to_zero())))
    late = optax.adam(lambda step: 0.001 * (jnp.asarray(step) >= 5))
    moved, _ = quick_fit(state, "b", optimizer=with_picks(adam, late))
    assert_same(still.tasks["b"].pick, state.tasks["b"].pick)
    assert_same(zero.tasks["b"].pick, state.tasks["b"].pick)
    for new, old in zip(*(jax.tree.leaves(s.tasks["b"].pick) for s in (moved, state)), strict=True):
        assert (np.asarray(new) != np.asarray(old)).any()


def test_picks_whose_optimizer_goes_wrong_end_training_with_the_last_good_ones(picked, quick_fit):
    def update(updates, step, params=None):
        return jax.tree.map(lambda u: jnp.where(step == 3, jnp.nan, u), updates), step + 1

    broken = optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)
    with pytest.raises(pae.DivergedError, match="step 3") as caught:
        quick_fit(picked, "b", optimizer=with_picks(optax.adam(0.01), broken))
    pick = caught.value.state.tasks["b"].pick
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(pick))
    assert any((np.asarray(leaf) != np.float32(0.01)).any() for leaf in jax.tree.leaves(pick))
    pae.check(caught.value.state)


class Narrow(nn.Module):
    """Kernels in bfloat16."""

    width: float = 1.0

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(8, param_dtype=jnp.bfloat16)(x))
        return nn.Dense(6, param_dtype=jnp.bfloat16)(x).astype(jnp.float32)


def test_scores_are_float32_also_where_the_weights_are_bfloat16(quick_fit, data, make_picked):
    net = pae.linen(Narrow, jnp.zeros((1, 4)))
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
    state = pae.freeze(pae.prune(state, "a", 0.5), "a")
    plain = pae.pack(net, state, "b", head=2, key=jax.random.key(2))
    state = pae.pack(net, state, "b", head=2, key=jax.random.key(2), sharing="picked")
    np.testing.assert_array_equal(pae.predict(net, state, "b", data[0]), pae.predict(net, plain, "b", data[0]))
    state, _ = quick_fit(state, "b", net=net, optimizer=with_picks(optax.adam(0.01), optax.adam(1e-3)))
    for path, scores in pick_of(state.tasks["b"]).items():
        assert scores.dtype == jnp.float32
        assert flatten(state.shared)[path].dtype == jnp.bfloat16
        older = np.asarray(flatten(state.owner)[path]) == 1
        assert (np.asarray(scores)[older] != np.float32(0.01)).mean() > 0.5


SAME = optax.sgd(0.1)


@pytest.mark.parametrize(
    "make", [lambda: pae.recipes.Adam(learning_rate=0.01), lambda: SAME], ids=["of the recipes", "of optax"]
)
def test_a_second_picked_task_traces_and_compiles_nothing_anew(
    picked, make_picked, quick_fit, traces, compilations, make
):
    state, _ = quick_fit(picked, "b", optimizer=make(), epochs=1)
    state = make_picked(pae.freeze(pae.prune(state, "b", 0.5), "b"), "c")
    traces.clear()
    with compilations() as found:
        quick_fit(state, "c", optimizer=make())
    assert (traces, found.count) == ([], 0)


# Picks among the task's own weights too

OWN = pae.Picking(top=0.4, own=True)


@pytest.fixture(scope="module")
def masked(make_picked, quick_fit):
    """Task "b" picks among the weights of "a" and its own; scores and weights trained together."""
    return quick_fit(make_picked(picking=OWN), "b", optimizer=with_picks(optax.adam(0.01), optax.adam(0.01)))[0]


def test_a_task_that_picks_among_its_own_weights_sees_the_top_share_of_each_leaf(masked):
    for path, seen in flatten(pae.masks(masked, "b")).items():
        scores, owner = np.asarray(pick_of(masked.tasks["b"])[path]), np.asarray(flatten(masked.owner)[path])
        assert (owner > 0).all()
        assert int(np.asarray(seen).sum()) == round(0.4 * owner.size)
        assert scores[np.asarray(seen)].min() >= scores[~np.asarray(seen)].max()


def test_wsn_kang_et_al_2022_trains_scores_and_free_weights_together_and_never_an_older_weight(
    make_picked, masked, assert_same
):
    before = make_picked(picking=OWN)
    for path, owner in flatten(masked.owner).items():
        old = np.asarray(owner) == 1
        w, start = (np.asarray(flatten(s.shared)[path]) for s in (masked, before))
        np.testing.assert_array_equal(w[old], start[old])
        moved = np.asarray(pick_of(masked.tasks["b"])[path]) != np.asarray(pick_of(before.tasks["b"])[path])
        assert (w[~old] != start[~old]).mean() > 0.3
        assert moved[old].mean() > 0.5 and moved[~old].mean() > 0.3
    assert_same(masked.tasks["a"].local, before.tasks["a"].local)


def test_wsn_kang_et_al_2022_passes_the_gradient_of_a_masked_weight_to_its_score_and_if_picked_and_own_to_it(
    make_picked, quick_fit, vector_module, data
):
    """One step of rate 1 in evaluation mode writes both gradients; scores of hidden weights learn too."""
    state, (x, y) = make_picked(picking=OWN), (data[0][:8], data[1][:8])
    entry = state.tasks["b"]
    trained, _ = quick_fit(state, "b", [(x, y)], epochs=1, parts=("shared", "pick"), optimizer=optax.sgd(1.0))
    masks = pae.masks(state, "b")
    used = jax.tree.map(lambda w, m: jnp.where(m, w, 0.0), state.shared, masks)

    def loss(weights):
        logits = logits_by_hand(vector_module(), entry, weights, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    gradient, seen = flatten(jax.grad(loss)(used)), flatten(masks)
    for path, before in pick_of(entry).items():
        w, owner = (np.asarray(flatten(tree)[path]) for tree in (state.shared, state.owner))
        moved = np.asarray(before) - np.asarray(pick_of(trained.tasks["b"])[path])
        np.testing.assert_allclose(moved, gradient[path] * w, atol=2e-7)
        assert np.abs(moved[~np.asarray(seen[path])]).max() > 1e-4
        step = w - np.asarray(flatten(trained.shared)[path])
        np.testing.assert_allclose(step, np.where((owner == 2) & seen[path], gradient[path], 0.0), atol=2e-7)


def test_freeze_releases_own_weights_that_are_not_picked_and_the_task_computes_the_same(net, masked, data, assert_same):
    seen, frozen = flatten(pae.masks(masked, "b")), pae.freeze(masked, "b")
    for path, owner in flatten(frozen.owner).items():
        before = np.asarray(flatten(masked.owner)[path])
        expected = np.where((before == 2) & ~np.asarray(seen[path]), 0, before)
        np.testing.assert_array_equal(owner, expected)
        assert not np.asarray(flatten(frozen.shared)[path])[expected == 0].any()
    assert_same(pae.masks(frozen, "b"), pae.masks(masked, "b"))
    assert_same(pae.predict(net, frozen, "b", data[0]), pae.predict(net, masked, "b", data[0]))
    assert 0.0 < pae.free_fraction(frozen) < 0.5
    pae.check(frozen, net)
    pae.verify(frozen)


def test_a_hidden_own_weight_takes_part_in_no_forward_pass_by_any_road(net, masked, edit_leaf, data, assert_same):
    changed = masked
    for path, seen in flatten(pae.masks(masked, "b")).items():
        hidden = (np.asarray(flatten(masked.owner)[path]) == 2) & ~np.asarray(seen)
        assert hidden.any()
        changed = changed.replace(shared=edit_leaf(changed.shared, path, lambda w, h=hidden: np.where(h, 7.0, w)))
    for state in (masked, changed):
        module, variables = pae.as_flax(net, state, "b")
        for found in (module.apply(variables, data[0], train=False), pae.predict(net, state, "b", data[0])):
            np.testing.assert_allclose(found, pae.predict(net, masked, "b", data[0]), rtol=1e-5, atol=1e-6)


def test_any_trainer_gets_hidden_own_weights_as_0_and_may_not_train_them(net, masked, assert_same):
    variables = pae.task_variables(net, masked, "b")
    params = {part: variables[part]["params"] for part in ("backbone", "head")}
    tx = optax.chain(optax.sgd(1.0), pae.gate(net, masked, "b"))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    gated = {part: {**variables[part], "params": moved[part]} for part in params}
    state = pae.commit(net, masked, "b", gated)
    for path, seen in flatten(pae.masks(masked, "b")).items():
        before, after = (np.asarray(flatten(s.shared)[path]) for s in (masked, state))
        mine = (np.asarray(flatten(masked.owner)[path]) == 2) & np.asarray(seen)
        np.testing.assert_allclose(after[mine], before[mine] - 1, rtol=1e-6)
        np.testing.assert_array_equal(after[~mine], before[~mine])
    assert_same(state.owner, masked.owner)
    free = jax.tree.map(lambda w: w - 1, params)
    with pytest.raises(pae.ForgettingError, match="that it does not own have changed"):
        pae.commit(net, masked, "b", {part: {**variables[part], "params": free[part]} for part in free})


def test_the_first_task_picks_among_its_own_weights_and_is_stored_in_every_phase(
    net, empty, quick_fit, data, tmp_path, assert_same
):
    state = pae.pack(net, empty, "a", head=2, key=jax.random.key(1), sharing="picked", picking=OWN)
    trained, _ = quick_fit(state, "a", optimizer=with_picks(optax.adam(0.01), optax.adam(0.01)))
    frozen = pae.freeze(trained, "a")
    assert frozen.tasks["a"].pick is None
    assert pae.free_fraction(frozen) == pytest.approx(0.6, abs=0.02)
    for name, one in {"trained": trained, "frozen": frozen}.items():
        pae.check(one, net)
        pae.save(tmp_path / name, one)
        again = pae.load(net, tmp_path / name)
        assert_same((again.shared, again.owner, again.tasks["a"].pick), (one.shared, one.owner, one.tasks["a"].pick))
        assert_same(pae.predict(net, again, "a", data[0]), pae.predict(net, one, "a", data[0]))
    pae.verify(frozen)
    later = pae.pack(net, frozen, "b", head=2, key=jax.random.key(2), sharing="picked", picking=OWN)
    assert_same(pae.predict(net, pae.freeze(later, "b"), "a", data[0]), pae.predict(net, frozen, "a", data[0]))


def test_a_bundle_of_tasks_that_picked_among_their_own_weights_comes_back(net, masked, data, tmp_path, assert_same):
    frozen = pae.freeze(masked, "b")
    pae.write_bundle(tmp_path / "all.safetensors", net, frozen)
    again = pae.read_bundle(net, tmp_path / "all.safetensors")
    for task in "ab":
        assert_same(pae.predict(net, again, task, data[0]), pae.predict(net, frozen, task, data[0]))


@pytest.mark.parametrize("rule", [pae.Picking(), pae.Picking(top=0.5), OWN], ids=["threshold", "top", "own"])
def test_picks_may_start_from_the_weights_of_an_older_task(net, masked, make_picked, rule):
    frozen = pae.freeze(masked, "b")
    state = make_picked(frozen, "c", picking=rule, picks_from="b")
    for path, seen in flatten(pae.masks(frozen, "b")).items():
        scores, seen = np.asarray(pick_of(state.tasks["c"])[path]), np.asarray(seen)
        assert scores[seen].min() > scores[~seen].max()
    with pytest.raises(pae.UnknownTaskError):
        make_picked(frozen, "c", picks_from="z")
    with pytest.raises(pae.ArgumentError, match="picks_from needs sharing='picked' and goes without ternary"):
        make_picked(frozen, "c", picks_from="b", picking=TERNARY)


# freeze, verify, check


@pytest.mark.parametrize("rule", [pae.Picking(), TERNARY], ids=["binary", "ternary"])
def test_freeze_turns_scores_into_signs_and_zeros_where_nothing_is_older(make_picked, rule):
    draw = np.random.default_rng(1)
    scores = lambda path, p, owner: draw.choice([-0.1, 0.0, 0.1], p.shape).astype(np.float32)  # noqa: E731
    state = with_scores(pae.prune(make_picked(picking=rule), "b", 0.25), scores)
    frozen = pae.freeze(state, "b")
    for path, signs in pick_of(frozen.tasks["b"]).items():
        older = np.asarray(flatten(state.owner)[path]) == 1
        p = np.asarray(pick_of(state.tasks["b"])[path])
        expected = (p > 0.005).astype(np.int8) - (p < 0 if rule.ternary else 0)
        assert signs.dtype == (jnp.int8 if rule.ternary else jnp.bool_)
        np.testing.assert_array_equal(signs, np.where(older, expected, 0))
    pae.check(frozen)
    pae.verify(frozen)


@pytest.mark.parametrize("rule", [pae.Picking(), TERNARY], ids=["binary", "ternary"])
def test_verify_finds_every_changed_sign_of_a_frozen_task_and_names_it(make_picked, edit_leaf, rule):
    state = pae.freeze(with_scores(make_picked(picking=rule), some_hidden), "b")
    entry = state.tasks["b"]
    for path, signs in pick_of(entry).items():
        for index in range(0, signs.size, 5):

            def change(s):
                s.ravel()[index] = 1 - s.ravel()[index]
                return s

            damaged = entry.replace(pick=edit_leaf(entry.pick, path, change))
            with pytest.raises(pae.ForgettingError, match=f"task 'b' is frozen, but 'pick/{path}' is no longer"):
                pae.verify(state.replace(tasks={**state.tasks, "b": damaged}))
    gone = state.replace(tasks={**state.tasks, "b": entry.replace(pick=None)})
    with pytest.raises(pae.ForgettingError, match="task 'b' is frozen, but 'pick/"):
        pae.verify(gone)
    other = state.replace(tasks={**state.tasks, "b": entry.replace(picking=pae.Picking(0.001))})
    with pytest.raises(pae.ForgettingError, match="task 'b' is frozen, but 'settings'"):
        pae.verify(other)


BROKEN = {
    "scores of another dtype": (
        lambda e: {"pick": jax.tree.map(lambda p: p.astype(jnp.bfloat16), e.pick)},
        r"pick of task 'b', leaf 'Dense_0/kernel': found bfloat16\[4,8\], expected float32\[4,8\]",
    ),
    "signs before the freeze": (lambda e: {"pick": e.picking.signs(e.pick)}, r"found bool\[4,8\], expected float32"),
    "another shape": (
        lambda e: {"pick": jax.tree.map(lambda p: p[:1], e.pick)},
        r"found float32\[1,8\], expected float32\[4,8\]",
    ),
    "a leaf missing": (
        lambda e: {"pick": {"Dense_0": e.pick["Dense_0"]}},
        "leaf 'Dense_1/kernel': found nothing, expected float32",
    ),
    "no scores at all": (lambda e: {"pick": None}, "pick of task 'b': found nothing, expected a pick tree"),
    "no picking": (lambda e: {"picking": None}, "sharing 'picked' with None, expected picking if and only if picked"),
    "another sharing": (lambda e: {"sharing": "all"}, "sharing 'all' with Picking"),
    "scores without picking": (
        lambda e: {"sharing": "all", "picking": None},
        "found a pick tree, expected none, because sharing is 'all'",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_check_finds_picks_that_do_not_fit_the_weights_or_the_sharing(picked, name, tmp_path):
    change, message = BROKEN[name]
    entry = picked.tasks["b"]
    broken = picked.replace(tasks={**picked.tasks, "b": entry.replace(**change(entry))})
    for call in (lambda: pae.check(broken), lambda: pae.save(tmp_path / "stage", broken)):
        with pytest.raises(pae.StructureError, match=message):
            call()
    assert not (tmp_path / "stage").exists()


# A wider network


def test_picks_keep_to_their_own_width_when_the_network_grows(net, make_picked, data, assert_same, tmp_path):
    draw = np.random.default_rng(1)
    scores = lambda path, p, owner: draw.choice([-0.1, 0.0, 0.1], p.shape).astype(np.float32)  # noqa: E731
    state = pae.freeze(pae.prune(with_scores(make_picked(picking=TERNARY), scores), "b", 0.25), "b")
    seen, wanted = number_of(pae.masks(state, "b")), pae.predict(net, state, "b", data[0])
    assert 30 < seen < 70
    grown = make_picked(pae.expand(net, state, width=1.5, key=jax.random.key(6)), "c")
    pae.save(tmp_path / "stage", grown)
    for wide in (grown, pae.load(net, tmp_path / "stage")):
        assert_same(pae.predict(net, wide, "b", data[0]), wanted)
        assert_same(wide.tasks["b"].pick, state.tasks["b"].pick)
        assert number_of(pae.masks(wide, "b")) == pae.report(wide).rows[1]["sees"] == seen
        for mask, owner in zip(*map(jax.tree.leaves, (pae.masks(wide, "b"), wide.owner)), strict=True):
            assert not (np.asarray(mask) & (np.asarray(owner) == 3)).any()
        shapes = [w.shape for w in jax.tree.leaves(wide.shared)]
        assert [p.shape for p in jax.tree.leaves(wide.tasks["c"].pick)] == shapes
        pae.check(wide)
        pae.verify(wide)
