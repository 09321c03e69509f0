"""fit, evaluate, predict and features: what they compute, what they leave alone, what they refuse."""

import functools
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import pae_jax as pae
from pae_jax.trees import flatten


def logits_of(net, state, task, x):
    """A task's logits by hand: the module of its own, on the weights it sees."""
    entry = state.tasks[task]
    masks = pae.masks(state, task)
    weights = jax.tree.map(lambda m, w: jnp.where(m, w, 0), masks, state.shared)
    params = {**entry.local.get("params", {})}
    for name, layer in weights.items():
        params[name] = {**params.get(name, {}), **layer}
    return params, entry


def softmax_loss(logits, y):
    logits = np.asarray(logits, np.float64)
    return float(np.mean(np.log(np.exp(logits).sum(axis=-1)) - np.take_along_axis(logits, y[..., None], -1)[..., 0]))


# fit


def test_the_same_key_gives_the_same_bits_and_another_key_others(packed, quick_fit, assert_same):
    one, history = quick_fit(packed, "a")
    two, again = quick_fit(packed, "a")
    assert_same(
        (one.shared, one.tasks["a"].local, one.tasks["a"].head), (two.shared, two.tasks["a"].local, two.tasks["a"].head)
    )
    assert history.rows == again.rows
    other, _ = quick_fit(packed, "a", key=99)
    assert (np.asarray(jax.tree.leaves(other.shared)[0]) != np.asarray(jax.tree.leaves(one.shared)[0])).any()


def test_the_callers_arrays_are_neither_deleted_nor_changed(second, quick_fit, data, state_facts, bits):
    x, y = jnp.asarray(data[0]), jnp.asarray(data[1])
    before = state_facts(second)
    trained, history = quick_fit(second, "b", (x, y), val=(x, y), keep="best")
    kept_bits = lambda: [bits(ts.replace(key=None)) for ts in (history.progress.best.ts, history.end)]  # noqa: E731
    after, before_resuming = state_facts(trained), kept_bits()
    quick_fit(trained, "b", (x, y), val=(x, y), keep="best", resume=history)
    kept = (second, trained, history.end, history.opt_state, history.progress.best.ts, x, y)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(kept))
    assert (state_facts(second), state_facts(trained)) == (before, after)
    assert kept_bits() == before_resuming
    np.testing.assert_array_equal(x, data[0])


def test_the_loss_falls_and_the_history_has_one_row_per_epoch(packed, quick_fit, data):
    _, history = quick_fit(packed, "a", epochs=30, val=data, optimizer=optax.adam(0.01))
    assert [row["epoch"] for row in history.rows] == list(range(1, 31))
    assert list(history.rows[0]) == ["epoch", "loss", "accuracy", "val_accuracy", "val_loss"]
    assert history.rows[-1]["loss"] < 0.5 * history.rows[0]["loss"]
    assert history.kept_epoch == 30
    assert history.rows[-1]["val_accuracy"] > 0.9


def test_the_loss_of_a_row_is_the_mean_over_the_steps_of_the_epoch(packed, quick_fit, data):
    """With a learning rate of 0 and one batch per epoch the loss is that of the untrained network in training mode."""
    _, whole = quick_fit(packed, "a", optimizer=optax.sgd(0.0), batch_size=40, epochs=2)
    _, pieces = quick_fit(packed, "a", [(data[0], data[1])] * 4, optimizer=optax.sgd(0.0), epochs=1)
    assert whole.rows[0]["loss"] == pytest.approx(whole.rows[1]["loss"], rel=1e-5)
    assert pieces.rows[0]["loss"] == pytest.approx(whole.rows[0]["loss"], rel=1e-5)


def test_no_epochs_change_nothing(packed, quick_fit, state_facts):
    state, history = quick_fit(packed, "a", epochs=0)
    assert state_facts(state) == state_facts(packed)
    assert history.rows == ()
    assert history.kept_epoch == 0


def test_keep_best_returns_the_epoch_of_highest_validation_accuracy_ties_by_the_lower_loss(
    net, packed, quick_fit, data, assert_same
):
    """Labels turn round half-way, so validation accuracy on the first half's labels rises, then falls."""
    x, y = data

    def train(epoch):
        return iter([(x, y if epoch < 6 else 1 - y)] * 4)

    tx = optax.adam(0.05)
    state, history = quick_fit(packed, "a", train, epochs=12, val=data, keep="best", optimizer=tx)
    scores = [(row["val_accuracy"], -row["val_loss"]) for row in history.rows]
    best = scores.index(max(scores))
    assert scores[0] < scores[best] > scores[-1]
    assert history.kept_epoch == best + 1
    stopped, _ = quick_fit(packed, "a", train, epochs=best + 1, val=data, optimizer=tx)
    assert_same(
        (state.shared, state.tasks["a"].local, state.tasks["a"].head),
        (stopped.shared, stopped.tasks["a"].local, stopped.tasks["a"].head),
    )
    last, history = quick_fit(packed, "a", train, epochs=12, val=data, optimizer=tx)
    assert history.kept_epoch == 12
    assert pae.evaluate(net, state, "a", data)["accuracy"] > pae.evaluate(net, last, "a", data)["accuracy"]


def test_keep_best_chooses_only_among_epochs_after_the_end_of_pruning(packed, quick_fit, data):
    schedule = pae.CubicSchedule(final=0.9, end=20, every=5)
    state, history = quick_fit(
        packed, "a", epochs=6, val=data, keep="best", pruning=schedule, optimizer=optax.adam(0.05)
    )
    assert history.kept_epoch >= 4
    counts = [int((o == 0).sum()) for o in jax.tree.leaves(state.owner)]
    assert counts == [round(0.9 * o.size) for o in jax.tree.leaves(state.owner)]


def squared(logits, y):
    return (logits[:, 0] - y) ** 2


