"""Which epoch is kept, and the plateau rule: its rates, its returns to the best epoch and its end."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pae_jax as pae

MOMENTUM = 0.5


def sum_of_logits(logits, y):
    """A loss whose gradient on the head's bias is 1 at every step, whatever the weights."""
    return logits.sum(axis=-1)


def bias(state, task="a"):
    return float(state.tasks[task].head["params"]["bias"][0])


class Scores:
    """Give the scores of a list, one per epoch, and note the bias that each epoch ended with."""

    def __init__(self, scores):
        self.scores, self.biases = iter(scores), []

    def __call__(self, state):
        self.biases.append(bias(state))
        return next(self.scores)


def rule_by_hand(scores, steps, patience, factor, stop):
    """The published rule, for a parameter of gradient 1 under momentum: the bias after each epoch, and the best one."""
    here = best = (0.0, 0.0)
    rate, waited, decays, highest, best_epoch, biases = 1.0, 0, 0, -math.inf, 0, []
    for epoch, score in enumerate(scores, 1):
        value, velocity = here
        for _ in range(steps):
            velocity = MOMENTUM * velocity + 1.0
            value -= rate * velocity
        here = (value, velocity)
        biases.append(value)
        if score > highest or epoch == 1:
            highest, best_epoch, best, waited, decays = score, epoch, here, 0, 0
        else:
            waited += 1
        if waited >= patience:
            waited, decays = 0, decays + 1
            if decays == stop:
                break
            rate, here = rate * factor, best
    return biases, best_epoch, best[0]


@pytest.fixture(scope="module")
def train(packed, quick_fit, data):
    """Train the head alone, two steps an epoch, on scores of a list; return state, history and scores."""
    x, y = data[0][:32], data[1][:32]

    def run(scores, steps=2, plateau=None, **options):
        score = Scores(scores)
        batches = [(x, y)] * steps
        tx = optax.chain(optax.trace(MOMENTUM), optax.scale(-1.0))
        state, history = quick_fit(
            packed,
            "a",
            batches,
            optimizer=tx,
            epochs=len(scores),
            parts=("head",),
            loss=sum_of_logits,
            keep=pae.Best(score, plateau),
            **options,
        )
        return state, history, score

    return run


@pytest.mark.parametrize(
    "change",
    [
        {"patience": 0},
        {"patience": 1.5},
        {"patience": True},
        {"stop": 0},
        {"stop": math.inf},
        {"factor": 0.0},
        {"factor": 1.01},
        {"factor": math.nan},
        {"factor": "tenth"},
    ],
    ids=str,
)
def test_a_plateau_refuses_values_out_of_range_by_name(change):
    with pytest.raises(pae.ArgumentError, match=f"^{next(iter(change))} must"):
        pae.Plateau(**change)


def test_a_plateau_needs_something_to_go_by(packed, quick_fit):
    with pytest.raises(
        pae.ArgumentError, match=r"chooses by validation data; pass val=, or keep=pae.Best\(score=...\)"
    ):
        quick_fit(packed, "a", keep=pae.Best(plateau=pae.Plateau()))


def test_a_plateau_lowers_the_rate_goes_back_to_the_best_epoch_and_stops_as_often_as_it_is_told(train):
    """The numbers are worked out on paper; every one is a sum of halves, so the comparison is exact."""
    scores = [0.5, 0.7, 0.6, 0.7, 0.8, 0.1, 0.1, 0.1, 0.1, 0.9, 0.9]
    state, history, score = train(scores, steps=1, plateau=pae.Plateau(patience=2, factor=0.5, stop=2))
    # Epochs 1, 2: velocity 1, 1.5, bias -1, -2.5. Two epochs without gain, 0.6 and an equal 0.7: back, rate 0.5.
    # Epoch 5 gains, velocity 1.75, bias -2.5 - 0.875. Epochs 6, 7 and 8, 9 do not: rate 0.25, then the end.
    expected = [-1.0, -2.5, -4.25, -6.125, -3.375, -4.3125, -5.28125, -3.84375, -4.328125]
    assert score.biases == expected
    assert [row["epoch"] for row in history.rows] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [row["score"] for row in history.rows] == scores[:9]
    assert history.kept_epoch == 5
    assert bias(state) == -3.375


@given(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=14),
    st.integers(1, 3),
    st.sampled_from([1.0, 0.5, 0.25]),
    st.integers(1, 3),
)
@settings(max_examples=30, deadline=None)
def test_a_plateau_follows_the_published_rule_for_any_scores(train, scores, patience, factor, stop):
    state, history, score = train(scores, plateau=pae.Plateau(patience, factor, stop))
    biases, best_epoch, best = rule_by_hand(scores, 2, patience, factor, stop)
    assert score.biases == biases
    assert (history.kept_epoch, bias(state)) == (best_epoch, best)
    assert len(history.rows) == len(biases)


def test_a_schedule_counts_real_steps_also_where_a_plateau_goes_back(rated_fit, packed, data):
    seen, score = [], Scores([0.5, 0.4, 0.4, 0.4, 0.4])
    _, history = rated_fit(
        packed,
        "a",
        [(data[0][:32], data[1][:32])] * 2,
        rates=lambda step: seen.append(step) or (1.0, 1.0),
        optimizer=optax.chain(optax.trace(MOMENTUM), optax.scale(-1.0)),
        epochs=5,
        parts=("head",),
        loss=sum_of_logits,
        keep=pae.Best(score, pae.Plateau(patience=1, factor=1.0, stop=4)),
    )
    assert seen == list(range(10))
    assert len(history.rows) == 5
    assert score.biases[1:] == [score.biases[1]] * 4


