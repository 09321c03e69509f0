"""Laws 1 to 6 and 9 across the whole life of a network; law 7 is in test_pruning.py, law 11 in test_compilation.py."""

import functools
import itertools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import pae_jax as pae
from pae_jax.training.train_state import transformation
from pae_jax.trees import flatten

same_numbers = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-5)
"""What two different programs may compute differs by rounding."""

NOISE_KEY = jax.random.key(7)
SLOW = optax.linear_schedule(0.05, 0.01, 20)
OPTIMIZERS = {
    "sgd, weight decay, nesterov": lambda: optax.chain(
        optax.add_decayed_weights(0.1), optax.sgd(0.05, momentum=0.9, nesterov=True)
    ),
    "adam": lambda: optax.adam(0.05, eps=0.1),
    "adamw": lambda: optax.adamw(SLOW, weight_decay=0.1),
    "lamb": lambda: optax.lamb(0.05, weight_decay=0.1),
    "lion": lambda: optax.lion(0.01, weight_decay=0.1),
    "adafactor": lambda: optax.adafactor(0.05, min_dim_size_to_factor=2, weight_decay_rate=0.1),
    "ema of the updates": lambda: optax.chain(optax.adam(0.05), optax.ema(0.9, debias=False)),
    "pull to an average of the params": lambda: pulled_to_average(0.2),
    "clip_by_global_norm": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0, momentum=0.9)),
    "MultiSteps": lambda: optax.MultiSteps(optax.adamw(0.05, weight_decay=0.1), every_k_schedule=2),
    "reduce_on_plateau": lambda: optax.chain(optax.adam(0.05), optax.contrib.reduce_on_plateau(factor=0.5, patience=4)),
    "noise on every parameter": lambda: optax.chain(optax.sgd(0.05), optax.add_noise(0.1, 0.5, NOISE_KEY)),
}


def pulled_to_average(rate):
    """An optimizer that moves every parameter it is shown to an average of its past, gradient or not."""

    def init(params):
        return jax.tree.map(lambda p: p + 1.0, params)

    def update(grads, average, params):
        average = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, average, params)
        return jax.tree.map(lambda g, a, p: -rate * g + rate * (a - p), grads, average, params), average

    return optax.GradientTransformation(init, update)


def with_picks(weights, picks):
    """One optimizer that trains the scores of picks by another chain than everything else."""
    label = lambda params: {part: "pick" if part == "pick" else "rest" for part in params}  # noqa: E731
    return optax.partition({"rest": transformation(weights), "pick": transformation(picks)}, label)


