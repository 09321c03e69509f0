"""`fit(resume=history)`: two epochs and two more are the same bits as four, whatever else is asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import pae_jax as pae

ADAM = optax.adam(optax.cosine_decay_schedule(0.05, 20))
SGD = optax.sgd(0.05, momentum=0.9)


class Sampled(nn.Module):
    width: float

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(16)(x))
        return nn.Dropout(0.5, deterministic=not train)(x)


def noisy(key, x):
    return x + 0.5 * jax.random.normal(key, x.shape)


class Listed:
    """A score per epoch, from a list."""

    def __init__(self):
        self.left = [0.5, 0.7, 0.6, 0.6]

    def __call__(self, state):
        return self.left.pop(0)


@pytest.fixture
def halves(quick_fit, state_facts, bits):
    """Check that 2 + 2 epochs are 4; options are made anew for each of the two trainings."""

    def everything(state, history):
        best = history.progress.best
        kept = [ts.replace(key=None) for ts in (history.end, *([] if best is None else [best.ts]))]
        progress = (history.progress.waited, history.progress.decays, history.progress.rate)
        return state_facts(state), bits(state.tasks), history.rows, history.kept_epoch, bits(kept), progress

    def check(start, task, *args, make=dict, **options):
        options = {"optimizer": ADAM, **options}
        whole = quick_fit(start, task, *args, epochs=4, **options, **make())
        made = make()
        state, history = quick_fit(start, task, *args, epochs=2, **options, **made)
        found = quick_fit(state, task, *args, epochs=2, resume=history, **options, **made)
        assert everything(*found) == everything(*whole)
        assert [row["epoch"] for row in found[1].rows] == [1, 2, 3, 4]
        return found

    return check


def test_two_epochs_and_two_more_are_the_same_bits_as_four(packed, second, halves, data):
    _, history = halves(packed, "a")
    assert int(history.end.step) == 20
    halves(second, "b", val=data, augment=noisy)


def test_a_stream_goes_on_with_the_next_epoch(packed, halves, data):
    x, y = data
    asked = []

    def train(epoch):
        asked.append(epoch)
        return iter([(np.roll(x, epoch, 0), y)] * 2)

    halves(packed, "a", train)
    assert asked == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("turn", [2, 9], ids=["best in the first half", "best in the second half"])
def test_the_best_epoch_is_chosen_over_both_halves(packed, halves, data, turn):
    """Labels turn round, so that validation gets worse from there on."""
    x, y = data

    def train(epoch):
        return iter([(x, y if epoch < turn else 1 - y)] * 4)

    _, history = halves(packed, "a", train, val=data, keep="best")
    assert history.kept_epoch == 2 if turn == 2 else history.kept_epoch > 2


@pytest.mark.parametrize("patience", [1, 2])
def test_a_plateau_goes_on_waiting_and_keeps_its_rate(packed, halves, patience):
    keep = lambda: {"keep": pae.Best(Listed(), pae.Plateau(patience, 0.5, 3))}  # noqa: E731
    _, history = halves(packed, "a", make=keep, optimizer=SGD)
    assert history.kept_epoch == 2
    assert history.progress.rate == (0.25 if patience == 1 else 0.5)


def test_a_training_that_its_plateau_ended_stays_ended(packed, quick_fit, state_facts):
    rule = lambda: pae.Best(Listed(), pae.Plateau(1, 0.5, 1))  # noqa: E731
    keep = rule()
    state, history = quick_fit(packed, "a", epochs=3, keep=keep, optimizer=SGD)
    found, again = quick_fit(state, "a", epochs=1, keep=keep, optimizer=SGD, resume=history)
    whole, expected = quick_fit(packed, "a", epochs=4, keep=rule(), optimizer=SGD)
    assert again.rows == expected.rows
    assert len(again.rows) == 3
    assert state_facts(found) == state_facts(whole)


@pytest.mark.parametrize(
    "schedule",
    [
        pae.CubicSchedule(final=0.5, end=10, every=3),
        pae.CubicSchedule(final=0.7, end=9, begin=2, every=2, scope="global"),
    ],
    ids=["leaf", "global"],
)
def test_gradual_pruning_that_ended_stays_ended(packed, halves, schedule, data):
    state, _ = halves(packed, "a", pruning=schedule, val=data, keep="best")
    assert pae.free_fraction(state) == pytest.approx(schedule.final, abs=0.01)


def test_gradual_pruning_counts_its_steps_from_the_first_half(packed, quick_fit, state_facts):
    schedule = pae.CubicSchedule(final=0.5, begin=11, end=19, every=3)
    whole, _ = quick_fit(packed, "a", epochs=4, pruning=schedule)
    state, history = quick_fit(packed, "a", epochs=2)
    found, _ = quick_fit(state, "a", epochs=2, pruning=schedule, resume=history)
    assert state_facts(found) == state_facts(whole)
    assert pae.free_fraction(found) == 0.5


def test_dropout_and_running_statistics_go_on(halves):
    net = pae.linen(Sampled, jnp.zeros((1, 4)))
    halves(pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1)), "a", net=net)


def test_picks_and_many_steps_in_one_call_go_on(net, frozen, halves):
    state = pae.pack(net, frozen, "b", head=2, key=jax.random.key(3), sharing="picked")
    halves(state, "b", devices=pae.Devices(steps_per_call=3))


def test_a_training_that_the_user_stopped_goes_on(packed, quick_fit, state_facts):
    whole, _ = quick_fit(packed, "a", epochs=4)
    state, history = quick_fit(packed, "a", epochs=4, on_epoch=lambda state, row: row["epoch"] == 3)
    seen = []
    found, history = quick_fit(state, "a", epochs=1, resume=history, on_step=lambda row: seen.append(row["step"]))
    assert state_facts(found) == state_facts(whole)
    assert len(history.rows) == 4
    assert seen == [16, 17, 18, 19, 20]


def test_one_history_may_be_gone_on_from_twice_and_with_another_schedule_of_the_same_optimizer(
    packed, quick_fit, state_facts
):
    state, history = quick_fit(packed, "a")
    one, _ = quick_fit(state, "a", resume=history)
    two, _ = quick_fit(state, "a", resume=history)
    assert state_facts(one) == state_facts(two)
    slower, _ = quick_fit(state, "a", resume=history, optimizer=optax.adam(1e-4))
    assert state_facts(slower) != state_facts(one)
    none, same = quick_fit(state, "a", resume=history, epochs=0)
    assert state_facts(none) == state_facts(state)
    assert same.rows == history.rows


# What is refused


def test_the_history_of_another_state_is_refused(net, packed, empty, quick_fit, vector_module):
    state, history = quick_fit(packed, "a")
    with pytest.raises(pae.ArgumentError, match="the state was pruned or packed since that fit: owners of 'Dense_0"):
        quick_fit(pae.prune(state, "a", 0.5), "a", resume=history)
    later = pae.pack(net, pae.freeze(pae.prune(state, "a", 0.5), "a"), "b", head=2, key=jax.random.key(3))
    with pytest.raises(pae.ArgumentError, match="resume= is the history of another task, width or network than 'b'"):
        quick_fit(later, "b", resume=history)
    namesake = pae.pack(net, empty, "b", head=2, key=jax.random.key(1))  # of the same id, arrays and owners
    with pytest.raises(pae.ArgumentError, match="resume= is the history of another task, width or network than 'b'"):
        quick_fit(namesake, "b", resume=history)
    other = pae.linen(lambda width: vector_module(width), jnp.zeros((1, 4)))
    with pytest.raises(pae.ArgumentError, match="resume= is the history of another task, width or network than 'a'"):
        quick_fit(state, "a", net=other, resume=history)
    with pytest.raises(pae.PhaseError, match="task 'a' is frozen"):
        quick_fit(pae.freeze(state, "a"), "a", resume=history)


def test_the_history_of_another_head_is_refused(net, packed, empty, quick_fit):
    _, history = quick_fit(packed, "a")
    other = pae.pack(net, empty, "a", head=5, key=jax.random.key(1))
    with pytest.raises(pae.PaeError, match="head"):
        quick_fit(other, "a", resume=history)


def test_the_history_of_another_optimizer_is_refused(packed, quick_fit):
    state, history = quick_fit(packed, "a", optimizer=SGD, epochs=1)
    for optimizer in (ADAM, optax.sgd(0.1), pae.recipes.Sgd(learning_rate=0.1)):
        with pytest.raises(pae.PaeError, match="optimizer"):
            quick_fit(state, "a", resume=history, optimizer=optimizer)


def test_the_history_of_other_parts_is_refused(packed, quick_fit):
    state, history = quick_fit(packed, "a", parts=("head",), epochs=1)
    with pytest.raises(pae.PaeError, match="parts"):
        quick_fit(state, "a", resume=history)
    state, history = quick_fit(packed, "a", epochs=1)
    with pytest.raises(pae.PaeError, match="parts"):
        quick_fit(state, "a", resume=history, parts=("head",))
    quick_fit(state, "a", resume=history, parts=["pick", "head", "shared", "local"])  # the order means nothing


def test_a_training_that_diverged_has_no_end_to_go_on_from(packed, quick_fit, data):
    batches = [(data[0], data[1].astype(np.float32))] * 3
    loss = lambda logits, y: jnp.inf * logits[:, 0]  # noqa: E731
    with pytest.raises(pae.DivergedError) as caught:
        quick_fit(packed, "a", batches, loss=loss)
    assert caught.value.history.end is None
    assert caught.value.history.opt_state is None
    with pytest.raises(pae.ArgumentError, match="resume= needs the history of a fit that did not diverge"):
        quick_fit(caught.value.state, "a", resume=caught.value.history)
