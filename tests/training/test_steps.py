"""The compiled steps themselves: the gate, the forward mask that is left out, and steps that are not finite."""

import dataclasses
import gc
import weakref
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import pae_jax as pae
from pae_jax.core import ownership
from pae_jax.training import steps, task_arrays
from pae_jax.training.losses import Objective, accuracy, softmax_cross_entropy
from pae_jax.trees import flatten


def run(net, state, task, tx, batches):
    objective = Objective(metrics=(("accuracy", accuracy),))
    step = jax.jit(steps.step_function(objective, None), donate_argnums=0)
    ts = pae.TrainState.create(net, state, task, tx=tx, key=jax.random.key(0))
    carry, sums = steps.start(ts, objective), []
    for x, y in batches:
        carry = step(carry, np.ones(2, np.float32), x, y)
        sums.append({name: np.asarray(value) for name, value in carry.sums.items()})
    return carry, sums


def test_leaving_out_the_forward_mask_under_sharing_all_changes_no_bit_of_loss_gradient_or_weights(
    net, third, data, assert_same, monkeypatch
):
    """The gradient is compared too: plain SGD of rate 1 writes it into the weights, momentum keeps it."""
    state = pae.prune(third, "c", 0.5)
    batches = [(data[0][i : i + 8], data[1][i : i + 8]) for i in range(0, 32, 8)]
    tx, masked = optax.sgd(1.0, momentum=0.9), []
    plain, sums = run(net, state, "c", tx, batches)
    unmasked = task_arrays.model_variables

    def model_variables(ts, params):
        backbone, head = unmasked(ts, params)
        shared = {name: {"kernel": backbone["params"][name]["kernel"]} for name in ts.owner}
        masked.append(sorted(shared))
        shared = ownership.select(ownership.visible(ts.owner, ts.task_id, ts.sharing), shared)
        merged = {name: {**layer, **shared.get(name, {})} for name, layer in backbone["params"].items()}
        return {**backbone, "params": merged}, head

    monkeypatch.setattr(task_arrays, "model_variables", model_variables)
    hidden, masked_sums = run(net, state, "c", tx, batches)
    assert masked[0] == ["Dense_0", "Dense_1"]
    for part in ("params", "opt_state", "variables", "owner"):
        assert_same(getattr(plain.ts, part), getattr(hidden.ts, part))
    assert_same(sums, masked_sums)
    assert int(plain.bad_step) == int(hidden.bad_step) == -1
    moved = [
        (np.asarray(a) != np.asarray(b)).any()
        for a, b in zip(jax.tree.leaves(plain.ts.commit(net, state).shared), jax.tree.leaves(state.shared), strict=True)
    ]
    assert all(moved)


def test_under_sharing_first_the_forward_pass_of_training_hides_the_tasks_between(
    net, third, data, edit_leaf, quick_fit, assert_same
):
    """Other values in the hidden weights change neither the trained weights nor the loss."""
    state = pae.pack(net, pae.drop(third, "c"), "c", head=2, key=jax.random.key(5), sharing="first")
    path = "Dense_1/kernel"
    hidden = np.asarray(flatten(state.owner)[path]) == 2
    other = state.replace(shared=edit_leaf(state.shared, path, lambda w: np.where(hidden, w + 3, w)))
    one, history = quick_fit(state, "c")
    two, other_history = quick_fit(other, "c")
    assert history.rows == other_history.rows
    assert_same(one.tasks["c"].head, two.tasks["c"].head)
    for mine, w, v in zip(
        *(jax.tree.leaves(t) for t in (pae.trainable(one, "c"), one.shared, two.shared)), strict=True
    ):
        assert np.asarray(w)[mine].tobytes() == np.asarray(v)[mine].tobytes()
    _, seen = quick_fit(state.replace(tasks={**state.tasks, "c": state.tasks["c"].replace(sharing="all")}), "c")
    assert seen.rows != history.rows