@jax.jit
def step(ts, x, y):
    def loss(params):
        out, updates = ts.apply_fn(params, x, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(out, y).mean(), updates

    (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(ts.params)
    return ts.apply_gradients(grads=grads, updates=updates, value=value)


def trained(ts, data, epochs=2, size=8):
    """Take steps of one's own, in the order of the data."""
    for _ in range(epochs):
        for start in range(0, len(data[0]), size):
            ts = step(ts, data[0][start : start + size], data[1][start : start + size])
    return ts


def tasks_but(state, task):
    return {name: (entry.local, entry.head) for name, entry in state.tasks.items() if name != task}


def at_owner(state, test):
    """Return per leaf the bytes of the weights whose owner passes a test."""
    shared, owner = flatten(state.shared), flatten(state.owner)
    return {path: np.asarray(w)[test(np.asarray(owner[path]))].tobytes() for path, w in shared.items()}


def free_values(state):
    leaves = zip(jax.tree.leaves(state.shared), jax.tree.leaves(state.owner), strict=True)
    return np.concatenate([np.asarray(w)[np.asarray(o) == 0] for w, o in leaves])


@pytest.fixture(scope="module")
def two_frozen(net, packed, quick_fit, data):
    """Old task "a" and a second one packed, with a -0.0 among the old weights."""
    state, _ = quick_fit(packed, "a")
    state = pae.freeze(pae.prune(state, "a", 0.5), "a")
    return pae.pack(net, state, "b", head=2, key=jax.random.key(3))


@pytest.fixture(scope="module", params=OPTIMIZERS, ids=lambda name: name.replace(" ", "_"))
def carried(request, net, two_frozen, quick_fit, data):
    """Tasks a, b old and c trained, by one optimizer whose state went from b to c on purpose."""
    tx = OPTIMIZERS[request.param]()
    ts = trained(pae.TrainState.create(net, two_frozen, "b", tx=tx), data).prune(0.25)
    pruned, ts = ts.commit(net, two_frozen), trained(ts, data)
    again = ts.commit(net, two_frozen)
    before = pae.pack(net, pae.freeze(again, "b"), "c", head=2, key=jax.random.key(6))
    other = pae.TrainState.create(net, before, "c", tx=tx).replace(opt_state=ts.opt_state)
    after = trained(other, data).commit(net, before)
    fitted, _ = quick_fit(before, "c", optimizer=tx, key=7)
    return {"first": two_frozen, "pruned": pruned, "again": again, "before": before, "after": after, "fitted": fitted}


def test_old_weights_local_variables_and_heads_are_bit_identical_under_any_optimizer(carried, assert_same):
    for old, new, task, task_id in (
        (carried["first"], carried["again"], "b", 2),
        (carried["before"], carried["after"], "c", 3),
        (carried["before"], carried["fitted"], "c", 3),
    ):
        assert at_owner(old, lambda o: (o > 0) & (o < task_id)) != at_owner(new, lambda o: o == task_id)
        older = {p: np.asarray(o) for p, o in flatten(old.owner).items()}
        for path, w in flatten(new.shared).items():
            mask = (older[path] > 0) & (older[path] < task_id)
            assert mask.any()
            assert np.asarray(w)[mask].tobytes() == np.asarray(flatten(old.shared)[path])[mask].tobytes(), path
        assert_same(tasks_but(new, task), tasks_but(old, task))
        pae.verify(new)


def test_the_newest_task_does_train_under_any_optimizer(carried):
    before = carried["before"]
    for after in (carried["after"], carried["fitted"]):
        for path, w in flatten(after.shared).items():
            own = np.asarray(flatten(after.owner)[path]) == 3
            assert (np.asarray(w) != np.asarray(flatten(before.shared)[path]))[own].mean() > 0.5, path
        heads = (jax.tree.leaves(state.tasks["c"].head) for state in (before, after))
        assert all((np.asarray(old) != np.asarray(new)).any() for old, new in zip(*heads, strict=True))


def test_predictions_of_old_tasks_are_bit_identical_under_any_optimizer(carried, net, data, assert_same):
    x, _ = data
    old_a = pae.predict(net, carried["first"], "a", x)
    old_b = pae.predict(net, carried["before"], "b", x)
    for after in (carried["after"], carried["fitted"]):
        assert_same(pae.predict(net, after, "a", x), old_a)
        assert_same(pae.predict(net, after, "b", x), old_b)


def test_a_pruned_weight_stays_exactly_zero_while_its_task_trains_on_with_carried_momentum(carried, assert_same):
    pruned, again = carried["pruned"], carried["again"]
    assert_same(again.owner, pruned.owner)
    values = free_values(again)
    assert values.size == 10
    assert not values.any()
    assert not np.signbit(values).any()


def test_nan_and_negative_zero_in_weights_a_task_does_not_see_neither_spread_nor_change(
    net, third, quick_fit, edit_leaf, data
):
    state = pae.pack(net, pae.drop(third, "c"), "c", head=2, key=jax.random.key(5), sharing="first")
    path = "Dense_0/kernel"
    owner = np.asarray(flatten(state.owner)[path])
    hidden, visible = owner == 2, owner == 1

    def damage(w):
        w[hidden] = np.nan
        w.view(np.uint32)[hidden] ^= 0x2A  # a payload of its own
        w[visible] = -0.0
        return w

    state = state.replace(shared=edit_leaf(state.shared, path, damage))
    for optimizer in (optax.lamb(0.05, weight_decay=0.1), optax.adamw(0.05)):
        fitted, history = quick_fit(state, "c", optimizer=optimizer)
        assert np.isfinite(history.rows[-1]["loss"])
        new, old = (np.asarray(flatten(s.shared)[path]) for s in (fitted, state))
        assert new[hidden | visible].tobytes() == old[hidden | visible].tobytes()
        assert (new[owner == 3] != old[owner == 3]).any()
    assert np.isfinite(pae.predict(net, fitted, "c", data[0])).all()


# Law 1


def test_shared_and_owner_have_one_structure_and_equal_shapes_and_ids_run_from_zero_to_the_number_of_tasks(third):
    assert jax.tree.structure(third.shared) == jax.tree.structure(third.owner)
    for w, o in zip(jax.tree.leaves(third.shared), jax.tree.leaves(third.owner), strict=True):
        assert w.shape == o.shape
        assert o.dtype == jnp.int8
        assert set(np.unique(np.asarray(o))) == {1, 2, 3}
    assert [third.tasks[name].id for name in "abc"] == [1, 2, 3]
    pae.check(third)


def test_the_128th_task_is_refused_and_the_127th_works(net, third, data, quick_fit, assert_same):
    """126 tasks, all but three without weights, are written by hand; the last ones go through `pack`."""
    first = third.tasks["a"]
    state = pae.freeze(pae.prune(third, "c", 0.5), "c")
    frozen = state.tasks["c"]
    more = {f"t{i}": frozen.replace(id=i) for i in range(4, 127)}
    state = pae.pack(net, state.replace(tasks={**state.tasks, **more}), "last", head=2, key=jax.random.key(0))
    assert state.tasks["last"].id == 127
    assert sum(int(mask.sum()) for mask in jax.tree.leaves(pae.trainable(state, "last"))) == 5
    counted = pae.report(state).rows[126]
    assert (counted["task"], counted["weights"], counted["sees"]) == ("last", 5, 80)
    assert min(int(o.min()) for o in jax.tree.leaves(state.owner)) == 1
    before = pae.predict(net, third, "a", data[0])
    state, _ = quick_fit(state, "last")
    assert_same(pae.predict(net, state, "a", data[0]), before)
    assert_same(state.tasks["a"].local, first.local)
    state = pae.freeze(state, "last")
    pae.check(state)
    with pytest.raises(pae.CapacityError, match="at most 127 tasks"):
        pae.pack(net, state, "one too many", head=2, key=jax.random.key(0), allow_empty=True)


# Laws 2 and 3


def test_a_weight_freed_by_prune_or_drop_is_exactly_zero_until_claimed_again(net, third, quick_fit, data):
    """The momentum is carried on through every release, and to the next task."""
    tx = optax.sgd(0.1, momentum=0.9)
    ts = trained(pae.TrainState.create(net, third, "c", tx=tx), data)
    for fraction in (0.2, 0.5):
        ts = ts.prune(fraction)
        assert free_values(ts.commit(net, third)).size > 0
        ts = trained(ts, data)
        state = ts.commit(net, third)
        assert not free_values(state).any()
        assert not free_values(quick_fit(state, "c", optimizer=tx)[0]).any()
    dropped = pae.drop(state, "c")
    assert free_values(dropped).size == sum(int((o >= 3).sum()) for o in jax.tree.leaves(third.owner))
    assert not free_values(dropped).any()
    state = pae.pack(net, dropped, "d", head=2, key=jax.random.key(9))
    assert pae.free_fraction(state) == 0.0
    ts = pae.TrainState.create(net, state, "d", tx=tx).replace(opt_state=ts.opt_state)
    state = trained(ts, data).commit(net, state)
    assert (free_values(pae.drop(state, "d")) == 0).all()
    assert at_owner(state, lambda o: o == 3) != at_owner(dropped, lambda o: o == 0)


def test_a_weight_that_nobody_owned_keeps_the_value_that_init_gave_it(net, empty, packed, assert_same):
    assert all(np.asarray(w).all() for w in jax.tree.leaves(empty.shared))
    assert_same(packed.shared, empty.shared)
    other = pae.init(net, jax.random.key(1))
    assert (np.asarray(jax.tree.leaves(other.shared)[0]) != np.asarray(jax.tree.leaves(empty.shared)[0])).any()


def test_no_free_weight_takes_part_in_any_forward_pass(net, packed, data, assert_same):
    """Free weights are made NaN: whatever read one would show it."""
    state = pae.prune(packed, "a", 0.5)
    poisoned = state.replace(shared=jax.tree.map(lambda w, o: jnp.where(o == 0, jnp.nan, w), state.shared, state.owner))
    assert_same(pae.predict(net, poisoned, "a", data[0]), pae.predict(net, state, "a", data[0]))
    assert_same(pae.features(net, poisoned, "a", data[0]), pae.features(net, state, "a", data[0]))
    assert pae.evaluate(net, poisoned, "a", data) == pae.evaluate(net, state, "a", data)


@given(st.lists(st.sampled_from(["pack", "prune", "prune own", "prune global", "freeze", "drop"]), max_size=14))
@settings(max_examples=25, deadline=None)
def test_ownership_changes_only_from_free_to_k_by_pack_and_from_k_to_free_by_prune_or_drop_of_the_newest(
    net, empty, ops
):
    state, names = empty, itertools.count()
    for op in ops:
        newest = max(state.tasks, key=lambda name: state.tasks[name].id, default=None)
        new_id = len(state.tasks) + 1
        before = state
        try:
            if op == "pack":
                state = pae.pack(net, state, f"t{next(names)}", head=2, key=jax.random.key(0))
                allowed = {(0, new_id)}
            elif newest is None:
                continue
            elif op.startswith("prune"):
                options = {"own": {"of": "own"}, "global": {"scope": "global"}}.get(op[6:], {})
                state, allowed = pae.prune(state, newest, 0.6, **options), {(new_id - 1, 0)}
            elif op == "freeze":
                state, allowed = pae.freeze(state, newest), set()
            else:
                state, allowed = pae.drop(state, newest), {(new_id - 1, 0)}
        except (pae.PhaseError, pae.CapacityError):
            assert state is before
            continue
        pae.check(state)
        pae.verify(state)
        pairs = zip(jax.tree.leaves(before.owner), jax.tree.leaves(state.owner), strict=True)
        changes = {
            (int(o), int(n)) for old, new in pairs for o, n in zip(old.ravel(), new.ravel(), strict=True) if o != n
        }
        assert changes <= allowed
        if state.tasks:
            assert not free_values(state).any()


# Laws 5 and 6


class NnxBackbone(nnx.Module):
    def __init__(self, width, rngs):
        self.layers = nnx.List([nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 5, use_bias=False, rngs=rngs)])
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x, train):
        x = self.norm(self.layers[0](x), use_running_average=not train)
        return nnx.relu(self.layers[1](self.dropout(nnx.relu(x), deterministic=not train)))


