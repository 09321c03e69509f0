"""The compiled steps themselves: the gate, the forward mask that is left out, and steps that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import pae_jax as pae
from pae_jax import ownership, training
from pae_jax.trees import flatten


def carry_of(net, state, task, tx):
    entry = state.tasks[task]
    parts = (state.shared, entry.local, entry.head, entry.pick)
    rule = training.Rule(tx, training.softmax_cross_entropy)
    opt_state = training.optimizer_init(net, rule)(*parts, state.owner, ownership.id_array(entry.id))
    zero, none = jnp.zeros((), jnp.int32), jnp.zeros(())
    start = training.Carry(*parts, opt_state=opt_state, step=zero, bad_step=zero - 1, loss_sum=none)
    return jax.tree.map(jnp.copy, start)


def run(net, state, task, tx, batches, masked, loss=training.softmax_cross_entropy):
    entry = state.tasks[task]
    step = jax.jit(training._make_train_step(net, entry, training.Rule(tx, loss), masked), donate_argnums=0)
    carry, losses = carry_of(net, state, task, tx), []
    for x, y in batches:
        carry = step(carry, state.owner, ownership.id_array(entry.id), jax.random.key(0), np.ones(2, np.float32), x, y)
        losses.append(np.asarray(carry.loss_sum))
    return carry, losses


def test_leaving_out_the_forward_mask_under_sharing_all_changes_no_bit_of_loss_gradient_or_weights(
    net, third, data, assert_same
):
    """The gradient is compared too: plain SGD of rate 1 writes it into the weights, momentum keeps it."""
    state = pae.prune(third, "c", 0.5)
    batches = [(data[0][i : i + 8], data[1][i : i + 8]) for i in range(0, 32, 8)]
    tx = optax.sgd(1.0, momentum=0.9)
    plain, losses = run(net, state, "c", tx, batches, masked=False)
    masked, masked_losses = run(net, state, "c", tx, batches, masked=True)
    assert_same(plain._asdict(), masked._asdict())
    assert_same(losses, masked_losses)
    moved = [
        (np.asarray(a) != np.asarray(b)).any()
        for a, b in zip(jax.tree.leaves(plain.shared), jax.tree.leaves(state.shared), strict=True)
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
    shorter = numbered(data, 5)
    good, _ = quick_fit(third, "c", lambda epoch: shorter, optimizer=tx, epochs=1, loss=loss, pruning=schedule)
    assert state_facts(caught.value.state) == state_facts(good)


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


def test_a_rate_that_is_not_finite_is_no_good_step_whatever_is_trained(third, quick_fit, data, state_facts):
    def rate(step):
        return np.nan if step == 2 else 1.0

    options = {"optimizer": optax.sgd(0.01), "epochs": 1, "parts": ("shared",), "loss": loss_that_breaks_at(-1)}
    with pytest.raises(pae.DivergedError, match="at step 2;") as caught:
        quick_fit(third, "c", numbered(data, 4), rate=rate, **options)
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
    found = training.softmax_cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert training.softmax_cross_entropy(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(labels)).dtype == jnp.float32
