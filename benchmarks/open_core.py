"""Cost of the functional core: a state as an argument of a jitted function, and the memory of a long sweep.

Command:   python benchmarks/open_core.py                (--only sweep for one case)
Expected:  a state of 20 tasks, 404 arrays, costs a call 1.3 times what its arrays in a dict cost; a sweep over 200
           optimizer settings adds no more memory than a few compiled programs (25 MB); 5 minutes on 2 CPU cores
Writes:    benchmarks/results/open_core.json

"call" passes a state of 20 frozen tasks, with one expansion, to a jitted function that reads one array of it, and the
same arrays in a dict. "sweep" trains an MLP of 384 weights with 200 optimizers, each a new object, and reads the
largest resident memory after each 50; the first 20, in which the caches fill, do not count.
"""

from __future__ import annotations

import functools
import gc
import resource
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

import pae_jax as pae

CALLS = 100


def call(repeats: int) -> dict[str, Any]:
    """Return the seconds of 100 calls with a state and with a dict of its arrays."""
    net = pae.linen(pae.models.SmallCNN, jnp.zeros((1, 32, 32, 3)))
    state = pae.init(net, jax.random.key(0))
    for index in range(20):
        name, key = f"task {index}", jax.random.key(index)
        if index == 10:
            state = pae.expand(net, state, width=1.5, key=key)
        state = pae.pack(net, state, name, head=5, key=key)
        state = pae.freeze(pae.prune(state, name, 0.7), name)
    arrays = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(state))}
    first = jax.jit(lambda tree: jax.tree.leaves(tree)[0].sum())
    ways = {name: functools.partial(_many, first, tree) for name, tree in (("state", state), ("dict", arrays))}
    return {**harness.compare(harness.in_turn(ways, repeats), "dict"), "arrays": len(arrays), "calls": CALLS}


def _many(function: Any, tree: Any) -> list[jax.Array]:
    return [function(tree) for _ in range(CALLS)]


def sweep(settings: int = 200, first: int = 20) -> dict[str, Any]:
    """Return the largest resident memory so far, in MB, while optimizers are tried."""
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    data = (x, (x[:, 0] > 0).astype(np.int32))
    net = pae.linen(pae.models.MLP, x[:1])
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
    found = {}
    for number in range(1, first + settings + 1):
        tx = optax.adam(1e-4 * number)
        pae.fit(net, state, "a", data, val=data, optimizer=tx, epochs=1, key=jax.random.key(2))
        if number >= first and (number - first) % 50 == 0:
            gc.collect()
            found[f"after {number}"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    values = list(found.values())
    return {"largest_resident_mb": found, "growth_mb": round(values[-1] - values[0], 1), "settings": settings}


def main() -> None:
    """Measure the cases and write the result file."""
    settings = harness.options(__doc__, 40)
    harness.publish(settings, {"call": functools.partial(call, settings.repeats), "sweep": sweep})


if __name__ == "__main__":
    main()