@pytest.mark.parametrize("adapter", ["linen", "nnx"])
def test_predictions_of_a_frozen_task_are_bit_identical_through_every_later_operation(
    adapter, vector_module, data, quick_fit, tmp_path: Path, assert_same
):
    sample = jnp.zeros((1, 4))
    net = pae.nnx(NnxBackbone, sample) if adapter == "nnx" else pae.linen(vector_module, sample)
    x, y = data
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
    state, _ = quick_fit(state, "a", net=net)
    state = pae.freeze(pae.prune(state, "a", 0.6), "a")
    wanted, wanted_features = pae.predict(net, state, "a", x), pae.features(net, state, "a", x)
    digests = state.tasks["a"].digests
    stages = {}
    stages["pack"] = pae.pack(net, state, "b", head=2, key=jax.random.key(2), local_init="a", weight_init="fresh")
    stages["fit"], _ = quick_fit(stages["pack"], "b", (x, 1 - y), net=net)
    stages["prune"] = pae.prune(stages["fit"], "b", 0.2)
    stages["fit again"], history = quick_fit(stages["prune"], "b", (x, 1 - y), net=net)
    stages["resume"], _ = quick_fit(stages["fit again"], "b", (x, 1 - y), net=net, resume=history)
    ts = pae.TrainState.create(net, stages["resume"], "b", tx=optax.adamw(0.1, weight_decay=0.1), key=jax.random.key(4))
    stages["own steps"] = trained(trained(ts, data).prune(0.3), data).commit(net, stages["resume"])
    stages["freeze"] = pae.freeze(stages["own steps"], "b")
    stages["drop"] = pae.drop(stages["freeze"], "b")
    stages["pack first"] = pae.pack(net, stages["drop"], "c", head=2, key=jax.random.key(3), sharing="first")
    pae.save(tmp_path / "stage", stages["freeze"])
    stages["save and load"] = pae.load(net, tmp_path / "stage")
    for stage, later in stages.items():
        pae.verify(later)
        assert_same({stage: later.tasks["a"].digests}, {stage: digests})
        assert_same(pae.predict(net, later, "a", x), wanted)
        assert_same(pae.features(net, later, "a", x), wanted_features)
    assert (np.asarray(pae.predict(net, stages["freeze"], "b", x)) != np.asarray(wanted)).any()