def test_what_lowers_the_rate_of_the_weights_lowers_that_of_the_picks_too(net, frozen, quick_fit, data):
    """A score of 0.5 loses the rate at every step: 1 and 1 before the plateau, 0.5 after it; the bias alike."""
    state = pae.pack(net, frozen, "b", head=2, key=jax.random.key(3), sharing="picked", picking=pae.Picking(0.0, 0.5))
    ones = optax.GradientTransformation(
        lambda p: (), lambda g, s, p=None: (jax.tree.map(lambda g: -jnp.ones_like(g), g), s)
    )
    picks, biases, scores = [], [], iter([0.9, 0.1, 0.1])

    def score(now):
        pick = jax.tree.leaves(now.tasks["b"].pick)[0]
        picks.append(float(np.asarray(pick)[np.asarray(jax.tree.leaves(now.owner)[0]) == 1][0]))
        biases.append(bias(now, "b"))
        return next(scores)

    plateau = pae.Plateau(patience=1, factor=0.5, stop=2)
    quick_fit(state, "b", [data], epochs=3, optimizer=ones, keep=pae.Best(score, plateau))
    assert picks == [-0.5, -1.5, -1.0]
    assert biases == [-1.0, -2.0, -1.5]


def test_epochs_before_the_end_of_pruning_neither_wait_nor_count_as_best(train):
    scores = [0.9, 0.8, 0.1, 0.2, 0.1, 0.1]
    schedule = pae.CubicSchedule(final=0.5, end=3, every=1)
    _, history, _ = train(scores, steps=1, pruning=schedule, plateau=pae.Plateau(patience=2, factor=0.5, stop=1))
    assert history.kept_epoch == 4
    assert len(history.rows) == 6


# Which epoch is kept


def test_score_ranks_the_epochs_in_place_of_validation_accuracy(train, packed, quick_fit, data):
    for scores, best in (([0.1, 0.9, 0.3], 2), ([3, 2, 1], 1), ([-5.0, -4.0, np.float32(-3.0)], 3), ([0.5, 0.5], 1)):
        state, history, score = train(scores)
        assert history.kept_epoch == best
        assert bias(state) == score.biases[best - 1]
    _, history = quick_fit(packed, "a", epochs=3, val=data, keep=pae.Best(score=Scores([2.0, 3.0, 1.0])))
    assert history.kept_epoch == 2
    assert list(history.rows[0]) == ["epoch", "loss", "accuracy", "val_accuracy", "val_loss", "score"]


@pytest.mark.parametrize(
    ("scores", "best"), [([0.5, 0.9, math.nan, 0.1], 2), ([math.nan, -1.0, math.nan], 2), ([0.1, math.nan], 1)], ids=str
)
def test_a_nan_score_is_never_the_best(train, scores, best):
    _, history, _ = train(scores)
    assert history.kept_epoch == best
    _, history, _ = train(scores, plateau=pae.Plateau(patience=len(scores)))
    assert history.kept_epoch == best


def test_a_score_may_use_the_state_and_the_kept_one_outlives_the_training(net, packed, quick_fit, data):
    values = []

    def score(state):
        pae.check(state)
        values.append(-pae.evaluate(net, state, "a", data)["loss"])
        return values[-1]

    state, history = quick_fit(packed, "a", epochs=4, keep=pae.Best(score, pae.Plateau(1, 0.5, 5)))
    assert values[history.kept_epoch - 1] == max(values)
    assert pae.evaluate(net, state, "a", data)["loss"] == pytest.approx(-max(values))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((state, history.opt_state)))


def test_on_a_plateau_of_accuracy_a_lower_loss_is_kept_but_buys_no_time(packed, quick_fit, data):
    plateau = pae.Plateau(patience=3, factor=1.0, stop=2)
    options = {"epochs": 30, "val": data, "optimizer": optax.sgd(1e-4), "parts": ("head",)}
    _, history = quick_fit(packed, "a", keep=pae.Best(plateau=plateau), **options)
    accuracies = {row["val_accuracy"] for row in history.rows}
    losses = [row["val_loss"] for row in history.rows]
    assert len(accuracies) == 1
    assert losses[:4] == sorted(losses[:4], reverse=True)
    assert len(history.rows) == 7
    assert history.kept_epoch == int(np.argmin(losses)) + 1


def test_without_labels_a_lower_validation_loss_is_the_better_score(packed, quick_fit, data):
    x, target = data[0], data[1].astype(np.float32)
    _, history = quick_fit(
        packed,
        "a",
        [(x, target)],
        epochs=12,
        parts=("head",),
        val=(x, target),
        keep=pae.Best(plateau=pae.Plateau(patience=3, factor=0.5, stop=1)),
        loss=lambda logits, y: (logits[:, 0] - y) ** 2,
        optimizer=optax.sgd(0.01),
    )
    losses = [row["val_loss"] for row in history.rows]
    assert losses == sorted(losses, reverse=True)
    assert history.kept_epoch == len(losses) == 12
