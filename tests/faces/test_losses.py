"""Losses against their formulas, and at work: inside fit and evaluate, with the heads they need."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import pae_jax as pae
from pae_jax.errors import ArgumentError, DataError, StructureError
from pae_jax.faces.losses import (
    AgeError,
    ExpectedAge,
    FeatureHead,
    PrelogitsNorm,
    WeightedSoftmax,
    class_weights,
    expected_age,
    prelogits_norm,
    softmax,
)
from pae_jax.training.losses import accuracy

AFFECTNET = (74496, 133758, 25311, 14016, 6322, 3783, 24726)
AGES = (5.0, 20.0, 60.0)


def logits_and_labels(seed, count=6, classes=3):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(count, classes)), jnp.float32), jnp.asarray(rng.integers(0, classes, count))


def test_the_published_class_weights():
    weights = class_weights(AFFECTNET)
    assert weights[1] == pytest.approx(1.111, abs=1e-3)
    assert weights[5] == pytest.approx(73.65, abs=1e-2)
    for weight, count in zip(weights, AFFECTNET, strict=True):
        assert weight == pytest.approx((282_412 - count) / count)


@pytest.mark.parametrize("counts", [[5, 0], [5], [5, -1], [5, math.nan], []])
def test_counts_without_examples_of_every_class_are_refused(counts):
    with pytest.raises(DataError, match="counts: found"):
        class_weights(counts)


@given(st.integers(0, 2**31 - 1))
@settings(max_examples=20, deadline=None)
def test_weighted_softmax_is_divided_by_the_batch_or_by_its_weights(seed):
    logits, y = logits_and_labels(seed)
    weights = np.array([0.5, 2.0, 7.0])
    plain = np.asarray(softmax(logits, y), np.float64) * weights[np.asarray(y)]
    by_batch = jnp.mean(WeightedSoftmax(tuple(weights))(logits, y))
    by_weights = jnp.mean(WeightedSoftmax(tuple(weights), "weights")(logits, y))
    assert float(by_batch) == pytest.approx(plain.sum() / 6, rel=1e-5)
    assert float(by_weights) == pytest.approx(plain.sum() / weights[np.asarray(y)].sum(), rel=1e-5)


def test_equal_weights_are_no_weights():
    logits, y = logits_and_labels(0)
    for normalise in ("batch", "weights"):
        weighted = WeightedSoftmax((1, 1, 1), normalise)(logits, y)
        assert float(jnp.mean(weighted)) == pytest.approx(float(jnp.mean(softmax(logits, y))), rel=1e-6)


def test_a_batch_whose_classes_all_weigh_nothing_has_loss_zero():
    loss = WeightedSoftmax((0.0, 1.0), "weights")
    logits = jnp.ones((3, 2))
    value, gradient = jax.value_and_grad(lambda x: jnp.mean(loss(x, jnp.zeros(3, int))))(logits)
    assert float(value) == 0 and not np.asarray(gradient).any()


def test_the_prelogits_norm_is_the_sum_of_magnitudes_of_the_features():
    features = jnp.array([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(prelogits_norm(features), [3.0003, 0.0003], rtol=1e-5)
    loss = PrelogitsNorm(classes=3, weight=0.1)
    logits, y = logits_and_labels(1, 2)
    shown = jnp.concatenate([logits, features], axis=1)
    np.testing.assert_allclose(loss(shown, y), softmax(logits, y) + 0.1 * prelogits_norm(features), rtol=1e-6)
    np.testing.assert_array_equal(loss(logits[:1], y[:1]), softmax(logits, y)[:1])
    np.testing.assert_array_equal(
        PrelogitsNorm(3, 0.0, WeightedSoftmax((1, 2, 3)))(shown, y), WeightedSoftmax((1, 2, 3))(logits, y)
    )


def test_the_feature_head_is_the_default_head_but_for_what_training_shows(shapes):
    features = jnp.ones((2, 5))
    head, plain = FeatureHead(3), nn.Dense(3)
    variables = head.init(jax.random.key(0), features, train=False)
    assert shapes(variables) == shapes(plain.init(jax.random.key(0), features))
    np.testing.assert_array_equal(head.apply(variables, features, train=False), plain.apply(variables, features))
    shown = head.apply(variables, features, train=True)
    np.testing.assert_array_equal(shown[:, :3], plain.apply(variables, features))
    np.testing.assert_array_equal(shown[:, 3:], features)


@pytest.fixture(scope="module")
def norm_of_features(net, empty, data, adam):
    """Train a task with a feature head; return the mean norm of its features, and its scores."""

    def train(weight):
        state = pae.pack(net, empty, "face", head=FeatureHead(2), key=jax.random.key(1))
        loss = PrelogitsNorm(2, weight)
        options = {"optimizer": adam, "epochs": 10, "batch_size": 8, "key": jax.random.key(2), "progress": False}
        state, history = pae.fit(net, state, "face", data, loss=loss, val=data, **options)
        norm = float(prelogits_norm(pae.features(net, state, "face", data[0])).mean())
        return norm, pae.evaluate(net, state, "face", data, loss=loss, metrics={"accuracy": accuracy}), history

    return train


def test_the_prelogits_norm_keeps_features_small_in_training_and_out_of_the_scores(norm_of_features):
    free, plain_scores, _ = norm_of_features(0.0)
    held, scores, history = norm_of_features(0.5)
    assert held < free / 2
    assert set(scores) == {"accuracy", "loss", "count"}
    assert scores["loss"] < history.rows[-1]["loss"]  # validation has cross-entropy alone
    assert plain_scores["accuracy"] > 0.8


def test_the_expected_age_is_the_mean_age_under_the_softmax():
    ages = np.arange(1, 101)
    logits = np.random.default_rng(0).normal(size=(4, 100)).astype(np.float32)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(expected_age(jnp.asarray(logits), ages), (p * ages).sum(axis=1), rtol=1e-5)
    certain = jnp.asarray(np.eye(100, dtype=np.float32)[[0, 41, 99]] * 100)
    np.testing.assert_allclose(expected_age(certain, ages), [1, 42, 100], rtol=1e-5)


@given(st.integers(0, 2**31 - 1))
@settings(max_examples=20, deadline=None)
def test_expected_age_loss_is_cross_entropy_plus_absolute_error(seed):
    logits, y = logits_and_labels(seed)
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    error = np.abs((p * AGES).sum(axis=1) - np.array(AGES)[np.asarray(y)])
    np.testing.assert_allclose(AgeError(AGES)(logits, y), error, rtol=1e-4, atol=1e-4)
    expected = np.asarray(softmax(logits, y)) + 0.5 * error
    np.testing.assert_allclose(ExpectedAge(AGES, weight=0.5)(logits, y), expected, rtol=1e-4, atol=1e-4)


def test_true_ages_are_classes_of_the_nearest_age_and_errors_in_years():
    loss = ExpectedAge(AGES)
    years = jnp.array([0.0, 12.0, 12.5, 13.0, 47.0, 110.0])
    assert loss.nearest_class(years).tolist() == [0, 0, 0, 1, 2, 2]
    logits = jnp.zeros((6, 3))
    np.testing.assert_allclose(AgeError(AGES)(logits, years), np.abs(85 / 3 - np.asarray(years)), rtol=1e-6)
    classes = jnp.array([0, 1, 2])
    np.testing.assert_allclose(loss(logits[:3], classes), loss(logits[:3], jnp.asarray(AGES)), rtol=1e-6)


def test_the_mean_absolute_error_is_what_evaluate_makes_of_the_age_error(net, empty, data):
    state = pae.pack(net, empty, "age", head=3, key=jax.random.key(1))
    x, _ = data
    years = np.linspace(3, 70, len(x)).astype(np.float32)
    scores = pae.evaluate(net, state, "age", (x, years), loss=AgeError(AGES), batch_size=16)
    errors = np.abs(np.asarray(expected_age(pae.predict(net, state, "age", x), AGES)) - years)
    assert scores["loss"] == pytest.approx(errors.mean(), rel=1e-5)
    classes = np.asarray(ExpectedAge(AGES).nearest_class(jnp.asarray(years)))
    scores = pae.evaluate(net, state, "age", (x, classes), loss=AgeError(AGES), metrics={"accuracy": accuracy})
    assert set(scores) == {"accuracy", "loss", "count"}


LOSSES = [
    WeightedSoftmax((1.0, 3.0)),
    WeightedSoftmax((1.0, 3.0), "weights"),
    ExpectedAge((10, 30)),
    AgeError((10, 30)),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_every_loss_trains_and_equal_settings_compile_once(net, packed, quick_fit, data, loss, compilations):
    _, history = quick_fit(packed, "a", epochs=15, loss=loss)
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]
    twin = dataclasses.replace(loss)
    assert twin == loss and hash(twin) == hash(loss) and twin is not loss
    with compilations() as compiled:
        quick_fit(packed, "a", epochs=1, loss=twin)
    assert compiled.count == 0


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_finite_at_extreme_logits_and_losses_are_float32(loss, dtype):
    gradient = jax.value_and_grad(lambda x: jnp.mean(loss(x, jnp.array([0, 0]))))
    for scale in (0.0, 1e4, -1e4):
        value, slope = gradient(jnp.array([[scale, 0.0], [0.0, scale]], dtype))
        assert value.dtype == jnp.float32
        assert np.isfinite(np.asarray(slope, np.float32)).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: WeightedSoftmax((-1.0, 1.0)),
        lambda: WeightedSoftmax((0.0, 0.0)),
        lambda: WeightedSoftmax((1.0, math.inf)),
        lambda: WeightedSoftmax((1.0, 1.0), "sum"),
        lambda: PrelogitsNorm(2, -1.0),
        lambda: PrelogitsNorm(2, math.nan),
        lambda: ExpectedAge((10, 10)),
        lambda: ExpectedAge((10,)),
        lambda: ExpectedAge((10, 20), weight=-1),
        lambda: AgeError((20, 10)),
        lambda: AgeError((10, math.nan)),
    ],
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(ArgumentError):
        make()


def test_a_loss_for_another_number_of_outputs_names_both():
    logits, y = logits_and_labels(0)
    for loss in (WeightedSoftmax((1, 2)), ExpectedAge(), AgeError((1, 2)), PrelogitsNorm(4)):
        with pytest.raises(StructureError, match=r"found 3 outputs of the head, expected (2|4|100)"):
            loss(logits, y)


def test_a_head_that_shows_no_features_is_refused_where_the_norm_is_trained(net, packed, data):
    """A plain head would train without the norm and not say so."""
    with pytest.raises(StructureError, match=r"logits alone.*FeatureHead\(2\)"):
        pae.fit(
            net,
            packed,
            "a",
            data,
            optimizer=optax.sgd(0.1),
            epochs=1,
            key=jax.random.key(0),
            loss=PrelogitsNorm(2),
            progress=False,
        )