def test_evaluating_anything_in_any_phase_leaves_every_array_of_the_state_unchanged(
    net, packed, frozen, second, third, data, state_facts
):
    pruned = pae.prune(second, "b", 0.3)
    for state in (packed, frozen, second, pruned, third):
        before = state_facts(state)
        for task in state.tasks:
            pae.predict(net, state, task, data[0])
            pae.predict(net, state, task, data[0], batch_size=16)
            pae.features(net, state, task, data[0])
            pae.evaluate(net, state, task, data, batch_size=16)
            pae.masks(state, task)
            pae.trainable(state, task)
        for look in (pae.free_fraction, pae.check, pae.verify, pae.report):
            look(state)
        assert state_facts(state) == before


def test_every_operation_returns_a_new_state_and_leaves_the_old_one_as_it_was(
    net, second, quick_fit, data, state_facts
):
    before = state_facts(second)
    quick_fit(second, "b")
    ts = pae.TrainState.create(net, second, "b", tx=optax.adam(0.01))
    trained(ts.prune(0.3), data).commit(net, second)
    pruned = pae.prune(second, "b", 0.3)
    dropped = pae.drop(second, "b")
    pae.pack(net, pae.freeze(pruned, "b"), "c", head=2, key=jax.random.key(0), weight_init="fresh")
    pae.pack(net, dropped, "c", head=2, key=jax.random.key(0))
    assert state_facts(second) == before