def test_the_optimizer_sees_zero_as_parameter_and_gradient_where_a_weight_is_not_the_tasks_own(net, third, quick_fit):
    """A transformation that remembers the largest it was ever shown, at each place."""

    def init(params):
        return {"param": jax.tree.map(jnp.abs, params), "grad": jax.tree.map(jnp.zeros_like, params)}

    def update(grads, seen, params):
        largest = lambda old, new: jax.tree.map(lambda o, n: jnp.maximum(o, jnp.abs(n)), old, new)  # noqa: E731
        seen = {"param": largest(seen["param"], params), "grad": largest(seen["grad"], grads)}
        return jax.tree.map(lambda g: -0.1 * g, grads), seen

    _, history = quick_fit(third, "c", optimizer=optax.GradientTransformation(init, update))
    for what in ("param", "grad"):
        for path, seen in flatten(history.opt_state[what]["shared"]).items():
            mine = np.asarray(flatten(third.owner)[path]) == 3
            assert not np.asarray(seen)[~mine].any()
            assert np.asarray(seen)[mine].any()


def test_clipping_by_global_norm_takes_no_notice_of_the_weights_of_other_tasks(net, third, quick_fit):
    """Under sharing "first" the older task's weights have no influence on how far a clipped step goes."""
    rate = 1e-3
    after, _ = quick_fit(
        third, "c", optimizer=optax.chain(optax.clip_by_global_norm(rate), optax.sgd(1.0)), epochs=1, batch_size=40
    )
    trained = [
        (after.shared, third.shared),
        (after.tasks["c"].head, third.tasks["c"].head),
        (after.tasks["c"].local["params"], third.tasks["c"].local["params"]),
    ]
    square = sum(
        float(jnp.sum((a - b) ** 2))
        for new, old in trained
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    )
    assert np.sqrt(square) == pytest.approx(rate, rel=1e-3)


# Steps that are not finite


def loss_that_breaks_at(step, gradient_only=False):
    """A loss that turns NaN (or whose gradient does) for the batch whose first label is `step`."""

    def loss(logits, labels):
        bad = labels[0] == step
        plain = jnp.mean((logits[:, 0] - labels) ** 2)
        if gradient_only:
            zero = jnp.where(bad, 0.0, 1.0) * jnp.sum(jnp.abs(logits))
            return plain + jnp.sqrt(zero) * 1e-9  # sqrt has an infinite slope at 0, and 0 * inf is NaN
        return plain + jnp.where(bad, jnp.nan, 0.0)

    return loss


def numbered(data, count):
    """`count` batches of 8, the labels all equal to the batch's number."""
    return [(data[0][i % 5 * 8 :][:8], np.full(8, i, np.float32)) for i in range(count)]


@pytest.mark.parametrize("gradient_only", [False, True], ids=["loss", "gradient only"])
@pytest.mark.parametrize("step", [0, 3])
def test_a_step_that_is_not_finite_stops_with_its_number_and_the_state_of_a_run_stopped_right_before(
    third, quick_fit, data, gradient_only, step, state_facts
):
    loss = loss_that_breaks_at(step, gradient_only)
    tx = optax.adamw(0.01)
    with pytest.raises(pae.DivergedError, match=f"at step {step}; training stopped") as caught:
        quick_fit(third, "c", numbered(data, 6), optimizer=tx, epochs=1, loss=loss)
    good, _ = quick_fit(third, "c", numbered(data, max(step, 1)), optimizer=tx, epochs=int(step > 0), loss=loss)
    assert caught.value.step == step
    assert state_facts(caught.value.state) == state_facts(good)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(caught.value.state.shared))


