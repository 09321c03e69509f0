"""The law above all once more, with every optimization of the compiler that users get."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pae_jax as pae
from pae_jax.training.train_state import transformation

CHAINS = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "momentum": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "MultiSteps": lambda: optax.MultiSteps(optax.lamb(1e-2), 2),
}


def with_picks(weights, picks):
    """One optimizer that trains the scores of picks by another chain than everything else."""
    label = lambda params: {part: "pick" if part == "pick" else "rest" for part in params}  # noqa: E731
    return optax.partition({"rest": transformation(weights), "pick": picks}, label)


@pytest.fixture(scope="module")
def net():
    return pae.linen(lambda width: pae.models.SmallCNN(width=width, channels=(8, 8), stem=2), jnp.zeros((1, 12, 12, 1)))


@pytest.fixture(scope="module")
def data():
    x = np.random.default_rng(0).normal(size=(64, 12, 12, 1)).astype(np.float32)
    return x, (x.mean(axis=(1, 2, 3)) > 0).astype(np.int32)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("sharing", ["all", "picked"])
def test_old_tasks_keep_every_bit_through_train_prune_grow_save_and_load(net, data, chain, sharing, tmp_path):
    tx, x = with_picks(CHAINS[chain](), optax.adam(0.01)), data[0]
    state, answers = pae.init(net, jax.random.key(0)), {}

    def unchanged(state):
        for name, before in answers.items():
            assert np.asarray(pae.predict(net, state, name, x)).tobytes() == before
        pae.verify(state)

    for number, name in enumerate("abc"):
        key = jax.random.key(number)
        if number == 2:
            state = pae.expand(net, state, width=1.5, key=key)
            unchanged(state)
        state = pae.pack(net, state, name, head=2, key=key, sharing=sharing)
        state, history = pae.fit(net, state, name, data, optimizer=tx, epochs=2, key=key)
        assert ("pick" in history.end.params) == (sharing == "picked" and number > 0)
        unchanged(state)
        state = pae.freeze(pae.prune(state, name, 0.5), name)
        answers[name] = np.asarray(pae.predict(net, state, name, x)).tobytes()
        unchanged(state)
    pae.save(tmp_path / "stage", state)
    unchanged(pae.load(net, tmp_path / "stage"))
    assert len(set(answers.values())) == 3