def test_keep_best_without_accuracy_takes_the_lowest_loss_and_a_nan_never_counts_as_best(packed, quick_fit, data):
    x, y = data
    target = y.astype(np.float32)
    calls = []

    def val(epoch):
        calls.append(epoch)
        return iter([(x, np.where(len(calls) == 3, 1e30, 1.0) * target)])  # its square is infinite

    def loss(logits, labels):
        losses = squared(logits, labels)
        return jnp.where(jnp.isinf(losses).any(), jnp.nan, losses)

    _, history = quick_fit(
        packed, "a", (x, target), epochs=4, val=val, keep="best", loss=loss, optimizer=optax.adam(0.02)
    )
    losses = [row["val_loss"] for row in history.rows]
    assert np.isnan(losses[2])
    assert history.kept_epoch == int(np.nanargmin(losses)) + 1


def test_a_batch_larger_than_the_data_is_the_whole_data(packed, quick_fit, data, assert_same):
    large, _ = quick_fit(packed, "a", batch_size=1000)
    exact, _ = quick_fit(packed, "a", batch_size=40)
    assert_same(large.shared, exact.shared)


def mean_loss(logits, y):
    return jnp.mean(squared(logits, y))


def test_a_custom_loss_may_be_a_mean_or_one_loss_per_example(packed, quick_fit, data):
    batch = (data[0], data[1].astype(np.float32))
    mean, history = quick_fit(packed, "a", batch, loss=mean_loss, val=batch)
    single, other = quick_fit(packed, "a", batch, loss=squared, val=batch)
    for a, b in zip(jax.tree.leaves(mean.shared), jax.tree.leaves(single.shared), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert history.rows[-1]["val_loss"] == pytest.approx(other.rows[-1]["val_loss"], rel=1e-5)
    assert "val_accuracy" not in history.rows[-1]


class EveryStep(nn.Module):
    width: float

    @nn.compact
    def __call__(self, x, train):
        return nn.tanh(nn.Dense(5)(x))


def test_labels_may_be_sequences(quick_fit):
    net = pae.linen(EveryStep, jnp.zeros((1, 3, 4)))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 3, 4)).astype(np.float32), rng.integers(0, 3, (20, 3))
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=3, key=jax.random.key(1))
    state, _ = quick_fit(state, "a", (x, y), net=net, val=(x, y))
    scores = pae.evaluate(net, state, "a", (x, y), batch_size=6)
    logits = np.asarray(pae.predict(net, state, "a", x))
    assert logits.shape == (20, 3, 3)
    assert scores["accuracy"] == pytest.approx((logits.argmax(-1) == y).mean())
    assert scores["loss"] == pytest.approx(softmax_loss(logits, y), rel=1e-5)
    with pytest.raises(pae.DataError, match=r"labels have shape \(20,\), expected"):
        quick_fit(state, "a", (x, y[:, 0]), net=net)


@pytest.mark.parametrize("options", [{"epochs": -1}, {"epochs": 1.5}, {"epochs": True}], ids=str)
def test_fit_refuses_a_number_of_epochs_that_is_none(packed, quick_fit, options):
    with pytest.raises(pae.ArgumentError, match="epochs must be an integer of at least 0, found"):
        quick_fit(packed, "a", **options)


@pytest.mark.parametrize("size", [0, -3, 2.5, "all", None])
def test_a_batch_size_that_is_no_positive_integer_is_refused(net, packed, quick_fit, data, size):
    with pytest.raises(pae.PaeError, match="batch_size must be an integer of at least 1, found"):
        quick_fit(packed, "a", batch_size=size)
    with pytest.raises(pae.PaeError, match="batch_size must be an integer of at least 1, found"):
        pae.evaluate(net, packed, "a", data, batch_size=size)
    if size is not None:
        with pytest.raises(pae.PaeError, match="batch_size must be an integer of at least 1, found"):
            pae.predict(net, packed, "a", data[0], batch_size=size)


def test_keep_best_needs_validation_data(packed, quick_fit):
    with pytest.raises(pae.ArgumentError, match="keep='best' chooses by validation data; pass val="):
        quick_fit(packed, "a", keep="best")
    with pytest.raises(pae.ArgumentError, match="keep must be one of 'last', 'best', found 'first'"):
        quick_fit(packed, "a", keep="first")


def test_fit_refuses_what_is_no_optimizer_or_no_key(packed, quick_fit, net, data):
    with pytest.raises(pae.ArgumentError, match="an optimizer must be an optax gradient transformation, found float"):
        quick_fit(packed, "a", optimizer=0.1)
    with pytest.raises(pae.ArgumentError, match=r"key must be one random key such as jax.random.key\(0\)"):
        pae.fit(net, packed, "a", data, optimizer=optax.sgd(0.1), epochs=1, key=0)
    with pytest.raises(pae.ArgumentError, match="key must be one random key"):
        keys = jax.random.split(jax.random.key(0))
        pae.fit(net, packed, "a", data, optimizer=optax.sgd(0.1), epochs=1, key=keys)


def test_a_raw_uint32_key_works_like_a_typed_one(net, packed, empty, assert_same):
    raw = pae.init(net, np.asarray(jax.random.key_data(jax.random.key(0))))
    assert_same(raw.shared, empty.shared)


def test_fit_refuses_unknown_and_frozen_tasks(frozen, quick_fit):
    with pytest.raises(pae.UnknownTaskError, match="unknown task 'b'; the state has: 'a'"):
        quick_fit(frozen, "b")
    with pytest.raises(pae.PhaseError, match=r"fit cannot be called now: task 'a' is frozen. Valid calls: predict"):
        quick_fit(frozen, "a")


