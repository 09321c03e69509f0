"""A-softmax against its formula, and at work: its head counts steps, its embeddings stay as they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pae_jax as pae
from pae_jax.errors import ArgumentError, StructureError
from pae_jax.faces.losses import AngularHead, ASoftmax

CLASSES, FEATURES = 3, 4


def outputs(seed, strength, count=6):
    """Return outputs of the head, embeddings and unit directions."""
    rng = np.random.default_rng(seed)
    e, w = rng.normal(size=(count, FEATURES)), rng.normal(size=(FEATURES, CLASSES))
    w /= np.linalg.norm(w, axis=0)
    out = np.concatenate([e @ w, e, np.full((count, 1), strength)], axis=1)
    return jnp.asarray(out, jnp.float32), e, w


@pytest.mark.parametrize("margin", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("strength", [0.0, 5.0])
def test_the_loss_is_that_of_the_paper(margin, strength):
    out, e, w = outputs(margin, strength)
    y = np.arange(len(e)) % CLASSES
    expected = []
    for embedding, label in zip(e, y, strict=True):
        length = np.linalg.norm(embedding)
        theta = np.arccos(embedding @ w / length)
        k = np.floor(margin * theta[label] / np.pi)
        psi = (-1) ** k * np.cos(margin * theta[label]) - 2 * k
        logits = length * np.cos(theta)
        logits[label] = length * (strength * np.cos(theta[label]) + psi) / (1 + strength)
        expected.append(np.log(np.exp(logits).sum()) - logits[label])
    np.testing.assert_allclose(ASoftmax(CLASSES, margin)(out, jnp.asarray(y)), expected, rtol=1e-4)


def test_the_angular_logit_falls_from_1_to_1_minus_twice_the_margin():
    cosine = jnp.cos(jnp.linspace(0, jnp.pi, 500))
    psi = np.asarray(ASoftmax(CLASSES, 4).angular(cosine))
    assert psi[[0, -1]].tolist() == pytest.approx([1.0, -7.0])
    assert (np.diff(psi) < 1e-5).all()
    assert np.abs(np.diff(psi)).max() < 0.1


def test_an_unknown_identity_counts_nothing_and_a_label_out_of_range_is_not_finite():
    out, *_ = outputs(0, 5.0, count=3)
    found = np.asarray(ASoftmax(CLASSES)(out, jnp.array([-1, CLASSES, 1])))
    assert (found[0], np.isnan(found[1]), np.isfinite(found[2])) == (0.0, True, True)


def test_what_cannot_be_right_is_refused():
    with pytest.raises(ArgumentError, match="margin must be 1 to 5, found 6"):
        ASoftmax(CLASSES, 6)
    with pytest.raises(ArgumentError, match="classes must be an integer of at least 2"):
        ASoftmax(1)
    with pytest.raises(StructureError, match=r"found 3 outputs of the head.*AngularHead\(3\)"):
        ASoftmax(CLASSES)(jnp.zeros((2, CLASSES)), jnp.zeros(2, jnp.int32))


def test_the_head_gives_lengths_times_cosines_counts_training_steps_and_is_packed_as_any_other(net, empty, data, adam):
    head = AngularHead(2, features=FEATURES)
    state = pae.pack(net, empty, "face", head=head, key=jax.random.key(1))
    options = {"optimizer": adam, "epochs": 2, "batch_size": 8, "key": jax.random.key(2), "loss": ASoftmax(2)}
    state, history = pae.fit(net, state, "face", data, **options)
    steps = 2 * (len(data[1]) // 8)
    assert float(state.tasks["face"].head["schedule"]["steps"]) == steps
    state = pae.freeze(pae.prune(state, "face", 0.5), "face")
    out = np.asarray(pae.predict(net, state, "face", data[0]))
    e, directions = np.asarray(head.embedding(out)), np.asarray(state.tasks["face"].head["params"]["directions"])
    np.testing.assert_allclose(out[:, :2], e @ (directions / np.linalg.norm(directions, axis=0)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(out[:, -1], 1500 / (1 + 0.1 * steps), rtol=1e-5)
    assert all(np.isfinite(row["loss"]) for row in history.rows)
    later = pae.pack(net, state, "other", head=2, key=jax.random.key(3))
    assert np.array_equal(pae.predict(net, later, "face", data[0]), out)
