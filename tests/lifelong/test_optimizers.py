"""The typed optimizers against their formulas, computed by hand in float64."""

import dataclasses
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pae_jax as pae
from pae_jax.lifelong.optimizers import Adam, Sgd
from pae_jax.lifelong.recipes import Phase, Rate, Recipe
from pae_jax.trees import flatten

STEPS = 60


@pytest.fixture(scope="module")
def problem():
    """Parameters of all three parts, and gradients of the size that embeddings have, for each step."""
    draw = np.random.default_rng(0)

    def tree(scale):
        shapes = {
            "shared": {"kernel": (3, 4)},
            "local": {"bias": (4,), "table": (2, 2)},
            "head": {"k": (4, 2), "b": (2,)},
        }
        return jax.tree.map(
            lambda shape: jnp.asarray(scale * draw.normal(size=shape), jnp.float32),
            shapes,
            is_leaf=lambda leaf: isinstance(leaf, tuple),
        )

    return tree(1.0), [tree(0.02) for _ in range(STEPS)]


def exactly(tree):
    return {path: np.asarray(leaf, np.float64) for path, leaf in flatten(tree).items()}


def run(optimizer, problem, rates):
    """Return the parameters after each step, `w + rate * update`."""
    params, gradients = problem
    tx = optimizer.transformation() if hasattr(optimizer, "transformation") else optimizer
    state, found = tx.init(params), []

    @jax.jit
    def step(params, state, gradient, rate):
        updates, state = tx.update(gradient, state, params)
        return jax.tree.map(lambda p, u: p + rate * u, params, updates), state

    for gradient, rate in zip(gradients, rates, strict=True):
        params, state = step(params, state, gradient, np.float32(rate))
        found.append(exactly(params))
    return found


def run_by_hand(make_step, problem, rates, decayed=(), weight_decay=0.0):
    """Return the parameters after each step; `make_step()` gives a `gradient -> update` with a memory of its own."""
    params, gradients = exactly(problem[0]), [exactly(g) for g in problem[1]]
    steps, found = {path: make_step() for path in params}, []
    for gradient, rate in zip(gradients, rates, strict=True):
        decays = {path: weight_decay if path in decayed else 0.0 for path in params}
        params = {
            path: w + float(np.float32(rate)) * steps[path](gradient[path] + decays[path] * w)
            for path, w in params.items()
        }
        found.append(params)
    return found


def assert_close(found, expected, atol=1e-6):
    for step, (one, other) in enumerate(zip(found, expected, strict=True), 1):
        for path, values in other.items():
            np.testing.assert_allclose(one[path], values, rtol=1e-6, atol=atol, err_msg=f"{path} after step {step}")


def torch_sgd(momentum, nesterov):
    """`v <- momentum v + g; w <- w - rate (g + momentum v)`, v starting as the first gradient."""

    def make():
        memory = {"v": None}

        def step(g):
            memory["v"] = g if memory["v"] is None else momentum * memory["v"] + g
            return -(g + momentum * memory["v"]) if nesterov else -memory["v"]

        return step

    return make


def tensorflow_adam(b1, b2, epsilon, hat, start=0):
    """`w <- w - rate sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + epsilon)`; without hat epsilon joins sqrt(v')."""

    def make():
        memory = {"m": 0.0, "v": 0.0, "t": start}

        def step(g):
            memory["t"] += 1
            memory["m"] = b1 * memory["m"] + (1 - b1) * g
            memory["v"] = b2 * memory["v"] + (1 - b2) * g * g
            first, second = 1 - b1 ** memory["t"], 1 - b2 ** memory["t"]
            if hat:
                return -np.sqrt(second) / first * memory["m"] / (np.sqrt(memory["v"]) + epsilon)
            return -(memory["m"] / first) / (np.sqrt(memory["v"] / second) + epsilon)

        return step

    return make


DROPS = [0.5] * 20 + [0.1] * 20 + [0.02] * 20


@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_follows_the_recurrence_of_torch_under_a_changing_rate(problem, momentum, nesterov):
    found = run(Sgd(None, momentum, nesterov, weight_decay=0.0), problem, DROPS)
    assert_close(found, run_by_hand(torch_sgd(momentum, nesterov), problem, DROPS))


@pytest.mark.parametrize("epsilon", [0.1, 1e-8])
@pytest.mark.parametrize("start", [0, 10_000])
def test_adam_with_epsilon_hat_follows_the_formula_of_tensorflow(problem, epsilon, start):
    rates = [0.01] * STEPS
    found = run(Adam(epsilon=epsilon, epsilon_hat=True, start=start), problem, rates)
    assert_close(found, run_by_hand(tensorflow_adam(0.9, 0.999, epsilon, True, start), problem, rates))