# Picks of older weights


def part_of(state, task):
    entry = state.tasks[task]
    return {"shared": state.shared, "owner": state.owner, "local": entry.local, "head": entry.head}


@pytest.fixture(scope="module")
def two_and_picks(net, two_frozen, quick_fit):
    """Old task "a", old task "b" with some picks of a's weights, and "c" packed, which picks among both."""
    state = pae.pack(net, pae.drop(two_frozen, "b"), "b", head=2, key=jax.random.key(3), sharing="picked")
    state, _ = quick_fit(state, "b", optimizer=with_picks(optax.adam(0.01), optax.adam(0.003)), epochs=4)
    state = pae.freeze(pae.prune(state, "b", 0.25), "b")
    picked = jax.tree.leaves(pae.masks(state, "b"))
    assert 40 < sum(int(mask.sum()) for mask in picked) < 70
    return pae.pack(net, state, "c", head=2, key=jax.random.key(6), sharing="picked")


ALL_PICKED = {
    "picks are no part": ("adamw", {"parts": ("shared", "local", "head")}),
    "updates of 0": ("sgd, weight decay, nesterov", {}),
    "ternary": ("adamw", {}),
}


@pytest.mark.parametrize("name", ALL_PICKED)
def test_a_task_that_picks_every_older_weight_is_one_that_shares_all(
    net, two_and_picks, quick_fit, data, assert_same, name
):
    start = pae.drop(two_and_picks, "c")
    plain = pae.pack(net, start, "c", head=2, key=jax.random.key(6))
    rule = pae.Picking(ternary=name == "ternary")
    picked = pae.pack(net, start, "c", head=2, key=jax.random.key(6), sharing="picked", picking=rule)
    assert_same(pae.predict(net, picked, "c", data[0]), pae.predict(net, plain, "c", data[0]))
    optimizer, options = ALL_PICKED[name]
    tx = OPTIMIZERS[optimizer]()
    tx = tx if options else with_picks(tx, optax.chain(optax.adam(0.01), optax.set_to_zero()))
    plain, history = quick_fit(plain, "c", optimizer=tx)
    picked, found = quick_fit(picked, "c", optimizer=tx, **options)
    same_numbers(found.rows, history.rows)
    for state, other in ((picked, plain), tuple(pae.freeze(pae.prune(s, "c", 0.5), "c") for s in (picked, plain))):
        same_numbers(part_of(state, "c"), part_of(other, "c"))
        same_numbers(pae.predict(net, state, "c", data[0]), pae.predict(net, other, "c", data[0]))
        assert_same(pae.masks(state, "c"), pae.masks(other, "c"))
        pae.verify(state)


def test_the_first_task_that_would_pick_is_bit_identical_to_one_that_shares_all(
    net, empty, packed, quick_fit, data, assert_same, tmp_path
):
    picked = pae.pack(net, empty, "a", head=2, key=jax.random.key(1), sharing="picked")
    assert picked.tasks["a"].pick is None
    plain, _ = quick_fit(packed, "a")
    picked, _ = quick_fit(picked, "a")
    plain, picked = (pae.freeze(pae.prune(state, "a", 0.5), "a") for state in (plain, picked))
    assert_same(part_of(picked, "a"), part_of(plain, "a"))
    assert_same(pae.masks(picked, "a"), pae.masks(plain, "a"))
    assert pae.report(picked).rows[0]["sees"] == pae.report(plain).rows[0]["sees"] == 40
    pae.save(tmp_path / "stage", picked)
    for state in (picked, pae.load(net, tmp_path / "stage")):
        pae.check(state)
        pae.verify(state)
        assert_same(pae.predict(net, state, "a", data[0]), pae.predict(net, plain, "a", data[0]))