@pytest.mark.parametrize("change", ["broadcasts", "missing", "extra", "dtype"])
def test_an_owner_tree_of_another_structure_is_refused_by_leaf_wherever_it_is_used(
    net, second, quick_fit, data, change, tmp_path
):
    """A mask of shape (1, n) would broadcast over the kernel without a word."""
    owner = {name: dict(layer) for name, layer in second.owner.items()}
    if change == "broadcasts":
        owner["Dense_0"]["kernel"] = jnp.zeros((1, 8), jnp.int8)
    elif change == "missing":
        del owner["Dense_0"]
    elif change == "extra":
        owner["Dense_7"] = owner["Dense_0"]
    else:
        owner["Dense_0"]["kernel"] = owner["Dense_0"]["kernel"].astype(jnp.int32)
    broken = second.replace(owner=owner)
    calls = {
        "predict": lambda: pae.predict(net, broken, "b", data[0]),
        "evaluate": lambda: pae.evaluate(net, broken, "a", data),
        "fit": lambda: quick_fit(broken, "b"),
        "prune": lambda: pae.prune(broken, "b", 0.9),
        "freeze": lambda: pae.freeze(broken, "b"),
        "drop": lambda: pae.drop(broken, "b"),
        "check": lambda: pae.check(broken),
        "save": lambda: pae.save(tmp_path / "stage", broken),
    }
    for name, call in calls.items():
        try:
            call()
        except pae.StructureError as error:
            assert "Dense_" in str(error), name
        except Exception as error:
            pytest.fail(f"{name}: {type(error).__name__} instead of StructureError: {error}")
        else:
            pytest.fail(f"{name} took an owner tree of another structure")
    assert not (tmp_path / "stage").exists()


def test_a_state_of_another_model_is_refused_by_leaf(packed, quick_fit, data):
    net = pae.linen(lambda width: pae.models.MLP(width, (8, 6)), jnp.zeros((1, 4)))
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
    other = pae.linen(lambda width: pae.models.MLP(width, (8, 7)), jnp.zeros((1, 4)))
    for call in (
        lambda: pae.predict(other, state, "a", data[0]),
        lambda: pae.features(other, state, "a", data[0]),
        lambda: pae.evaluate(other, state, "a", data),
        lambda: quick_fit(state, "a", net=other),
        lambda: pae.pack(other, pae.freeze(state, "a"), "b", head=2, key=jax.random.key(0), allow_empty=True),
    ):
        with pytest.raises(
            pae.StructureError,
            match=r"state.shared, leaf 'Dense_1/kernel': found float32\[8,6\], expected float32\[8,7\]",
        ):
            call()


def test_local_variables_of_another_model_are_refused_by_leaf(net, packed, quick_fit, data):
    entry = packed.tasks["a"]
    local = {**entry.local, "params": {k: v for k, v in entry.local["params"].items() if k != "PReLU_0"}}
    broken = packed.replace(tasks={"a": entry.replace(local=local)})
    for call in (
        lambda: pae.predict(net, broken, "a", data[0]),
        lambda: pae.evaluate(net, broken, "a", data),
        lambda: quick_fit(broken, "a"),
    ):
        with pytest.raises(pae.StructureError, match="PReLU_0/negative_slope"):
            call()


def test_progress_shows_a_bar_named_after_the_task_and_silence_shows_none(net, packed, data, adam, capfd, quick_fit):
    pae.fit(net, packed, "a", data, optimizer=adam, epochs=1, batch_size=8, key=jax.random.key(0))
    assert capfd.readouterr().err == ""
    quick_fit(packed, "a", progress=True)
    assert "fit a" in capfd.readouterr().err


# evaluate


def test_evaluate_counts_every_example_once_whatever_the_batch_size(net, second, data):
    logits = np.asarray(pae.predict(net, second, "b", data[0]))
    right = (logits.argmax(-1) == data[1]).mean()
    for size in (1, 7, 16, 39, 40, 41, 256):
        scores = pae.evaluate(net, second, "b", data, batch_size=size)
        assert list(scores) == ["accuracy", "loss", "count"]
        assert scores["count"] == 40
        assert scores["accuracy"] == pytest.approx(right, abs=1e-12)
        assert scores["loss"] == pytest.approx(softmax_loss(logits, data[1]), rel=1e-5)