def test_adam_with_epsilon_hat_is_accurate_at_its_slow_start(problem):
    """`1 - 0.999` in float32 is right to 4 digits only, which shows in updates of the size of the weights."""
    rates = [1.0] * 5
    few = problem[0], problem[1][:5]
    found = run(Adam(epsilon=1e-3, epsilon_hat=True), few, rates)
    assert_close(found, run_by_hand(tensorflow_adam(0.9, 0.999, 1e-3, True), few, rates))


def test_at_epsilon_a_tenth_the_two_forms_of_adam_differ_thirtyfold_at_the_start(problem):
    """The second is momentum descent at ten times the rate, after a slow start of sqrt(1 - 0.999^t)."""
    first = exactly(problem[1][0])["shared/kernel"]
    before = exactly(problem[0])["shared/kernel"]
    plain, hat = (
        run(Adam(epsilon=0.1, epsilon_hat=form), (problem[0], problem[1][:1]), [1.0])[0]["shared/kernel"] - before
        for form in (False, True)
    )
    np.testing.assert_allclose(plain, -first / (np.abs(first) + 0.1), rtol=1e-4)
    root = math.sqrt(0.001)
    np.testing.assert_allclose(hat, -root * first / (root * np.abs(first) + 0.1), rtol=1e-3, atol=1e-6)


def test_adam_without_epsilon_hat_is_adam_of_optax_bit_for_bit(problem):
    for one, other in (
        (Adam(), optax.adam(1.0)),
        (Adam(None, 0.8, 0.99, 1e-3), optax.adam(1.0, 0.8, 0.99, 1e-3)),
    ):
        found, expected = (run(tx, problem, [0.01] * STEPS)[-1] for tx in (one, other))
        for path, values in expected.items():
            np.testing.assert_array_equal(found[path], values)


def test_start_continues_the_bias_correction_of_adam(problem):
    rates = [0.01] * STEPS
    found = run(Adam(start=500), problem, rates)
    assert_close(found, run_by_hand(tensorflow_adam(0.9, 0.999, 1e-8, False, 500), problem, rates))
    begun = run(Adam(epsilon=0.1, epsilon_hat=True), problem, rates)[0]["shared/kernel"]
    warm = run(Adam(epsilon=0.1, epsilon_hat=True, start=10_000), problem, rates)[0]["shared/kernel"]
    before = exactly(problem[0])["shared/kernel"]
    # Without the correction the first step is the bare (1 - b1) of a momentum that starts at 0.
    ratio = np.median((warm - before) / (begun - before))
    assert ratio == pytest.approx(0.1 / math.sqrt(0.001), rel=0.05)


KERNELS = {"shared": "shared/kernel", "head": "head/k"}


@pytest.mark.parametrize("decayed", [(), ("head",), ("shared", "head")], ids=str)
@pytest.mark.parametrize("kind", ["sgd", "adam", "adam hat"])
def test_decay_is_coupled_and_touches_only_the_kernels_of_the_decayed_parts(problem, kind, decayed):
    options = {"weight_decay": 0.05, "decayed": decayed}
    optimizer, by_hand = {
        "sgd": (Sgd(**options), torch_sgd(0.9, True)),
        "adam": (Adam(**options), tensorflow_adam(0.9, 0.999, 1e-8, False)),
        "adam hat": (Adam(epsilon=0.1, epsilon_hat=True, **options), tensorflow_adam(0.9, 0.999, 0.1, True)),
    }[kind]
    rates = [0.01] * STEPS
    found = run(optimizer, problem, rates)
    expected = run_by_hand(by_hand, problem, rates, [KERNELS[part] for part in decayed], 0.05)
    # The usual form is optax's own, which computes 1 - 0.999^t with the 4 digits that float32 leaves of it.
    assert_close(found, expected, atol=2e-5 if kind == "adam" else 1e-6)
    undecayed = run(replace(optimizer, weight_decay=0.0), problem, rates)[-1]
    touched = {path for path, values in undecayed.items() if not np.array_equal(values, found[-1][path])}
    assert touched == {KERNELS[part] for part in decayed}


def test_decay_halves_the_kernels_of_the_newest_task_and_no_frozen_or_free_weight(net, third, quick_fit, assert_same):
    """The loss is flat, so a decay of a half at rate 1 is all that happens."""
    state = pae.prune(third, "c", 0.5)
    flat = lambda logits, y: 0.0 * logits.sum(axis=-1)  # noqa: E731
    for decayed in (("shared",), ("head",), ("shared", "head")):
        optimizer = Sgd(momentum=0.0, weight_decay=0.5, decayed=decayed).transformation()
        after, _ = quick_fit(state, "c", optimizer=optimizer, epochs=1, batch_size=40, loss=flat)
        halved = "shared" in decayed
        for path, w in flatten(state.shared).items():
            own = np.asarray(flatten(state.owner)[path]) == 3
            assert own.any()
            expected = np.where(own & halved, np.asarray(w) * np.float32(0.5), np.asarray(w))
            np.testing.assert_array_equal(flatten(after.shared)[path], expected)
        old, new = state.tasks["c"], after.tasks["c"]
        assert_same(new.local["params"], old.local["params"])
        factor = np.float32(0.5 if "head" in decayed else 1.0)
        np.testing.assert_array_equal(new.head["params"]["kernel"], old.head["params"]["kernel"] * factor)
        np.testing.assert_array_equal(new.head["params"]["bias"], old.head["params"]["bias"])