def test_the_number_of_a_bad_step_counts_from_the_start_of_the_fit_and_earlier_epochs_stay_in_the_history(
    third, quick_fit, data
):
    def epochs(epoch):
        return iter(numbered(data, 10)[epoch * 4 : epoch * 4 + 4])

    with pytest.raises(pae.DivergedError) as caught:
        quick_fit(third, "c", epochs, epochs=2, loss=loss_that_breaks_at(6), optimizer=optax.sgd(0.01))
    assert caught.value.step == 6
    assert [row["epoch"] for row in caught.value.history.rows] == [1]
    assert caught.value.history.kept_epoch == 1


def test_nothing_is_pruned_after_a_step_that_was_not_finite(third, quick_fit, data, state_facts):
    schedule = pae.CubicSchedule(final=0.9, end=8, every=2)
    loss, tx = loss_that_breaks_at(5), optax.sgd(0.01)
    with pytest.raises(pae.DivergedError) as caught:
        quick_fit(third, "c", numbered(data, 8), optimizer=tx, epochs=1, loss=loss, pruning=schedule)
    shorter, seen = numbered(data, 5), []
    stop = lambda state, row: seen.append(state_facts(state)) or True  # noqa: E731
    quick_fit(third, "c", lambda epoch: shorter, optimizer=tx, epochs=2, loss=loss, pruning=schedule, on_epoch=stop)
    assert state_facts(caught.value.state) == seen[0]


@pytest.mark.parametrize("parts", [("shared", "local", "head"), ("shared",), ("head",)])
@pytest.mark.parametrize("steps", [1, 3], ids=["in the last step", "in a step before the last"])
def test_an_update_that_is_not_finite_is_no_good_step_either(third, quick_fit, data, steps, parts):
    """The loss and its gradient are finite; the learning rate, infinite, is what breaks the weights."""
    tx = optax.sgd(lambda count: jnp.where(count < steps - 1, 0.01, jnp.inf))
    for more in (0, 2):
        with pytest.raises(pae.DivergedError) as caught:
            batches, loss = numbered(data, steps + more), loss_that_breaks_at(-1)
            quick_fit(third, "c", batches, optimizer=tx, epochs=1, loss=loss, parts=parts)
        assert caught.value.step == steps - 1
        assert all(
            np.isfinite(leaf).all() for leaf in jax.tree.leaves((caught.value.state.shared, caught.value.state.tasks))
        )


def test_a_rate_that_is_not_finite_is_no_good_step_whatever_is_trained(third, quick_fit, rated_fit, data, state_facts):
    def rates(step):
        return (1.0, np.nan if step == 2 else 1.0)

    options = {"optimizer": optax.sgd(0.01), "epochs": 1, "parts": ("shared",), "loss": loss_that_breaks_at(-1)}
    with pytest.raises(pae.DivergedError, match="at step 2;") as caught:
        rated_fit(third, "c", numbered(data, 4), rates=rates, **options)
    good, _ = quick_fit(third, "c", numbered(data, 2), **options)
    assert state_facts(caught.value.state) == state_facts(good)


class NanStatistics(nn.Module):
    """A model that writes NaN into its statistics while its loss stays finite."""

    width: float

    @nn.compact
    def __call__(self, x, train):
        seen = self.variable("stats", "mean", jnp.zeros, (4,))
        if train:
            seen.value = jnp.sqrt(x.mean(axis=0) - 1e6)
        return nn.Dense(4)(x) - (0.0 if train else seen.value[None])


def test_local_variables_that_become_nan_are_no_good_step_either(data, quick_fit):
    net = pae.linen(NanStatistics, jnp.zeros((1, 4)))
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
    with pytest.raises(pae.DivergedError) as caught:
        quick_fit(state, "a", net=net)
    assert caught.value.step == 0


class Norm(nn.Module):
    """A model whose outputs are finite everywhere; its first kernel's gradient is NaN where an input is 0."""

    width: float

    @nn.compact
    def __call__(self, x, train):
        length = jnp.sqrt(jnp.sum(nn.Dense(4, use_bias=False)(x) ** 2, axis=-1, keepdims=True))
        return nn.Dense(4)(x) + length


