"""Law 11: what is traced once, what is compiled once, and what is not compiled at all."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pae_jax as pae
from pae_jax import caching


def test_training_two_tasks_of_equal_head_size_at_one_width_traces_the_train_step_once(
    vector_module, data, quick_fit, traces, compilations
):
    net = pae.linen(vector_module, jnp.zeros((1, 4)))
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
    traces.clear()

    def optimizer(lr):
        schedule = optax.warmup_cosine_decay_schedule(0.0, lr, 2, 10)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-4))

    def life(state, task, tx):
        state, _ = quick_fit(state, task, optimizer=tx, net=net, val=data, keep="best")
        state = pae.prune(state, task, 0.4 + 0.1 * state.tasks[task].id)
        state, _ = quick_fit(state, task, optimizer=tx, net=net)
        return pae.freeze(state, task)

    tx = optimizer(0.01)
    state = life(state, "a", tx)
    assert traces == [1.0]
    state = life(pae.pack(net, state, "b", head=2, key=jax.random.key(2)), "b", tx)
    assert traces == [1.0]
    with compilations() as found:
        packed = pae.pack(net, state, "c", head=2, key=jax.random.key(3))
        state = life(packed, "c", tx)
        pae.verify(state)
    assert found.count == 0
    assert traces == [1.0]
    life(packed, "c", optimizer(0.02))
    assert traces == [1.0, 1.0]  # another learning rate is another program
    other = pae.pack(net, pae.drop(packed, "c"), "d", head=3, key=jax.random.key(3))
    life(other, "d", tx)
    assert traces == [1.0, 1.0, 1.0]  # and so is another head


def test_tasks_with_a_budget_trace_the_train_step_once_for_equal_head_and_width_or_once_per_set_of_leaves(
    vector_module, frozen, quick_fit, traces
):
    """Leaves in which a task owns nothing are not differentiated, so another set of leaves is another program."""
    net = pae.linen(vector_module, jnp.zeros((1, 4)))
    tx, leaves = optax.adam(0.01), sorted(frozen.shared)

    def scores(leaf):  # grow from position to position, in one leaf or in both
        grow = lambda w, some: jnp.linspace(0.0, float(some), w.size).reshape(w.shape)  # noqa: E731
        return {
            name: jax.tree.map(lambda w, name=name: grow(w, leaf in (None, name)), frozen.shared[name])
            for name in leaves
        }

    def life(state, task, leaf):
        budget = {"budget": 0.05, "budget_scores": scores(leaf)}
        state = pae.pack(net, state, task, head=2, key=jax.random.key(1), **budget)
        owned = [name for name in leaves if (state.owner[name]["kernel"] == state.tasks[task].id).any()]
        assert owned == (leaves if leaf is None else [leaf])
        return pae.freeze(quick_fit(state, task, optimizer=tx, net=net, epochs=1)[0], task)

    traces.clear()
    state, counts = frozen, []
    for number, leaf in enumerate([None, None, leaves[0], leaves[0], leaves[1], leaves[1]]):
        state = life(state, f"t{number}", leaf)
        counts.append(len(traces))
    assert counts == [1, 1, 2, 2, 3, 3]


OPTAX = {
    "exponential decay": lambda: optax.sgd(optax.exponential_decay(0.1, 3, 0.9)),
    "MultiSteps": lambda: optax.MultiSteps(optax.sgd(0.1), 2),
}


@pytest.mark.parametrize("make", OPTAX.values(), ids=OPTAX)
def test_a_new_optimizer_of_optax_is_another_program_and_the_same_object_is_not(make, packed, quick_fit, traces):
    """Whether two of them do the same cannot be seen from outside."""
    tx = make()
    wanted, _ = quick_fit(packed, "a", optimizer=tx, epochs=1)
    traces.clear()
    quick_fit(packed, "a", optimizer=tx, epochs=1)
    assert traces == []
    found, _ = quick_fit(packed, "a", optimizer=make(), epochs=1)
    assert traces == [1.0]
    for one, other in zip(jax.tree.leaves(found.shared), jax.tree.leaves(wanted.shared), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", [pae.recipes.Sgd, pae.recipes.Adam])
def test_a_new_but_equal_optimizer_of_the_recipes_traces_nothing(kind, packed, quick_fit, traces, compilations):
    quick_fit(packed, "a", optimizer=kind(learning_rate=0.01), epochs=1)
    traces.clear()
    with compilations() as found:
        quick_fit(packed, "a", optimizer=kind(learning_rate=0.01), epochs=1)
    assert (traces, found.count) == ([], 0)
    quick_fit(packed, "a", optimizer=kind(learning_rate=0.01, weight_decay=0.25), epochs=1)
    assert traces == [1.0]


def test_an_optimizer_whose_surroundings_changed_is_another_program(packed, quick_fit, traces):
    """A function is known by the object and by the program that it is at this moment."""
    settings = {"rate": 0.0}
    tx = optax.GradientTransformation(
        lambda params: optax.EmptyState(),
        lambda grads, state, params=None: (jax.tree.map(lambda g: -settings["rate"] * g, grads), state),
    )
    still, _ = quick_fit(packed, "a", optimizer=tx, epochs=1)
    settings["rate"] = 0.1
    traces.clear()
    moved, _ = quick_fit(packed, "a", optimizer=tx, epochs=1)
    assert traces == [1.0]
    for before, same, other in zip(*(jax.tree.leaves(s.shared) for s in (packed, still, moved)), strict=True):
        np.testing.assert_array_equal(before, same)
        assert (before != other).any()


def test_caches_are_bounded_and_can_be_cleared(packed, quick_fit, traces):
    tx = optax.sgd(0.1)
    quick_fit(packed, "a", optimizer=tx, epochs=1)
    caching.clear_caches()
    assert all(not cache._entries for cache in caching.Cache.every)
    traces.clear()
    quick_fit(packed, "a", optimizer=tx, epochs=1)
    assert traces == [1.0]
    assert all(len(cache._entries) <= cache.size <= 64 for cache in caching.Cache.every)
    cache = caching.Cache(3)
    made = [cache.get((number,), lambda number=number: [number]) for number in range(4)]
    assert cache.get((3,), list) is made[3]
    assert cache.get((0,), lambda: "made again") == "made again"
    assert len(cache._entries) == 3
    caching.Cache.every.remove(cache)


def test_one_optimizer_object_used_again_traces_nothing_even_if_its_schedule_rewrites_its_own_closure(
    packed, quick_fit, traces
):
    tx = optax.sgd(optax.cosine_decay_schedule(0.1, 50))
    quick_fit(packed, "a", optimizer=tx, epochs=1)
    traces.clear()
    quick_fit(packed, "a", optimizer=tx, epochs=1)
    assert traces == []


def test_another_width_adds_one_trace_of_the_train_step(vector_module, quick_fit, traces):
    net = pae.linen(vector_module, jnp.zeros((1, 4)))
    for width, key in ((0.5, 0), (1.0, 1), (0.5, 2), (1.0, 3)):
        state = pae.pack(net, pae.init(net, jax.random.key(key), width), "a", head=2, key=jax.random.key(key))
        before = len(traces)
        quick_fit(state, "a", net=net, epochs=1)
        assert traces[before:] == ([width] if key < 2 else [])


def test_pruning_evaluating_and_predicting_compile_nothing_for_another_fraction_or_task(net, third, data, compilations):
    x, y = data

    def use(state, task, fraction):
        for scope, of in itertools.product(("leaf", "global"), ("available", "own")):
            pae.prune(state, task, fraction, scope=scope, of=of)
        for name in state.tasks:
            pae.predict(net, state, name, x)
            pae.features(net, state, name, x)
            pae.evaluate(net, state, name, (x, y))
            pae.masks(state, name)
            pae.trainable(state, name)
        pae.free_fraction(state)

    use(third, "c", 0.3)
    dropped = pae.drop(third, "c")
    other = pae.pack(net, dropped, "other", head=2, key=jax.random.key(0))
    with compilations() as found:
        for fraction in (0.0, 0.1, 0.77, 1.0):
            use(third, "c", fraction)
            use(other, "other", fraction)
    assert found.count == 0


def test_gradual_pruning_compiles_nothing_for_another_schedule(packed, quick_fit, compilations):
    quick_fit(packed, "a", pruning=pae.CubicSchedule(final=0.5, end=6, every=2))
    with compilations() as found:
        quick_fit(packed, "a", pruning=pae.CubicSchedule(final=0.9, end=9, every=3))
    assert found.count == 0


def test_a_loaded_state_compiles_nothing_that_the_saved_one_had_compiled(
    net, third, quick_fit, data, tmp_path, compilations
):
    """Arrays that `load` tied to a device would make every compiled function compile once more."""

    def use(state):
        pae.predict(net, state, "a", data[0])
        pae.evaluate(net, state, "b", data)
        state, _ = quick_fit(state, "c", val=data)
        state = pae.freeze(pae.prune(state, "c", 0.5), "c")
        quick_fit(pae.pack(net, state, "d", head=2, key=jax.random.key(0)), "d")

    use(third)
    pae.save(tmp_path / "stage", third)
    loaded = pae.load(net, tmp_path / "stage")
    with compilations() as found:
        use(loaded)
    assert found.count == 0


def test_five_tasks_of_a_recipe_trace_the_train_step_once_per_width(vector_module, data, traces):
    """Training, every rung and all their learning rates share one step; each growth adds one."""
    net = pae.linen(vector_module, data[0][:1])
    phase = pae.recipes.Phase(2, pae.recipes.Rate(0.05, cosine=True))
    rung = pae.recipes.Phase(2, pae.recipes.Rate(0.01, drops=((1, 0.1),)))
    ladder = pae.recipes.Ladder((0.3, 0.6), rung)
    recipe = pae.Recipe("five", phase, 8, ladder=ladder, goal=1.0, expansion=pae.recipes.Expansion(1.0, 3.0))
    x = data[0]
    tasks = [
        pae.Task(str(i), 2, (x, y), val=(x, y))
        for i, y in enumerate(np.random.default_rng(0).integers(2, size=(5, 40)))
    ]
    result = pae.learn_all(net, pae.init(net, jax.random.key(0)), tasks, recipe, key=jax.random.key(1), progress=False)
    widths = {record.width for outcome in result.outcomes for record in outcome.records}
    assert len(result.outcomes) == 5
    assert len(widths) > 1
    assert len(traces) == len(widths)