def test_a_decay_of_parts_that_are_not_trained_changes_nothing(packed, quick_fit, assert_same):
    optimizer = Sgd(weight_decay=0.5, decayed=("shared", "head")).transformation()
    state, _ = quick_fit(packed, "a", optimizer=optimizer, parts=("head",))
    assert_same((state.shared, state.tasks["a"].local), (packed.shared, packed.tasks["a"].local))


@pytest.mark.parametrize(
    "make", [Sgd, lambda: Adam(epsilon=0.1, epsilon_hat=True, weight_decay=5e-4)], ids=["sgd", "adam"]
)
def test_an_optimizer_made_anew_compiles_nothing_anew(net, empty, packed, data, quick_fit, compilations, make):
    """Those of the recipes compare by value; the learning rate of a phase is no part of the compiled step."""
    with_rate = lambda: dataclasses.replace(make(), learning_rate=0.01)  # noqa: E731
    quick_fit(packed, "a", optimizer=with_rate(), epochs=1)
    with compilations() as found:
        quick_fit(packed, "a", optimizer=with_rate(), epochs=1)
    assert found.count == 0

    def learn(rate):
        recipe = Recipe("again", Phase(2, Rate(rate), make()), 8)
        return pae.learn(net, empty, pae.Task("a", 2, data, data), recipe, key=jax.random.key(2))

    first = learn(0.01)
    with compilations() as found:
        other = learn(0.03)
    assert found.count == 0
    assert first.records[0].history != other.records[0].history


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (Sgd, {"momentum": 1.0}),
        (Sgd, {"momentum": -0.1}),
        (Sgd, {"weight_decay": math.nan}),
        (Sgd, {"weight_decay": math.inf}),
        (Sgd, {"decayed": ("heads",)}),
        (Sgd, {"decayed": "shared"}),
        (Adam, {"b1": 1.0}),
        (Adam, {"b2": "high"}),
        (Adam, {"epsilon": -1e-8}),
        (Adam, {"start": -1}),
        (Adam, {"start": 0.5}),
        (Adam, {"weight_decay": -0.1}),
        (Adam, {"decayed": ("local",)}),
    ],
    ids=str,
)
def test_an_optimizer_refuses_values_out_of_range_by_name(kind, change):
    with pytest.raises(pae.ArgumentError, match=f"^{next(iter(change))} must"):
        kind(**change)


@pytest.mark.parametrize("hat", [True, False], ids=["hat", "plain"])
def test_adam_without_running_means_is_defined(problem, hat):
    rates = [0.01] * STEPS
    found = run(Adam(b1=0.0, b2=0.0, epsilon=0.1, epsilon_hat=hat, start=1), problem, rates)
    assert_close(found, run_by_hand(tensorflow_adam(0.0, 0.0, 0.1, hat, 1), problem, rates))


@pytest.mark.parametrize("kind", [Sgd, Adam])
def test_outside_a_recipe_an_optimizer_needs_its_own_learning_rate(kind, net, packed, quick_fit):
    with pytest.raises(pae.ArgumentError, match=rf"{kind.__name__} needs a learning rate here"):
        quick_fit(packed, "a", optimizer=kind(), epochs=1)
    with pytest.raises(pae.ArgumentError, match=rf"{kind.__name__} needs a learning rate here"):
        pae.TrainState.create(net, packed, "a", tx=kind())
    with pytest.raises(pae.ArgumentError, match="learning_rate must be a finite number"):
        kind(learning_rate=-1.0)


@pytest.mark.parametrize("kind", [Sgd, Adam])
def test_shared_weights_of_a_task_that_owns_few_decay_as_well(kind):
    """A leaf of which a task owns little is a row of single weights for the optimizer."""
    net = pae.linen(lambda width: pae.models.MLP(width, (64,)), jnp.zeros((1, 64)))
    x, y = np.zeros((32, 64), np.float32), np.zeros(32, np.int32)
    norms = {}
    for share in (0.5, 0.97):
        state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
        state = pae.prune(state, "a", share)
        optimizer = replace(kind(learning_rate=1e-2), weight_decay=1.0, **({"decoupled": True} if kind is Adam else {}))
        after, _ = pae.fit(net, state, "a", (x, y), optimizer=optimizer, epochs=9, batch_size=32, key=jax.random.key(2))
        norm = lambda state: float(jnp.linalg.norm(state.shared["Dense_0"]["kernel"]))  # noqa: E731
        norms[share] = norm(after) / norm(state)
    assert norms[0.97] < 0.95
    assert norms[0.97] == pytest.approx(norms[0.5], abs=0.02)