def test_a_gradient_that_breaks_inside_the_network_stops_with_finite_weights_and_no_change_of_frozen_ones(
    data, quick_fit, assert_same
):
    net = pae.linen(Norm, jnp.zeros((1, 4)))
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
    state = pae.freeze(pae.prune(state, "a", 0.5), "a")
    state = pae.pack(net, state, "b", head=2, key=jax.random.key(2))
    batches = [(data[0][:8], data[1][:8])] * 2
    broken = (np.where(np.arange(8)[:, None] == 5, 0.0, data[0][:8]).astype(np.float32), data[1][:8])
    tx = optax.sgd(0.1, momentum=0.9)
    with pytest.raises(pae.DivergedError, match="at step 2;") as caught:
        quick_fit(state, "b", [*batches, broken, *batches], optimizer=tx, epochs=1, net=net)
    found = caught.value.state
    good, _ = quick_fit(state, "b", batches, optimizer=tx, epochs=1, net=net)
    assert_same(found.shared["Dense_0"], good.shared["Dense_0"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((found.shared, found.tasks)))
    pae.verify(found)


def test_the_default_loss_is_the_cross_entropy_of_integer_labels_in_float32():
    logits = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    labels = np.array([0, 1, 2, 1, 0], np.uint8)
    shifted = np.exp(logits.astype(np.float64))
    wanted = -np.log(shifted[range(5), labels] / shifted.sum(axis=1))
    found = softmax_cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert softmax_cross_entropy(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(labels)).dtype == jnp.float32


# What is compiled again, and what is not


@dataclasses.dataclass(frozen=True)
class Smoothed:
    """A loss that is its value."""

    alpha: float

    def __call__(self, logits, y):
        return optax.softmax_cross_entropy(logits, optax.smooth_labels(jax.nn.one_hot(y, 2), self.alpha))


def test_the_same_optimizer_traces_nothing_and_a_new_one_of_optax_compiles_again(
    packed, quick_fit, traces, compilations, assert_same
):
    first, second = optax.sgd(0.1, momentum=0.9), optax.sgd(0.1, momentum=0.9)
    one, _ = quick_fit(packed, "a", optimizer=first)
    traces.clear()
    with compilations() as found:
        quick_fit(packed, "a", optimizer=first, epochs=3, key=9)
    assert (traces, found.count) == ([], 0)
    two, _ = quick_fit(packed, "a", optimizer=second)
    assert traces == [1.0]
    assert_same(one.shared, two.shared)


def test_what_is_its_value_traces_nothing_when_it_is_made_anew(packed, quick_fit, traces, compilations):
    make = lambda: {"optimizer": pae.recipes.Sgd(0.1, momentum=0.8), "loss": Smoothed(0.1), "val": None}  # noqa: E731
    quick_fit(packed, "a", **make())
    traces.clear()
    with compilations() as found:
        quick_fit(packed, "a", **make())
    assert (traces, found.count) == ([], 0)
    quick_fit(packed, "a", **{**make(), "optimizer": pae.recipes.Sgd(0.1, momentum=0.7)})
    quick_fit(packed, "a", **{**make(), "loss": Smoothed(0.2)})
    assert traces == [1.0, 1.0]


@pytest.mark.parametrize("make", [pae.recipes.Sgd, pae.recipes.Adam])
def test_the_optimizers_of_recipes_train_by_a_rate_of_their_own_and_need_one(packed, quick_fit, make):
    with pytest.raises(pae.ArgumentError, match=rf"{make.__name__} needs a learning rate here"):
        quick_fit(packed, "a", optimizer=make())
    still, _ = quick_fit(packed, "a", optimizer=make(learning_rate=0.0), parts=("shared",), epochs=1)
    moved, _ = quick_fit(packed, "a", optimizer=make(learning_rate=0.1), parts=("shared",), epochs=1)
    for before, one, two in zip(*(jax.tree.leaves(s.shared) for s in (packed, still, moved)), strict=True):
        np.testing.assert_array_equal(before, one)
        assert (np.asarray(before) != np.asarray(two)).any()


def test_a_sweep_keeps_at_most_eight_train_steps_and_clearing_forgets_all(packed, quick_fit):
    for rate in range(20):
        steps.train_step((float(rate),), Objective(), None)
    assert len(steps._TRAIN._entries) == 8
    array = np.ones(3, np.float32)
    captured, held = weakref.ref(array), array

    def loss(logits, y, held=held):
        return softmax_cross_entropy(logits, y) * held.sum()

    quick_fit(packed, "a", loss=loss, epochs=1)
    del loss, held, array
    assert captured() is not None
    pae.clear_caches()
    gc.collect()
    assert captured() is None
    assert all(not cache._entries for cache in type(steps._TRAIN).every)
    quick_fit(packed, "a", epochs=1)


# Settings that a function reads from outside


class Settings:
    share = 0.0


GLOBAL, DICT, NAMESPACE = 0.0, {"share": 0.0}, SimpleNamespace(share=0.0)
ARRAY, LARGE, HOLDER = np.zeros(2, np.float32), np.zeros(5000, np.float32), {"array": jnp.zeros(5000)}


def through_a_helper():
    return GLOBAL


def reads_a_cell():
    share = 0.0

    def read():
        return share

    def write(value):
        nonlocal share
        share = value

    return read, write


def assign(target, name, value):
    target[name] = value


def set_global(value):
    global GLOBAL
    GLOBAL = value


CELL, SET_CELL = reads_a_cell()
KINDS = {
    "global": (lambda: GLOBAL, set_global),
    "global of a helper": (through_a_helper, set_global),
    "dict": (lambda: DICT["share"], lambda value: assign(DICT, "share", value)),
    "attribute": (lambda: NAMESPACE.share, lambda value: setattr(NAMESPACE, "share", value)),
    "class attribute": (lambda: Settings().share, lambda value: setattr(Settings, "share", value)),
    "closure": (CELL, SET_CELL),
    "array in place": (lambda: ARRAY[1], lambda value: assign(ARRAY, 1, value)),
    "one entry of a large array": (lambda: jnp.asarray(LARGE).sum(), lambda value: assign(LARGE, 4321, value)),
    "array of JAX": (
        lambda: HOLDER["array"].sum(),
        lambda value: assign(HOLDER, "array", jnp.zeros(5000).at[7].set(value)),
    ),
}


def smoothed_by(read):
    def loss(logits, y):
        return optax.softmax_cross_entropy(logits, optax.smooth_labels(jax.nn.one_hot(y, 2), read()))

    return loss


@pytest.mark.parametrize("name", KINDS)
def test_a_changed_setting_of_the_same_loss_and_metric_is_used(net, packed, quick_fit, data, name):
    read, write = KINDS[name]
    loss, metrics = smoothed_by(read), {"share": lambda out, y: read() + 0.0 * out[:, 0]}
    options = {"val": data, "epochs": 1, "batch_size": 40, "parts": ("head",)}
    try:
        write(0.0)
        quick_fit(packed, "a", loss=loss, metrics=metrics, **options)
        write(0.5)
        found, history = quick_fit(packed, "a", loss=loss, metrics=metrics, **options)
        expected, other = quick_fit(packed, "a", loss=Smoothed(0.5), **options)
        for measured in ("loss", "val_loss"):
            assert history.rows[0][measured] == pytest.approx(other.rows[0][measured], rel=1e-6)
        assert history.rows[0]["share"] == history.rows[0]["val_share"] == 0.5
        for one, two in zip(*(jax.tree.leaves(s.tasks["a"].head) for s in (found, expected)), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-7)
        scores = pae.evaluate(net, found, "a", data, loss=loss, metrics=metrics)
        assert (scores["loss"], scores["share"]) == (pytest.approx(history.rows[0]["val_loss"], rel=1e-6), 0.5)
        write(0.25)
        assert pae.evaluate(net, found, "a", data, loss=loss, metrics=metrics)["share"] == 0.25
    finally:
        write(0.0)


@pytest.mark.parametrize("name", ["global of a helper", "dict", "class attribute", "array in place"])
def test_a_changed_setting_of_the_same_optimizer_and_augmentation_is_used(packed, quick_fit, name, bits):
    read, write = KINDS[name]
    tx = optax.GradientTransformation(
        lambda params: (), lambda grads, state, params=None: (jax.tree.map(lambda g: -read() * g, grads), state)
    )
    options = {"epochs": 1, "batch_size": 40, "parts": ("head",)}
    augment = lambda key, x: read() * x  # noqa: E731
    fits = {
        "optimizer": lambda: quick_fit(packed, "a", optimizer=tx, **options)[0],
        "augmentation": lambda: quick_fit(packed, "a", augment=augment, **options)[0],
    }
    try:
        for what, fit in fits.items():
            write(0.0)
            still = bits(fit().tasks["a"].head)
            write(0.5)
            half = bits(fit().tasks["a"].head)
            write(1.0)
            whole = bits(fit().tasks["a"].head)
            assert still != half != whole != still, what
            if what == "optimizer":
                assert still == bits(packed.tasks["a"].head)
    finally:
        write(0.0)


# Optimizers of every kind


def test_an_optimizer_that_asks_for_the_loss_gets_it(packed, quick_fit):
    """The rate falls by half after every accumulated pair of steps, since no loss is lower by a factor of ten."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, rtol=0.9, accumulation_size=2)
    _, history = quick_fit(packed, "a", optimizer=optax.chain(optax.sgd(0.1), plateau), epochs=2)
    state = history.opt_state[1]
    assert float(state.scale) < 1.0
    assert np.isfinite(float(state.best_value)) and float(state.best_value) > 0


def test_a_gradient_accumulated_over_steps_is_one_step_of_the_large_batch(packed, quick_fit, data):
    x, y = data[0][:32], data[1][:32]
    pieces = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 32, 8)]
    parts = ("shared", "head")  # no batch statistics
    many = optax.MultiSteps(optax.sgd(0.5), 4)
    found, _ = quick_fit(packed, "a", pieces, optimizer=many, epochs=1, parts=parts)
    whole, _ = quick_fit(packed, "a", [(x, y)], optimizer=optax.sgd(0.5), epochs=1, parts=parts)
    for one, two in zip(jax.tree.leaves(found.shared), jax.tree.leaves(whole.shared), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


def test_updates_that_are_not_finite_for_the_shared_weights_alone_are_no_good_step(packed, quick_fit):
    rates = {"shared": optax.sgd(jnp.nan), "others": optax.sgd(0.01)}
    tx = optax.partition(rates, lambda params: {part: "shared" if part == "shared" else "others" for part in params})
    with pytest.raises(pae.DivergedError, match="at step 0;"):
        quick_fit(packed, "a", optimizer=tx)


BEYOND_FIT = {
    "lbfgs": lambda: optax.lbfgs(),
    "lookahead": lambda: optax.lookahead(optax.sgd(0.1), 5, 0.5),
    "sam": lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05)),
    "opaque sam": lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05), opaque_mode=True),
    "chained sam": lambda: optax.chain(optax.clip(1.0), optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05))),
}


@pytest.mark.parametrize("name", BEYOND_FIT)
def test_fit_refuses_optimizers_that_need_more_than_gradients_and_says_where_they_run(
    packed, quick_fit, name, state_facts
):
    before = state_facts(packed)
    with pytest.raises(pae.ArgumentError, match=r"Write the step yourself.*pae.TrainState"):
        quick_fit(packed, "a", optimizer=BEYOND_FIT[name]())
    assert state_facts(packed) == before
