"""Learn three tasks into one network and compare the bits of the older ones after every call: `SHARING CHAIN FOLDER`.

A process of its own, because XLA reads its flags once per process, and the other tests set some.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import pae_jax as pae
from pae_jax.training.optimizer import transformation

CHAINS = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "momentum": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "MultiSteps": lambda: optax.MultiSteps(optax.lamb(1e-2), 2),
}


def with_picks(weights, picks):
    """One optimizer that trains the scores of picks by another chain than everything else."""
    label = lambda params: {part: "pick" if part == "pick" else "rest" for part in params}  # noqa: E731
    return optax.partition({"rest": transformation(weights), "pick": picks}, label)


def main(sharing, chain, folder):
    net = pae.linen(lambda width: pae.models.SmallCNN(width=width, channels=(8, 8), stem=2), jnp.zeros((1, 12, 12, 1)))
    x = np.random.default_rng(0).normal(size=(64, 12, 12, 1)).astype(np.float32)
    data = x, (x.mean(axis=(1, 2, 3)) > 0).astype(np.int32)
    tx = with_picks(CHAINS[chain](), optax.adam(0.01))
    state, answers = pae.init(net, jax.random.key(0)), {}

    def unchanged(state):
        for name, before in answers.items():
            assert np.asarray(pae.predict(net, state, name, x)).tobytes() == before, name
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
    pae.save(Path(folder) / "stage", state)
    unchanged(pae.load(net, Path(folder) / "stage"))
    print(f"{len(answers)} tasks unchanged")


if __name__ == "__main__":
    main(*sys.argv[1:])