CHAINS = [
    ("sgd, weight decay, nesterov", "adamw"),
    ("lamb", "pull to an average of the params"),
    ("pull to an average of the params", "noise on every parameter"),
    ("MultiSteps", "clip_by_global_norm"),
]


@pytest.mark.parametrize(("weights", "picks"), CHAINS, ids=lambda name: name.replace(" ", "_"))
def test_old_weights_variables_heads_and_picks_are_bit_identical_while_a_task_picks_under_any_optimizers(
    net, two_and_picks, quick_fit, data, assert_same, weights, picks
):
    old, x = two_and_picks, data[0]
    wanted = {task: pae.predict(net, old, task, x) for task in "ab"}
    tx = with_picks(OPTIMIZERS[weights](), OPTIMIZERS[picks]())
    ts = trained(pae.TrainState.create(net, old, "c", tx=tx), data)
    carried = trained(ts.prune(0.25), data).commit(net, old)
    for new in (carried, quick_fit(old, "c", optimizer=tx)[0]):
        assert at_owner(new, lambda o: o == 3) != at_owner(old, lambda o: o == 3)
        for path, w in flatten(new.shared).items():
            owner = np.asarray(flatten(old.owner)[path])
            older = (owner > 0) & (owner < 3)
            assert np.asarray(w)[older].tobytes() == np.asarray(flatten(old.shared)[path])[older].tobytes(), path
            before, after = (np.asarray(flatten(state.tasks["c"].pick)[path]) for state in (old, new))
            assert before[~older].tobytes() == after[~older].tobytes(), path
            assert (before != after)[older].mean() > 0.5, path
        for state in (new, pae.freeze(new, "c")):
            for task in "ab":
                entry, first = state.tasks[task], old.tasks[task]
                assert_same((entry.local, entry.head, entry.pick), (first.local, first.head, first.pick))
                assert_same(pae.predict(net, state, task, x), wanted[task])
            pae.check(state, net)
            pae.verify(state)


@pytest.mark.parametrize("ternary", [False, True], ids=["binary", "ternary"])
def test_freezing_a_task_that_picks_changes_no_bit_of_its_predictions_nor_does_anything_later(
    net, two_and_picks, quick_fit, data, assert_same, tmp_path, ternary
):
    x, y = data
    rule = pae.Picking(ternary=ternary)
    state = pae.pack(
        net, pae.drop(two_and_picks, "c"), "c", head=2, key=jax.random.key(6), sharing="picked", picking=rule
    )
    state, _ = quick_fit(state, "c", optimizer=with_picks(optax.adam(0.01), optax.adam(0.005)), epochs=4)
    state = pae.prune(state, "c", 0.5)
    signs = np.concatenate([np.asarray(s).ravel() for s in jax.tree.leaves(rule.signs(state.tasks["c"].pick))])
    assert set(signs.astype(int)) == ({-1, 0, 1} if ternary else {0, 1})
    wanted, scores = pae.predict(net, state, "c", x), pae.evaluate(net, state, "c", data)
    stages = {"trained": state, "frozen": pae.freeze(state, "c")}
    pick = stages["frozen"].tasks["c"].pick
    stages["packed"] = pae.pack(net, stages["frozen"], "d", head=2, key=jax.random.key(7), sharing="picked")
    stages["fitted"], _ = quick_fit(stages["packed"], "d", (x, 1 - y), optimizer=optax.adamw(0.1))
    stages["pruned"] = pae.prune(stages["fitted"], "d", 0.5)
    stages["second frozen"] = pae.freeze(stages["pruned"], "d")
    stages["dropped"] = pae.drop(stages["second frozen"], "d")
    for name in ("trained", "frozen", "fitted", "second frozen"):
        pae.save(tmp_path / name, stages[name])
        stages[f"{name}, saved and loaded"] = pae.load(net, tmp_path / name)
    for stage, later in stages.items():
        assert_same(pae.predict(net, later, "c", x), wanted)
        assert pae.evaluate(net, later, "c", data) == scores, stage
        if stage.split(",")[0] != "trained":
            assert_same(later.tasks["c"].pick, pick)
        pae.check(later)
        pae.verify(later)


# Law 9 (the hard cases are in test_checkpoint.py)


def test_saving_then_loading_is_the_identity(net, third, second, frozen, packed, empty, tmp_path, state_facts):
    for name, state in {"3": third, "2": second, "1f": frozen, "1": packed, "0": empty}.items():
        pae.save(tmp_path / name, state)
        assert state_facts(pae.load(net, tmp_path / name)) == state_facts(state)
