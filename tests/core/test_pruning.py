"""Law 7 against a plain sort, and the cubic schedule."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import pae_jax as pae
from pae_jax.core.state import State, TaskState
from pae_jax.trees import flatten

SHAPES = {
    "a": ((5, 4), np.float32),
    "b": ((3, 3), ml_dtypes.bfloat16),
    "c": ((2, 2, 3), np.float16),
    "d": ((1, 1), np.float32),
}
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-40, -1e-40, 1e-45, 6e-8, -6e-8, 1e38, 65504.0, np.inf, -np.inf, np.nan]
FRACTIONS = st.one_of(st.sampled_from([0.0, 1.0, 0.5, 0.25, 1 / 3, 1e-9, 1 - 1e-9]), st.floats(0.0, 1.0))


def state_of(shared, owner):
    """A frozen task 1 and the newest task 2 over hand-made arrays."""
    tasks = {
        name: TaskState(
            local={},
            head={},
            id=i,
            width=1.0,
            head_spec=2,
            layout="{}",
            digests=jnp.zeros((1 + len(shared), 32), jnp.uint8 if i == 1 else bool),
        )
        for i, name in ((1, "old"), (2, "new"))
    }
    return State(
        shared=jax.tree.map(jnp.asarray, shared), owner=jax.tree.map(jnp.asarray, owner), tasks=tasks, width=1.0
    )


@st.composite
def networks(draw):
    """Weights with many ties, zeros of both signs, denormals, infinities and NaN, and any owners 0, 1, 2."""
    shared, owner = {}, {}
    for name, (shape, dtype) in SHAPES.items():
        numbers = st.one_of(st.sampled_from(SPECIAL), st.floats(-2, 2, width=16))
        with np.errstate(over="ignore"):
            shared[name] = draw(hnp.arrays(np.float32, shape, elements=numbers)).astype(dtype)
        owner[name] = draw(hnp.arrays(np.int8, shape, elements=st.integers(0, 2)))
        shared[name][owner[name] == 0] = 0
    return shared, owner


def expected_owner(shared, owner, fraction, scope, of):
    """Sort and count, in plain NumPy: the specification of `prune`."""
    names = sorted(owner)
    groups = [names] if scope == "global" else [[name] for name in names]
    result = {name: leaf.copy() for name, leaf in owner.items()}
    for group in groups:
        ids = np.concatenate([owner[name].ravel() for name in group])
        size = np.abs(np.concatenate([shared[name].astype(np.float64).ravel() for name in group]))
        own, free = int((ids == 2).sum()), int((ids == 0).sum())
        count = round(fraction * own) if of == "own" else max(round(fraction * (own + free)) - free, 0)
        mine = np.flatnonzero(ids == 2)
        ids[mine[np.lexsort((mine, size[mine]))][:count]] = 0  # lexsort puts NaN last
        for name in group:
            result[name], ids = ids[: owner[name].size].reshape(owner[name].shape), ids[owner[name].size :]
    return result


@pytest.mark.parametrize("of", ["available", "own"])
@pytest.mark.parametrize("scope", ["leaf", "global"])
@given(networks(), FRACTIONS)
@settings(max_examples=150, deadline=None)
def test_prune_frees_exactly_the_rounded_share_smallest_first_ties_by_index(scope, of, network, fraction):
    shared, owner = network
    state = pae.prune(state_of(shared, owner), "new", fraction, scope=scope, of=of)
    wanted = expected_owner(shared, owner, fraction, scope, of)
    for name in SHAPES:
        found = np.asarray(state.owner[name])
        assert found.dtype == np.int8
        np.testing.assert_array_equal(found, wanted[name], err_msg=name)
        freed = (found == 0) & (owner[name] == 2)
        kept = ~freed
        weights = np.asarray(state.shared[name])
        assert weights.dtype == SHAPES[name][1]
        assert weights[kept].tobytes() == shared[name][kept].tobytes()
        assert not weights[freed].astype(np.float32).any()
        assert not np.signbit(weights[freed].astype(np.float32)).any()


@given(st.integers(0, 80), st.integers(0, 80), FRACTIONS)
@settings(max_examples=60, deadline=None)
def test_prune_counts_by_pythons_round_of_the_fraction_times_the_available_weights(own, free, fraction):
    ids = np.ones((9, 20), np.int8)
    ids.ravel()[: own + free] = [2] * own + [0] * free
    state = state_of({"w": np.ones((9, 20), np.float32)}, {"w": ids})
    after = pae.prune(state, "new", fraction)
    assert int((after.owner["w"] == 0).sum()) == max(round(fraction * (own + free)), free)
    of_own = pae.prune(state, "new", fraction, of="own")
    assert int((of_own.owner["w"] == 0).sum()) == round(fraction * own) + free


def test_prune_breaks_ties_among_a_thousand_equal_weights_by_index():
    values = np.full((40, 50), -0.25, np.float32)
    values[3, 7] = 0.1
    state = state_of(
        {"w": values, "z": np.full((4, 4), 0.25, np.float32)},
        {"w": np.full((40, 50), 2, np.int8), "z": np.full((4, 4), 2, np.int8)},
    )
    leaf = pae.prune(state, "new", 0.25)
    np.testing.assert_array_equal(np.flatnonzero(leaf.owner["w"] == 0), range(500))
    np.testing.assert_array_equal(np.flatnonzero(leaf.owner["z"] == 0), range(4))
    together = pae.prune(state, "new", 1001 / 2016, scope="global")
    np.testing.assert_array_equal(np.flatnonzero(together.owner["w"] == 0), range(1001))
    assert int((together.owner["z"] == 0).sum()) == 0
    nearly = pae.prune(state, "new", 2003 / 2016, scope="global")
    assert int((nearly.owner["w"] == 0).sum()) == 2000
    np.testing.assert_array_equal(np.flatnonzero(nearly.owner["z"] == 0), range(3))
    few = pae.prune(state, "new", 10 / 2000)
    np.testing.assert_array_equal(np.flatnonzero(few.owner["w"] == 0), [*range(9), 3 * 50 + 7])


def test_prune_to_less_than_is_free_already_changes_nothing(assert_same):
    rng = np.random.default_rng(0)
    state = state_of({"w": rng.normal(size=(9, 20)).astype(np.float32)}, {"w": np.full((9, 20), 2, np.int8)})
    half = pae.prune(state, "new", 0.5)
    for fraction in (0.0, 0.3, 0.5):
        for scope in ("leaf", "global"):
            again = pae.prune(half, "new", fraction, scope=scope)
            assert_same((again.shared, again.owner), (half.shared, half.owner))
    assert int((pae.prune(half, "new", 0.5, of="own").owner["w"] == 0).sum()) == 90 + 45


def test_prune_in_steps_ends_where_one_prune_does_while_nothing_trains_in_between(assert_same):
    rng = np.random.default_rng(0)
    state = state_of({"w": rng.normal(size=(9, 20)).astype(np.float32)}, {"w": np.full((9, 20), 2, np.int8)})
    stepwise = state
    for fraction in (0.1, 0.37, 0.8):
        stepwise = pae.prune(stepwise, "new", fraction)
    at_once = pae.prune(state, "new", 0.8)
    assert_same((stepwise.shared, stepwise.owner), (at_once.shared, at_once.owner))


def test_prune_all_leaves_the_older_task_alone_and_the_newest_nothing():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 3, (9, 20)).astype(np.int8)
    state = pae.prune(state_of({"w": np.ones((9, 20), np.float32)}, {"w": ids}), "new", 1.0)
    np.testing.assert_array_equal(state.owner["w"], np.where(ids == 1, 1, 0))


@pytest.mark.parametrize("fraction", [-0.001, 1.001, 50, math.nan, math.inf, -math.inf, "half", "0.5", True, None])
def test_prune_refuses_a_fraction_outside_zero_to_one_and_says_what_a_fraction_is(packed, fraction):
    with pytest.raises(pae.ArgumentError, match=r"fraction must .*\[0, 1\]"):
        pae.prune(packed, "a", fraction)


def test_prune_refuses_another_scope_or_denominator_and_lists_the_choices(packed):
    with pytest.raises(pae.ArgumentError, match="scope must be one of 'leaf', 'global', found 'layer'"):
        pae.prune(packed, "a", 0.5, scope="layer")
    with pytest.raises(pae.ArgumentError, match="of must be one of 'available', 'own', found 'all'"):
        pae.prune(packed, "a", 0.5, of="all")


def test_prune_refuses_unknown_and_frozen_tasks(frozen, empty):
    with pytest.raises(pae.UnknownTaskError, match="unknown task 'z'; the state has: 'a'"):
        pae.prune(frozen, "z", 0.5)
    with pytest.raises(pae.PhaseError, match="prune cannot be called now: task 'a' is frozen"):
        pae.prune(frozen, "a", 0.5)
    with pytest.raises(pae.UnknownTaskError, match="none yet"):
        pae.prune(empty, "a", 0.5)


# Traced


@pytest.mark.parametrize("of", ["available", "own"])
@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_prune_inside_jit_with_a_traced_fraction_frees_exactly_what_it_does_outside(scope, of, assert_same):
    rng = np.random.default_rng(0)
    shapes = {"a": (7, 9), "b": (1, 1), "c": (5, 4, 3), "d": (100,), "e": (33, 31)}
    shared = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    owner = {name: rng.integers(0, 3, shape).astype(np.int8) for name, shape in shapes.items()}
    for name, ids in owner.items():
        shared[name][ids == 0] = 0
    state = state_of(shared, owner)
    traced = jax.jit(lambda state, fraction: pae.prune(state, "new", fraction, scope=scope, of=of))
    for fraction in (0.0, *(i / 20 for i in range(1, 20)), 1 / 3, 2 / 3, 1e-3, 0.999, 0.123456, 1.0):
        wanted = pae.prune(state, "new", fraction, scope=scope, of=of)
        assert_same(wanted.owner, expected_owner(shared, owner, fraction, scope, of))
        assert_same(traced(state, fraction), wanted)
        fixed = jax.jit(lambda state, f=fraction: pae.prune(state, "new", f, scope=scope, of=of))
        if fraction in (0.1, 1 / 3, 0.999):
            assert_same(fixed(state), wanted)
    for outside, inside in ((-0.5, 0.0), (1.5, 1.0), (np.nan, 0.0)):
        assert_same(traced(state, outside), pae.prune(state, "new", inside, scope=scope, of=of))


def test_prune_and_the_free_fraction_may_be_shaped_without_being_computed(packed):
    def life(state, fraction):
        state = pae.prune(state, "a", fraction)
        return state, pae.free_fraction(state)

    found, free = jax.eval_shape(life, packed, 0.5)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), packed
    )
    assert (free.shape, free.dtype) == ((), jnp.float32)
    assert float(jax.jit(life)(packed, 0.5)[1]) == 0.5


# The cubic schedule


@st.composite
def schedules(draw):
    final = draw(st.floats(0, 1))
    begin = draw(st.integers(0, 50))
    end = begin + draw(st.integers(0, 60))
    every = draw(st.integers(1, 20))
    return pae.CubicSchedule(final=final, end=end, initial=draw(st.floats(0, final)), begin=begin, every=every)


@given(schedules())
@settings(max_examples=100, deadline=None)
def test_a_cubic_schedule_never_falls_starts_at_initial_and_ends_exactly_at_final(schedule):
    values = [schedule(step) for step in range(schedule.end + 10)]
    assert all(a <= b for a, b in itertools.pairwise(values))
    assert all(0 <= v <= 1 for v in values)
    assert values[schedule.end :] == [schedule.final] * 10
    if schedule.begin < schedule.end:
        assert values[: schedule.begin + 1] == pytest.approx([schedule.initial] * (schedule.begin + 1), abs=1e-15)


@given(schedules())
@settings(max_examples=100, deadline=None)
def test_a_cubic_schedule_updates_at_its_end_and_every_so_many_steps_from_its_begin(schedule):
    steps = [step for step in range(schedule.end + 30) if schedule.updates_at(step)]
    assert steps == sorted({*range(schedule.begin, schedule.end + 1, schedule.every), schedule.end})


def test_a_cubic_schedule_follows_the_formula_of_zhu_and_gupta():
    schedule = pae.CubicSchedule(final=0.8, initial=0.2, begin=10, end=50)
    assert schedule(30) == pytest.approx(0.8 + (0.2 - 0.8) * (1 - 20 / 40) ** 3)


@pytest.mark.parametrize(
    "schedule",
    [
        pae.CubicSchedule(final=0.8, initial=0.2, begin=10, end=50, every=7),
        pae.CubicSchedule(final=0.6, end=9, every=3),
        pae.CubicSchedule(final=0.7, initial=0.1, begin=20, end=20),
    ],
    ids=str,
)
def test_a_cubic_schedule_of_a_traced_step_has_the_same_values_as_of_a_number(schedule):
    steps = jnp.arange(60)
    found, due = jax.jit(jax.vmap(lambda step: (schedule(step), schedule.updates_at(step))))(steps)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.asarray([schedule(step) for step in range(60)], np.float32))
    np.testing.assert_array_equal(due, [schedule.updates_at(step) for step in range(60)])
    assert schedule(steps[15]) == schedule(15) and isinstance(schedule(steps[15]), float)


def test_a_cubic_schedule_prunes_inside_jit_by_the_step_of_the_train_state(net, packed, assert_same):
    schedule = pae.CubicSchedule(final=0.6, end=5, every=1)
    ts = pae.TrainState.create(net, packed, "a", tx=optax.sgd(0.1))
    release = jax.jit(
        lambda ts: jax.lax.cond(schedule.updates_at(ts.step), lambda: ts.prune(schedule(ts.step)), lambda: ts)
    )
    for step in range(7):
        wanted = ts.prune(schedule(step)) if step <= 5 else ts
        found = release(ts)
        assert_same(found.commit(net, packed), wanted.commit(net, packed))
        ts = found.apply_gradients(grads=jax.tree.map(jnp.zeros_like, ts.params))


@pytest.mark.parametrize(
    "change",
    [
        {"final": 1.5},
        {"final": math.nan},
        {"initial": 0.9},
        {"initial": -0.1},
        {"begin": 101},
        {"begin": -1},
        {"begin": 0.5},
        {"end": 15.5},
        {"end": -1},
        {"every": 0},
        {"scope": "layer"},
    ],
    ids=str,
)
def test_a_cubic_schedule_refuses_values_out_of_range_by_name(change):
    with pytest.raises(pae.ArgumentError, match=next(iter(change))):
        pae.CubicSchedule(**{"final": 0.5, "end": 100, **change})


@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_gradual_pruning_in_fit_ends_with_exactly_the_final_count_and_zeros_in_the_free_weights(
    net, packed, quick_fit, scope
):
    schedule = pae.CubicSchedule(final=0.7, end=8, every=3, scope=scope)
    state, _ = quick_fit(packed, "a", pruning=schedule, epochs=2, optimizer=optax.adam(0.01))
    counts = [int((o == 0).sum()) for o in jax.tree.leaves(state.owner)]
    sizes = [o.size for o in jax.tree.leaves(state.owner)]
    if scope == "leaf":
        assert counts == [round(0.7 * n) for n in sizes]
    assert sum(counts) == round(0.7 * sum(sizes))
    for path, w in flatten(state.shared).items():
        assert not np.asarray(w)[np.asarray(flatten(state.owner)[path]) == 0].any()
    pae.check(state)


def test_gradual_pruning_takes_the_steps_that_the_schedule_names(net, packed, quick_fit, data):
    """Five steps under the schedule equal two, a prune, three and a prune, by hand with the optimizer carried on.

    `fit` does not resume after a prune; here both the state and the train state it would go on with are pruned.
    """
    schedule = pae.CubicSchedule(final=0.6, end=5, begin=2, every=3, initial=0.3)
    assert [s for s in range(7) if schedule.updates_at(s)] == [2, 5]
    batches = [(data[0][i * 8 : i * 8 + 8], data[1][i * 8 : i * 8 + 8]) for i in range(5)]
    state, _ = quick_fit(packed, "a", batches, epochs=1, pruning=schedule)
    by_hand, history = quick_fit(packed, "a", batches[:2], epochs=1)
    by_hand = pae.prune(by_hand, "a", schedule(2))
    with pytest.raises(pae.ArgumentError, match="pruned or packed since that fit"):
        quick_fit(by_hand, "a", batches[2:], epochs=1, resume=history)
    history = dataclasses.replace(history, end=history.end.prune(schedule(2)))
    by_hand, history = quick_fit(by_hand, "a", batches[2:], epochs=1, resume=history)
    assert int(history.end.step) == 5
    by_hand = pae.prune(by_hand, "a", schedule(5))
    for found, wanted in zip(jax.tree.leaves(state.shared), jax.tree.leaves(by_hand.shared), strict=True):
        np.testing.assert_array_equal(found, wanted)