def test_evaluate_reads_ragged_batches_of_any_source_like_arrays(net, second, data):
    x, y = data
    cuts = [(0, 5), (5, 25), (25, 26), (26, 40)]
    batches = [{"image": x[a:b], "label": y[a:b]} for a, b in cuts]
    wanted = pae.evaluate(net, second, "b", data)
    for source in (batches, lambda epoch: iter(batches), tuple(batches)):
        scores = pae.evaluate(net, second, "b", source)
        assert scores["count"] == 40
        assert scores["accuracy"] == pytest.approx(wanted["accuracy"])
        assert scores["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


def test_evaluate_weights_the_filling_of_the_last_batch_with_zero_even_if_its_loss_is_not_finite(net, second, data):
    """The filling repeats the batch's first example; here that example's loss is infinite, and it counts once."""
    x, _ = data

    def loss(logits, labels):
        return jnp.where(labels == 7.0, jnp.inf, 0.0) + 0.0 * logits[:, 0]

    labels = np.zeros(40, np.float32)
    assert pae.evaluate(net, second, "b", (x, labels), batch_size=16, loss=loss)["loss"] == 0.0
    labels[32] = 7.0
    assert pae.evaluate(net, second, "b", (x, labels), batch_size=16, loss=loss)["loss"] == np.inf


def test_evaluate_of_float_targets_gives_no_accuracy(net, second, data):
    scores = pae.evaluate(net, second, "b", (data[0], data[1].astype(np.float32)), loss=squared)
    assert set(scores) == {"loss", "count"}
    logits = np.asarray(pae.predict(net, second, "b", data[0]))
    assert scores["loss"] == pytest.approx(float(np.mean((logits[:, 0] - data[1]) ** 2)), rel=1e-5)


def test_boolean_labels_are_the_classes_zero_and_one(net, packed, second, data, quick_fit, assert_same):
    x, y = data
    as_bool = (x, y.astype(bool))
    assert pae.evaluate(net, second, "b", as_bool) == pae.evaluate(net, second, "b", data)
    assert_same(quick_fit(packed, "a", as_bool)[0].shared, quick_fit(packed, "a", data)[0].shared)


def test_labels_of_any_integer_type_give_the_same_scores(net, second, data):
    wanted = pae.evaluate(net, second, "b", data)
    for dtype in (np.uint8, np.int64, np.int8):
        assert pae.evaluate(net, second, "b", (data[0], data[1].astype(dtype))) == wanted
    assert pae.evaluate(net, second, "b", (data[0], data[1].tolist())) == wanted
    assert pae.evaluate(net, second, "b", {"image": jnp.asarray(data[0]), "label": jnp.asarray(data[1])}) == wanted


def test_evaluate_and_predict_refuse_an_unknown_task(net, frozen, data):
    for call in (
        lambda: pae.evaluate(net, frozen, "b", data),
        lambda: pae.predict(net, frozen, "b", data[0]),
        lambda: pae.features(net, frozen, "b", data[0]),
        lambda: pae.masks(frozen, "b"),
        lambda: pae.trainable(frozen, "b"),
    ):
        with pytest.raises(pae.UnknownTaskError, match=r"unknown task 'b'; the state has: 'a'. Add it with pae.pack"):
            call()
    assert issubclass(pae.UnknownTaskError, KeyError)


# predict and features


def test_predict_computes_the_model_on_the_visible_weights_and_the_tasks_own_variables(net, third, data, vector_module):
    state = pae.prune(third, "c", 0.5)
    for task in "abc":
        params, entry = logits_of(net, state, task, data[0])
        variables = {"params": params, "batch_stats": entry.local["batch_stats"]}
        features = vector_module().apply(variables, data[0], train=False)
        np.testing.assert_allclose(pae.features(net, state, task, data[0]), features, rtol=1e-5, atol=1e-6)
        head = entry.head["params"]
        wanted = features @ head["kernel"] + head["bias"][None]
        np.testing.assert_allclose(pae.predict(net, state, task, data[0]), wanted, rtol=1e-5, atol=1e-6)


def test_predict_in_pieces_gives_every_row_once_in_order(net, second, data):
    whole = pae.predict(net, second, "a", data[0])
    for size in (1, 7, 40, 64):
        pieces = pae.predict(net, second, "a", data[0], batch_size=size)
        assert pieces.shape == whole.shape
        np.testing.assert_allclose(pieces, whole, rtol=1e-5, atol=1e-6)
    assert pae.features(net, second, "a", data[0], batch_size=7).shape == (40, 6)


@pytest.mark.parametrize("batch_size", [None, 8])
def test_predict_of_no_examples_is_an_empty_array_of_logits(net, second, data, batch_size):
    assert pae.predict(net, second, "a", data[0][:0], batch_size=batch_size).shape == (0, 2)


BAD_INPUTS = {
    "wrong shape": (np.zeros((3, 5), np.float32), r"input.*found float32\[3,5\], expected float32\[batch,4\]"),
    "no batch axis": (
        np.zeros(4, np.float32),
        r"found float32\[4\], expected float32\[batch,4\].*batch axis comes first",
    ),
    "scalar": (np.float32(1), r"expected float32\[batch,4\]"),
    "one axis more": (np.zeros((1, 3, 4), np.float32), r"found float32\[1,3,4\]"),
    "integers for floats": (np.zeros((3, 4), np.uint8), r"found uint8\[3,4\], expected float32.*Convert and scale"),
    "bool": (np.zeros((3, 4), bool), "found bool"),
    "complex": (np.zeros((3, 4), np.complex64), "found complex64"),
    "text": (np.array([["a"] * 4]), "expected float32"),
    "another tree": ({"image": np.zeros((3, 4), np.float32)}, "input"),
    "nothing": (None, "input"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_an_input_of_wrong_shape_or_dtype_is_refused_with_what_was_expected(net, packed, quick_fit, name):
    x, message = BAD_INPUTS[name]
    labels = np.zeros(3, int)
    for call in (
        lambda: pae.predict(net, packed, "a", x),
        lambda: pae.features(net, packed, "a", x),
        lambda: pae.evaluate(net, packed, "a", (x, labels)),
        lambda: quick_fit(packed, "a", (x, labels)),
    ):
        with pytest.raises(pae.StructureError, match=message):
            call()


def test_inputs_of_the_same_kind_are_converted(net, second, data, assert_same):
    wanted = pae.predict(net, second, "a", data[0])
    assert_same(pae.predict(net, second, "a", data[0].astype(np.float64)), wanted)
    assert_same(pae.predict(net, second, "a", jnp.asarray(data[0])), wanted)
    assert pae.predict(net, second, "a", data[0].astype(np.float16)).dtype == jnp.float32


class Pair(nn.Module):
    width: float

    @nn.compact
    def __call__(self, x, train):
        return nn.relu(nn.Dense(4)(x["left"]) + nn.Dense(4, use_bias=False)(x["right"]))


def test_inputs_of_a_tree_must_have_equal_lengths_also_in_predict(quick_fit):
    net = pae.linen(Pair, {"left": jnp.zeros((1, 3)), "right": jnp.zeros((1, 2))})
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
    x = {"left": np.zeros((5, 3), np.float32), "right": np.zeros((4, 2), np.float32)}
    with pytest.raises(pae.DataError, match="x left has 5 examples and x right has 4; they must be equal"):
        quick_fit(state, "a", (x, np.zeros(5, int)), net=net)
    for size in (None, 2):
        with pytest.raises(pae.PaeError, match="right"):
            pae.predict(net, state, "a", x, batch_size=size)


def test_a_schedule_that_ends_after_the_last_step_is_refused_before_training(packed, quick_fit, traces):
    with pytest.raises(pae.ArgumentError, match=r"ends at step 11, but 2 epochs of 5 steps end at 10"):
        quick_fit(packed, "a", epochs=2, pruning=pae.CubicSchedule(final=0.5, end=11))
    assert traces == []


@pytest.mark.parametrize("resumed", [False, True])
def test_a_schedule_that_ends_before_the_first_step_prunes_before_it(packed, quick_fit, resumed):
    state, history = quick_fit(packed, "a", epochs=2) if resumed else (packed, None)
    schedule = pae.CubicSchedule(final=0.5, end=10 if resumed else 0)
    after, _ = quick_fit(state, "a", epochs=1, resume=history, pruning=schedule)
    assert pae.free_fraction(after) == 0.5


def test_a_schedule_that_a_stream_does_not_reach_is_refused_after_its_first_epoch(packed, quick_fit, data, state_facts):
    """How long a stream is shows in its first epoch; its length, if it has one, may count something else."""

    class Examples:
        def __len__(self):
            return 40

        def __iter__(self):
            return iter([(data[0][i : i + 8], data[1][i : i + 8]) for i in range(0, 40, 8)])

    before, seen = state_facts(packed), []
    for train in (Examples(), lambda epoch: iter(Examples())):
        with pytest.raises(pae.ArgumentError, match=r"ends at step 11, but 2 epochs of 5 steps end at 10.*Lower `end`"):
            schedule = pae.CubicSchedule(final=0.5, end=11, every=1)
            quick_fit(packed, "a", train, pruning=schedule, on_step=lambda row: seen.append(row["step"]))
    assert seen == [1, 2, 3, 4, 5] * 2
    assert state_facts(packed) == before
    state, _ = quick_fit(packed, "a", Examples(), pruning=pae.CubicSchedule(final=0.5, end=10))
    assert pae.free_fraction(state) == 0.5


def test_a_stream_whose_later_epochs_are_shorter_still_reaches_the_final_fraction(packed, quick_fit, data):
    train = lambda epoch: iter([data] * (3 - epoch))  # noqa: E731
    state, history = quick_fit(packed, "a", train, pruning=pae.CubicSchedule(final=0.5, end=6, every=1))
    assert int(history.end.step) == 5
    assert pae.free_fraction(state) == 0.5


# on_epoch and on_step


def test_on_epoch_gets_a_network_of_its_own_and_the_row_and_ends_training(net, packed, quick_fit, data, state_facts):
    seen = []

    def look(state, row):
        seen.append((state, row))
        row["loss"] = 0.0
        return row["epoch"] == 3

    state, history = quick_fit(packed, "a", epochs=8, val=data, on_epoch=look)
    assert [row["epoch"] for row in history.rows] == [1, 2, 3] == [row["epoch"] for _, row in seen]
    assert all(row["loss"] > 0 for row in history.rows)
    assert state_facts(seen[-1][0]) == state_facts(state)
    for now, row in seen:  # epochs later these are still what they were
        pae.check(now, net)
        assert pae.evaluate(net, now, "a", data)["loss"] == pytest.approx(row["val_loss"], rel=1e-6)
    shorter, _ = quick_fit(packed, "a", epochs=3)
    assert state_facts(shorter) == state_facts(state)


def test_on_step_gets_the_loss_of_every_step_as_a_scalar_on_the_device(packed, quick_fit):
    seen = []
    _, history = quick_fit(packed, "a", on_step=seen.append)
    assert [row["step"] for row in seen] == list(range(1, 11))
    assert all(isinstance(row["loss"], jax.Array) and row["loss"].shape == () for row in seen)
    losses = [float(row["loss"]) for row in seen]
    expected = [np.mean(losses[:5]), np.mean(losses[5:])]
    assert [row["loss"] for row in history.rows] == pytest.approx(expected, rel=1e-5)


def test_on_step_ends_training_after_the_measurements_of_the_epoch(packed, quick_fit, data, state_facts):
    state, history = quick_fit(packed, "a", epochs=4, val=data, on_step=lambda row: row["step"] == 7)
    assert [row["epoch"] for row in history.rows] == [1, 2]
    assert "val_loss" in history.rows[-1]
    assert int(history.end.step) == 7
    batches = []
    quick_fit(packed, "a", epochs=4, on_step=lambda row: batches.append(row["step"]) or None)
    assert batches == list(range(1, 21))
    assert state_facts(state) != state_facts(packed)


@pytest.mark.parametrize("step", [2, 7], ids=["in the first epoch", "in a later one"])
def test_a_training_that_the_user_stops_has_still_reached_the_final_fraction(packed, quick_fit, step):
    schedule = pae.CubicSchedule(final=0.5, end=18, every=2)
    state, _ = quick_fit(packed, "a", epochs=4, pruning=schedule, on_step=lambda row: row["step"] == step)
    assert pae.free_fraction(state) == 0.5


# history


def test_a_history_is_a_short_table_of_its_rows(packed, quick_fit, data):
    _, history = quick_fit(packed, "a", epochs=12, val=data)
    lines = repr(history).splitlines()
    assert lines[0] == "History of 12 epochs, kept 12"
    assert lines[1].split() == ["epoch", "loss", "accuracy", "val_accuracy", "val_loss"]
    assert len(lines) == 14
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[-1].split() == ["12", *(f"{value:.4g}" for value in list(history.rows[-1].values())[1:])]
    assert len(repr(history)) < 1500
    html = history._repr_html_()
    assert html.count("<tr>") == 13 and html.count("<th>") == 5 and html.count("<td>") == 60
    _, none = quick_fit(packed, "a", epochs=0)
    assert repr(none).startswith("History of 0 epochs, kept 0")
    assert "<table>" in none._repr_html_()


def test_a_history_ends_with_the_train_state_of_the_last_step(net, packed, quick_fit, data, assert_same):
    tx = optax.sgd(0.05, momentum=0.9)
    state, history = quick_fit(packed, "a", val=data, keep="best", epochs=3, optimizer=tx)
    last, other = quick_fit(packed, "a", epochs=3, optimizer=tx)
    assert isinstance(history.end, pae.TrainState)
    assert int(history.end.step) == 15
    assert_same(history.opt_state, other.opt_state)
    assert history.opt_state is history.end.opt_state
    assert_same(history.end.commit(net, state).shared, last.shared)


def test_keep_takes_a_rule_or_its_name(packed, quick_fit, data, state_facts):
    named, history = quick_fit(packed, "a", val=data, keep="best", epochs=3)
    ruled, other = quick_fit(packed, "a", val=data, keep=pae.Best(), epochs=3)
    assert state_facts(named) == state_facts(ruled)
    assert history.rows == other.rows
    for keep in (None, True, pae.Plateau(), pae.Best):
        with pytest.raises(pae.ArgumentError, match="keep must be one of 'last', 'best', found"):
            quick_fit(packed, "a", val=data, keep=keep)


# parts


def everything(state, task="a"):
    """Return the arrays that training a task could change, by part."""
    entry = state.tasks[task]
    return {"shared": state.shared, "local": entry.local, "head": entry.head}


def changed(new, old):
    """Return the paths of the leaves that differ."""
    pairs = zip(flatten(everything(new)).items(), flatten(everything(old)).values(), strict=True)
    return {path for (path, a), b in pairs if (np.asarray(a) != np.asarray(b)).any()}


PARTS = [("head",), ("shared",), ["head", "local"], {"shared", "head"}]


@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "-".join(sorted(parts)))
def test_only_the_named_parts_change_and_running_statistics_only_with_the_local_ones(packed, quick_fit, parts):
    state, _ = quick_fit(packed, "a", parts=parts)
    trained = {path for path in flatten(everything(packed)) if path.split("/")[0] in parts}
    assert changed(state, packed) == trained
    assert {"local/batch_stats/BatchNorm_0/mean", "local/batch_stats/BatchNorm_0/var"} <= flatten(
        everything(packed)
    ).keys()


STILL = optax.set_to_zero()


def test_without_local_variables_the_backbone_runs_as_in_evaluation(packed, quick_fit, data, traces, net):
    """At a rate of 0 the loss of training is then that of `evaluate`; with them it is that of batch statistics."""
    wanted = pae.evaluate(net, packed, "a", data)["loss"]
    for parts in (("head",), ("shared",), ("shared", "head")):
        _, history = quick_fit(packed, "a", [data], parts=parts, optimizer=STILL, epochs=1)
        assert history.rows[0]["loss"] == pytest.approx(wanted, rel=1e-6)
    assert traces == []
    _, history = quick_fit(packed, "a", [data], parts=("local",), optimizer=STILL, epochs=1)
    assert abs(history.rows[0]["loss"] - wanted) > 1e-3


def test_a_new_head_on_fixed_features_is_multinomial_regression(net, packed, quick_fit, data, assert_same):
    """One step on the head alone is the step of the same head on features computed beforehand."""
    x, y = data
    features = pae.features(net, packed, "a", x)
    state, _ = quick_fit(packed, "a", [data], parts=("head",), optimizer=optax.sgd(0.5), epochs=1)
    head = packed.tasks["a"].head["params"]

    def loss(head):
        logits = features @ head["kernel"] + head["bias"][None]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    expected = jax.tree.map(lambda p, g: p - 0.5 * g, head, jax.grad(loss)(head))
    for path, leaf in flatten(state.tasks["a"].head["params"]).items():
        np.testing.assert_allclose(leaf, flatten(expected)[path], rtol=1e-5, atol=1e-7)
    assert_same(pae.features(net, state, "a", x), features)


def test_the_order_in_which_parts_are_named_compiles_nothing_anew(packed, quick_fit, compilations):
    quick_fit(packed, "a", parts=("shared", "head"))
    with compilations() as found:
        quick_fit(packed, "a", parts=["head", "shared"])
    assert found.count == 0


def test_fit_refuses_parts_that_are_unknown_or_none(packed, quick_fit):
    for parts in (("bias",), "head", ("head", "heads")):
        with pytest.raises(pae.ArgumentError, match="parts must be one of 'shared', 'local', 'head', 'pick', found"):
            quick_fit(packed, "a", parts=parts)
    for parts in ((), ("pick",)):
        with pytest.raises(pae.ArgumentError, match=r"parts is empty, or names what the task does not have: nothing"):
            quick_fit(packed, "a", parts=parts)


@pytest.fixture(scope="module")
def picked(net, frozen):
    """A second task that picks the weights of the first."""
    return pae.pack(net, frozen, "b", head=2, key=jax.random.key(3), sharing="picked")


def picks_moved(state, before):
    pairs = zip(*(jax.tree.leaves(s.tasks["b"].pick) for s in (state, before)), strict=True)
    return any((np.asarray(a) != np.asarray(b)).any() for a, b in pairs)


def test_picks_train_with_the_optimizer_of_everything_else_and_only_as_a_named_part(picked, quick_fit):
    state, history = quick_fit(picked, "b")
    assert set(history.end.params) == {"shared", "local", "head", "pick"}
    assert picks_moved(state, picked)
    without, history = quick_fit(picked, "b", parts=("shared", "local", "head"))
    assert "pick" not in history.end.params
    assert not picks_moved(without, picked)
    alone, _ = quick_fit(picked, "b", parts=("pick",))
    assert picks_moved(alone, picked)
    for path, leaf in flatten(everything(picked, "b")).items():
        np.testing.assert_array_equal(flatten(everything(alone, "b"))[path], leaf, err_msg=path)


def test_a_partition_gives_the_picks_an_optimizer_of_their_own(picked, quick_fit, assert_same):
    def partition(picks, others):
        return optax.partition(
            {"picks": picks, "others": others},
            lambda params: {part: "picks" if part == "pick" else "others" for part in params},
        )

    still = partition(optax.set_to_zero(), optax.adam(0.01))
    state, _ = quick_fit(picked, "b", optimizer=still, epochs=1)
    assert not picks_moved(state, picked)
    assert any(
        (np.asarray(a) != np.asarray(b)).any()
        for a, b in zip(*map(jax.tree.leaves, (state.shared, picked.shared)), strict=True)
    )
    state, _ = quick_fit(picked, "b", optimizer=partition(optax.sgd(1.0), optax.set_to_zero()), epochs=1)
    assert picks_moved(state, picked)
    assert_same(state.shared, picked.shared)


# rates of recipes, from outside the optimizer


RATES = {
    "constant": (lambda step: 0.25, optax.constant_schedule(0.25)),
    "steps": (optax.piecewise_constant_schedule(0.3, {3: 0.1, 7: 0.5}),) * 2,
    "cosine": (optax.cosine_decay_schedule(0.3, 10),) * 2,
}


@pytest.mark.parametrize("name", RATES)
def test_a_rate_is_the_same_schedule_inside_the_optimizer(packed, quick_fit, rated_fit, name):
    """Two epochs of five steps; the schedule counts on. Equal to rounding: two programs."""
    rate, schedule = RATES[name]
    one = optax.sgd(1.0, momentum=0.9)
    outside, history = rated_fit(packed, "a", optimizer=one, rates=lambda step: (float(rate(step)),) * 2)
    inside, expected = quick_fit(packed, "a", optimizer=optax.sgd(schedule, momentum=0.9))
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)
    close(everything(outside), everything(inside))
    close(history.rows, expected.rows)
    other, _ = rated_fit(packed, "a", optimizer=one, rates=0.26)
    assert changed(other, inside)


def test_another_rate_compiles_nothing_and_is_asked_once_a_step(packed, rated_fit, compilations):
    asked, sgd = [], optax.sgd(1.0)
    rated_fit(packed, "a", optimizer=sgd, rates=0.1)
    with compilations() as found:
        for rates in (
            0.2,
            1,
            0.0,
            lambda step: asked.append(step) or (0.1 / (1 + step), 0.1),
            lambda step: (1, np.float32(0.1)),
        ):
            rated_fit(packed, "a", optimizer=sgd, rates=rates)
    assert found.count == 0
    assert asked == list(range(10))


def test_at_a_rate_of_zero_no_weight_and_no_head_moves(packed, rated_fit):
    state, _ = rated_fit(packed, "a", rates=0.0)
    assert changed(state, packed) == {f"local/batch_stats/BatchNorm_0/{name}" for name in ("mean", "var")}


# augment

AUGMENTED: list[str] = []


@functools.cache
def scaled_by(factor):
    """An augmentation without chance; it notes when it is traced."""

    def augment(key, x):
        AUGMENTED.append(f"{factor} {x.shape}")
        return factor * x

    return augment


def noisy(key, x):
    return x + 0.5 * jax.random.normal(key, x.shape)


def test_an_augmentation_is_compiled_into_the_step_and_once_for_the_same_one(
    packed, quick_fit, data, compilations, traces
):
    """Python runs it to see what it makes of the inputs and to compile it, never at a step or an evaluation."""
    quick_fit(packed, "a", augment=scaled_by(2.0), val=data, keep="best")
    traces.clear()
    counts = []
    with compilations() as found:
        for epochs in (1, 4):
            AUGMENTED.clear()
            quick_fit(packed, "a", augment=scaled_by(2.0), val=data, keep="best", epochs=epochs)
            counts.append(len(AUGMENTED))
    assert (traces, found.count) == ([], 0)
    assert counts[0] == counts[1] <= 2
    quick_fit(packed, "a", augment=scaled_by(3.0))
    assert traces == [1.0]


def test_an_augmentation_sees_what_training_sees_and_evaluation_never_does(net, packed, quick_fit, data):
    x, y = data
    state, history = quick_fit(packed, "a", augment=scaled_by(2.0), val=data)
    by_hand, _ = quick_fit(packed, "a", (2 * x, y))
    plain, _ = quick_fit(packed, "a")
    for path, leaf in flatten(everything(by_hand)).items():  # two programs, so up to rounding
        np.testing.assert_allclose(flatten(everything(state))[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)
    assert changed(state, plain)
    assert history.rows[-1]["val_loss"] == pytest.approx(pae.evaluate(net, state, "a", data)["loss"], rel=1e-6)


def test_an_augmentation_draws_anew_at_every_step_and_the_same_for_the_same_key(packed, quick_fit, data, assert_same):
    one, _ = quick_fit(packed, "a", augment=noisy)
    two, _ = quick_fit(packed, "a", augment=noisy)
    other, _ = quick_fit(packed, "a", augment=noisy, key=9)
    assert_same(everything(one), everything(two))
    assert changed(one, other)
    losses = [
        quick_fit(packed, "a", [data] * steps, augment=noisy, optimizer=STILL, parts=("head",), epochs=1)[1].rows[0][
            "loss"
        ]
        for steps in (1, 2, 3)
    ]
    first, second, third = losses[0], 2 * losses[1] - losses[0], 3 * losses[2] - 2 * losses[1]
    assert min(abs(first - second), abs(second - third), abs(first - third)) > 1e-3


class Sampled(nn.Module):
    """Dropout, to see that an augmentation does not share its random numbers."""

    width: float

    @nn.compact
    def __call__(self, x, train):
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(16)(x))


def test_an_augmentation_takes_no_random_numbers_from_dropout(quick_fit, data, assert_same):
    net = pae.linen(Sampled, jnp.zeros((1, 4)))
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
    plain, _ = quick_fit(state, "a", net=net)
    same, _ = quick_fit(state, "a", net=net, augment=lambda key, x: jnp.where(jax.random.uniform(key) < 2, x, 0.0))
    assert_same(everything(plain), everything(same))


def test_an_augmentation_of_several_inputs_gets_them_all(quick_fit):
    net = pae.linen(Pair, {"left": jnp.zeros((1, 3)), "right": jnp.zeros((1, 2))})
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
    draw = np.random.default_rng(0)
    x = {"left": draw.normal(size=(8, 3)).astype(np.float32), "right": draw.normal(size=(8, 2)).astype(np.float32)}
    y = np.arange(8) % 2
    swapped = lambda key, x: {"left": -x["left"], "right": x["right"]}  # noqa: E731
    found, _ = quick_fit(state, "a", (x, y), net=net, augment=swapped)
    expected, _ = quick_fit(state, "a", ({"left": -x["left"], "right": x["right"]}, y), net=net)
    assert flatten(found.shared).keys() == flatten(expected.shared).keys()
    for path, leaf in flatten(found.shared).items():
        np.testing.assert_array_equal(leaf, flatten(expected.shared)[path])


@pytest.mark.parametrize("steps_per_call", [1, 2])
def test_an_interrupt_leaves_the_last_state_in_the_users_hands(net, second, quick_fit, adam, data, steps_per_call):
    """Ctrl-C in the seventh of ten steps, two epochs of five; what was trained until then is not lost."""
    answers = pae.predict(net, second, "a", data[0])

    def interrupt(row):
        if row["step"] >= 7:
            raise KeyboardInterrupt

    with pytest.raises(pae.TrainingInterrupted, match=r"task 'b': training was interrupted after [78] steps") as caught:
        quick_fit(second, "b", on_step=interrupt, devices=pae.Devices(steps_per_call=steps_per_call))
    state, history = caught.value.state, caught.value.history
    pae.check(state, net)
    pae.verify(state)
    assert (pae.predict(net, state, "a", data[0]) == answers).all()
    assert changed(state, second) and len(history.rows) == 1
    with pytest.raises(KeyboardInterrupt):
        raise caught.value
    on, history = quick_fit(state, "b", epochs=1, resume=history)
    assert len(history.rows) == 2 and changed(on, state)


@pytest.mark.parametrize(
    "make", [lambda: optax.contrib.schedule_free_sgd(0.5), lambda: optax.lookahead(optax.sgd(0.1), 5, 0.5)]
)
def test_optimizers_that_move_other_weights_than_those_to_keep_are_refused_in_fit(packed, quick_fit, make):
    with pytest.raises(pae.ArgumentError, match=r"State moves weights that are not those to keep.*pae.TrainState"):
        quick_fit(packed, "a", optimizer=make())


def test_a_fraction_is_no_pruning_schedule(packed, quick_fit):
    with pytest.raises(pae.ArgumentError, match=r"pruning must be a schedule such as pae.CubicSchedule"):
        quick_fit(packed, "a", pruning=0.5)


# Going on with another rule


@pytest.mark.parametrize("keep", ["best", pae.Best(plateau=pae.Plateau(2, 0.5, 9))], ids=["best", "plateau"])
def test_an_epoch_from_before_the_pruning_of_a_resumed_fit_is_not_kept(packed, quick_fit, data, keep):
    state, history = quick_fit(packed, "a", epochs=4, val=data, keep=keep)
    schedule, free = pae.CubicSchedule(final=0.95, end=30), []
    after, _ = quick_fit(
        state, "a", epochs=6, val=data, keep=keep, resume=history, pruning=schedule,
        on_epoch=lambda now, row: free.append(pae.free_fraction(now)),
    )  # fmt: skip
    assert pae.free_fraction(after) > 0.9
    assert min(free[2:]) > 0.9


def test_a_plateau_does_not_go_back_to_an_epoch_without_the_optimizers_state(packed, quick_fit, data):
    state, history = quick_fit(packed, "a", epochs=4, val=data, keep="best")
    keep = pae.Best(plateau=pae.Plateau(1, 0.5, 9))
    _, after = quick_fit(state, "a", epochs=4, val=data, keep=keep, resume=history, optimizer=optax.adam(0.3))
    assert len(after.rows) == 8


def test_another_score_measures_the_kept_epoch_anew(packed, quick_fit, data):
    state, history = quick_fit(packed, "a", epochs=3, val=data, keep="best")
    score = pae.Best(score=lambda now: -float(pae.free_fraction(now)))
    _, after = quick_fit(state, "a", epochs=2, val=data, keep=score, resume=history)
    assert after.progress.best.score[0] == 0.0  # not an accuracy


def test_outputs_that_are_not_a_number_are_never_right(packed, quick_fit, data):
    x, _ = data
    zeros = np.zeros(len(x), np.int32)
    zeros[::4] = 1
    rates = optax.piecewise_constant_schedule(1e-3, {14: 1e33})
    _, history = quick_fit(packed, "a", (x, zeros), val=(x, zeros), epochs=3, keep="best", optimizer=optax.sgd(rates))
    assert np.isnan(history.rows[-1]["val_loss"])
    assert history.rows[-1]["val_accuracy"] == 0.0
    assert history.kept_epoch < 3


def test_a_later_batch_of_other_labels_is_checked_like_the_first(packed, net, quick_fit, data):
    x, y = data[0], data[0][:, 0]
    batches = [(x[:16], y[:16]), (x[16:32], y[16:32, None])]
    loss = lambda out, target: (out[:, 0] - target) ** 2  # noqa: E731
    for call in (
        lambda: quick_fit(packed, "a", batches, loss=loss),
        lambda: pae.evaluate(net, packed, "a", batches, loss=loss),
    ):
        with pytest.raises(pae.DataError, match="loss"):
            call()


class OfUnknownLength(list):
    def __len__(self):
        raise TypeError("The dataset length is unknown.")


class Endless:
    """As Grain counts it, or as tf.data says it."""

    def __init__(self, said=None):
        self.said = said

    def __len__(self):
        if self.said:
            raise TypeError(self.said)
        return sys.maxsize

    def __iter__(self):
        while True:
            yield None


def test_streams_of_unknown_length_are_taken_and_endless_ones_refused(packed, quick_fit, data, net):
    batches = OfUnknownLength([data])
    _, history = quick_fit(packed, "a", batches, epochs=1)
    assert len(history.rows) == 1
    assert pae.evaluate(net, packed, "a", batches)["count"] == 40
    with pytest.raises(pae.DataError, match=r"repeats for ever.*without repeat"):
        quick_fit(packed, "a", Endless())
    with pytest.raises(pae.DataError, match=r"repeats for ever.*without repeat"):
        quick_fit(packed, "a", Endless("The dataset is infinite."))


def test_an_iterator_that_is_read_twice_is_told_so(packed, quick_fit, data):
    class Once:
        batches = iter([data])

        def __iter__(self):
            return self.batches

    with pytest.raises(pae.DataError, match="an iterator can be read only once"):
        quick_fit(packed, "a", Once(), epochs=2)


def test_a_metric_may_not_have_the_name_of_one_on_validation_data(packed, quick_fit):
    with pytest.raises(pae.ArgumentError, match=r"'val_\.\.\.'.*found 'val_accuracy'"):
        quick_fit(packed, "a", metrics={"val_accuracy": lambda out, y: y})
