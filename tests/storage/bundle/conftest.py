"""Networks of four tasks by kind of sharing, made once for all tests of bundles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pae_jax as pae

SHARINGS = {
    "all": {},
    "first": {"sharing": "first"},
    "picked": {"sharing": "picked"},
    "ternary": {"sharing": "picked", "picking": pae.Picking(threshold=0.002, initial=0.02, ternary=True)},
}


def _drawn_picks(state, task, seed):
    """Give an unfrozen task picks drawn at random."""
    entry = state.tasks[task]
    if entry.pick is None:
        return state
    draw = np.random.default_rng(seed)
    pick = jax.tree.map(lambda p: jnp.asarray(draw.choice([-0.1, 0.0, 0.1], p.shape), p.dtype), entry.pick)
    return state.replace(tasks={**state.tasks, task: entry.replace(pick=pick)})


def _grown(net, state, *tasks, widths=None, **options):
    """Pack, prune and freeze tasks of random weights; before those in `widths` the network is widened."""
    for number, task in enumerate(tasks, len(state.tasks)):
        key = jax.random.key(number)
        if widths and task in widths:
            state = pae.expand(net, state, width=widths[task], key=key)
        state = pae.pack(net, state, task, head=2 + number % 2, key=key, **options)
        state = _drawn_picks(_noisy(state, task, number), task, number)
        state = pae.freeze(pae.prune(state, task, 0.5), task)
    return state


def _noisy(state, task, seed):
    """Give the weights that a task owns random values."""
    number, key = state.tasks[task].id, jax.random.key(100 + seed)
    values = jax.tree.map(
        lambda w, o: jnp.where(o == number, jax.random.normal(key, w.shape, w.dtype), w), state.shared, state.owner
    )
    return state.replace(shared=values)


@pytest.fixture(scope="session")
def grown():
    """Return the function that adds tasks of random weights."""
    return _grown


@pytest.fixture(scope="session")
def make(net, empty):
    """Four tasks by kind of sharing; "c" after an expansion. Made once each."""
    made = {}

    def get(kind):
        if kind not in made:
            state = _grown(net, empty, "a", "b", **SHARINGS[kind])
            made[kind] = _grown(net, state, "c", "d", widths={"c": 1.5}, **SHARINGS[kind])
        return made[kind]

    return get
