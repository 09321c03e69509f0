"""Losses and metrics of the user's own: what they may look like, and what is refused before anything is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pae_jax as pae


@pytest.fixture(scope="module")
def regression(net, empty):
    """A task of one output."""
    return pae.pack(net, empty, "a", head=1, key=jax.random.key(1))


def squared(out, y):
    return (out - y) ** 2


def contrastive(out, y):
    """Supervised contrastive loss (Khosla et al., 2020), one number per example; a function of the whole batch."""
    z = out / jnp.linalg.norm(out, axis=-1, keepdims=True)
    apart = 1.0 - jnp.eye(len(z))
    same = (y[:, None] == y[None]) * apart
    similar = z @ z.T / 0.5
    shares = similar - jnp.log(jnp.sum(jnp.exp(similar) * apart, axis=1, keepdims=True))
    return -jnp.sum(shares * same, axis=1) / jnp.maximum(same.sum(1), 1)


def test_outputs_minus_labels_of_another_shape_are_refused_and_equal_shapes_are_not(
    net, regression, quick_fit, data, traces
):
    """(n, 1) - (n,) is (n, n): every output would be compared with every label."""
    x, target = data[0], data[0][:, 0]
    with jax.numpy_rank_promotion("allow"):
        message = (
            r"mixes examples: .*outputs \(n, 1\) minus labels \(n,\).*float32\[8,1\].*float32\[8\].*loss_per='batch'"
        )
        with pytest.raises(pae.DataError, match=message):
            quick_fit(regression, "a", (x, target), loss=squared)
        with pytest.raises(pae.DataError, match="mixes examples"):
            quick_fit(regression, "a", (x, target), loss=lambda out, y: jnp.mean((out - y) ** 2))
        with pytest.raises(pae.DataError, match="mixes examples"):
            quick_fit(regression, "a", [(x, target)], loss=squared)
        with pytest.raises(pae.DataError, match="mixes examples"):
            quick_fit(regression, "a", (x, target[:, None]), loss=squared, val=(x, target))
        with pytest.raises(pae.DataError, match="mixes examples"):
            pae.evaluate(net, regression, "a", (x, target), loss=squared)
    assert traces == []
    state, history = quick_fit(regression, "a", (x, target[:, None]), loss=squared)
    wanted = float(((np.asarray(pae.predict(net, state, "a", x))[:, 0] - target) ** 2).mean())
    assert pae.evaluate(net, state, "a", (x, target[:, None]), loss=squared)["loss"] == pytest.approx(wanted, rel=1e-5)
    assert list(history.rows[0]) == ["epoch", "loss"]


def test_axes_as_long_as_the_batch_are_no_sign_of_mixing(quick_fit, packed, data):
    x, y = data[0][:8], data[1][:8]
    one_hot = np.eye(8, dtype=np.float32)[np.arange(8)]
    matrix = lambda out, y: jnp.sum(out, axis=1) * jnp.sum(y["m"] @ jnp.ones((8, 8)), axis=1)  # noqa: E731
    quick_fit(packed, "a", (x, {"class": y, "m": one_hot}), loss=matrix, batch_size=8)


def test_a_loss_over_the_batch_must_say_so_and_is_then_that_of_whole_batches(net, packed, quick_fit, data):
    x, y = data
    for call in (
        lambda: quick_fit(packed, "a", data, loss=contrastive),
        lambda: pae.evaluate(net, packed, "a", data, loss=contrastive),
    ):
        with pytest.raises(pae.DataError, match=r"mixes examples.*say loss_per='batch'"):
            call()
    options = {"loss": contrastive, "loss_per": "batch"}
    state, history = quick_fit(packed, "a", data, val=data, epochs=6, **options)
    assert list(history.rows[0]) == ["epoch", "loss", "val_loss"]
    assert history.rows[-1]["val_loss"] < history.rows[0]["val_loss"]
    out = pae.predict(net, state, "a", x)
    assert history.rows[-1]["val_loss"] == pytest.approx(float(contrastive(out, y).mean()), rel=1e-4)
    pieces = [float(contrastive(out[a:b], y[a:b]).mean()) * (b - a) for a, b in ((0, 16), (16, 32), (32, 40))]
    scores = pae.evaluate(net, state, "a", data, batch_size=16, **options)
    assert scores == {"loss": pytest.approx(sum(pieces) / 40, rel=1e-4), "count": 40}
    scalar = lambda out, y: contrastive(out, y).mean()  # noqa: E731
    assert pae.evaluate(net, state, "a", data, loss=scalar, loss_per="batch")["loss"] == pytest.approx(
        history.rows[-1]["val_loss"], rel=1e-5
    )


def root(out, y):
    """A scalar that is no mean over examples."""
    return jnp.sqrt(jnp.mean((out[:, 0] - y) ** 2))


def test_a_scalar_that_is_no_mean_over_examples_is_refused_where_it_would_be_split(
    net, packed, quick_fit, data, traces
):
    target = data[0][:, 0]
    with pytest.raises(
        pae.DataError, match=r"it is no mean over examples.*one loss per example, or say loss_per='batch'"
    ):
        quick_fit(packed, "a", (data[0], target), loss=root, val=(data[0], target))
    with pytest.raises(pae.DataError, match="it is no mean over examples"):
        pae.evaluate(net, packed, "a", (data[0], target), loss=root)
    assert traces == []
    state, _ = quick_fit(packed, "a", (data[0], target), loss=root)  # training takes batches as they are
    out = pae.predict(net, state, "a", data[0])
    scores = pae.evaluate(net, state, "a", (data[0], target), loss=root, loss_per="batch")
    assert scores["loss"] == pytest.approx(float(root(out, target)), rel=1e-5)


def test_a_scalar_mean_or_sum_counts_every_example_once_in_evaluation(net, packed, data):
    x, target = data[0], data[0][:, 0]
    each = lambda out, y: (out[:, 0] - y) ** 2  # noqa: E731
    wanted = pae.evaluate(net, packed, "a", (x, target), loss=each)
    for loss in (lambda out, y: jnp.mean(each(out, y)), lambda out, y: jnp.sum(each(out, y))):
        for size in (7, 40):
            scores = pae.evaluate(net, packed, "a", (x, target), loss=loss, batch_size=size)
            assert scores == {"loss": pytest.approx(wanted["loss"], rel=1e-5), "count": 40}


BAD = {
    "integer": (lambda out, y: y, r"the loss is int32\[8\]; it must be a float"),
    "another length": (
        lambda out, y: out[:3, 0],
        r"the loss has shape \(3,\) for 8 examples; it must be a scalar or start",
    ),
    "fails": (lambda out, y: out["class"], r"the loss fails on outputs float32\[8,2\] and labels int32\[8\]: "),
    "shapes": (lambda out, y: out @ jnp.ones((5, 1)), r"the loss fails on outputs float32\[8,2\]"),
    "arguments": (lambda out: out[:, 0], "the loss fails on outputs"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_loss_that_is_none_is_refused_before_the_first_step_with_what_it_got(packed, quick_fit, name, traces):
    loss, message = BAD[name]
    with pytest.raises(pae.DataError, match=message) as caught:
        quick_fit(packed, "a", loss=loss)
    assert len(str(caught.value)) < 400
    assert traces == []


def test_metrics_take_the_place_of_the_accuracy(net, packed, quick_fit, data):
    margin = lambda out, y: jnp.abs(out[:, 0] - out[:, 1])  # noqa: E731
    state, history = quick_fit(packed, "a", metrics={"margin": margin}, val=data)
    assert list(history.rows[0]) == ["epoch", "loss", "margin", "val_loss", "val_margin"]
    logits = pae.predict(net, state, "a", data[0])
    found = pae.evaluate(net, state, "a", data, metrics={"margin": margin}, batch_size=7)
    assert found["margin"] == pytest.approx(float(margin(logits, None).mean()), rel=1e-5)
    assert set(pae.evaluate(net, state, "a", data, metrics={})) == {"loss", "count"}
    _, history = quick_fit(packed, "a", metrics={})
    assert list(history.rows[0]) == ["epoch", "loss"]


def test_a_metric_in_training_is_the_mean_over_the_steps_of_the_epoch(packed, quick_fit, data):
    first = lambda out, y: y.astype(jnp.float32)  # noqa: E731
    _, history = quick_fit(packed, "a", metrics={"ones": first}, batch_size=8)
    assert history.rows[0]["ones"] == pytest.approx(data[1].mean(), rel=1e-6)


def test_metrics_and_losses_that_are_none_are_refused_by_name(packed, quick_fit):
    for metrics, message in (
        (
            {"mean": lambda out, y: out.mean()},
            r"metric 'mean' must be one number per example, shape \(8,\); found \(\)",
        ),
        ({"all": lambda out, y: out}, r"metric 'all' must be one number per example"),
        ({"bad": lambda out, y: out["x"]}, "the metric 'bad' fails on outputs"),
    ):
        with pytest.raises(pae.DataError, match=message):
            quick_fit(packed, "a", metrics=metrics)
    for metrics in ({"loss": squared}, {"epoch": squared}, {"count": squared}, {"score": squared}, {"x": 3}):
        with pytest.raises(pae.ArgumentError, match="metrics maps names other than 'loss'"):
            quick_fit(packed, "a", metrics=metrics)
    with pytest.raises(pae.ArgumentError, match=r"loss must be a function \(outputs, y\) -> losses, found 'mse'"):
        quick_fit(packed, "a", loss="mse")
    with pytest.raises(pae.ArgumentError, match="loss_per must be one of 'example', 'batch', found 'token'"):
        quick_fit(packed, "a", loss_per="token")


def test_the_accuracy_is_that_of_the_default_loss_alone(packed, quick_fit):
    smoothed = lambda out, y: optax.softmax_cross_entropy(out, jax.nn.one_hot(y, 2))  # noqa: E731
    _, own = quick_fit(packed, "a", loss=smoothed)
    _, default = quick_fit(packed, "a")
    assert list(own.rows[0]) == ["epoch", "loss"]
    assert list(default.rows[0]) == ["epoch", "loss", "accuracy"]
    assert own.rows[-1]["loss"] == pytest.approx(default.rows[-1]["loss"], rel=1e-5)


def test_a_metric_that_mixes_examples_is_refused(net, regression, data):
    x, target = data[0], data[0][:, :1]
    metrics = {"distance": lambda out, y: jnp.abs(out - y[:, 0]).mean(axis=-1)}
    with jax.numpy_rank_promotion("allow"), pytest.raises(pae.DataError, match="metric 'distance' mixes examples"):
        pae.evaluate(net, regression, "a", (x, target), loss=squared, metrics=metrics)
