"""Cost of `pae.expand` per million weights: analysis, compilation and copying the weights.

Command:   python benchmarks/expand_cost.py              (--only VGG16 for one model)
Expected:  below 1 second per million weights of the wide network for VGG16 on 2 CPU cores, nearly all of it
           compilation; 2 minutes
Writes:    benchmarks/results/expand_cost.json

A network with one frozen task is expanded by the paper's size ratio 1.2. "expand" is the whole call on a new network
description each time, so it compiles what a user's first expansion compiles: drawing new weights and checking that the
wide network computes the old function. "expand again" repeats the call on a description that knows both widths. "put"
only copies weights and owners into the wide arrays. Seconds are medians. There is no baseline; compare the parts with
each other.
"""

from __future__ import annotations

import functools
from typing import Any

import harness
import jax
import jax.numpy as jnp

import pae_jax as pae

CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "MLP 16": (pae.models.MLP, (1, 16)),
    "SmallCNN 112x92x1": (pae.models.SmallCNN, (1, 112, 92, 1)),
    "VGG16 32x32x3": (pae.models.VGG16, (1, 32, 32, 3)),
}


def measure(model: Any, shape: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Return times of the parts of an expansion, and what it compiles."""
    width, key = pae.width_for(1.2), jax.random.key(3)
    known = pae.linen(model, jnp.zeros(shape))
    state = pae.pack(known, pae.init(known, jax.random.key(0)), "first", head=5, key=jax.random.key(1))
    state = pae.freeze(state, "first")

    def arrays(state: pae.State) -> Any:
        return state.shared, state.owner

    with harness.compilations() as compiled:
        wide = pae.expand(known, state, width=width, key=key)
    maps, fresh = wide.growth[-1].maps, jax.tree.map(jnp.zeros_like, wide.shared)
    ways: dict[str, harness.Way] = {
        "expand": lambda: arrays(pae.expand(pae.linen(model, jnp.zeros(shape)), state, width=width, key=key)),
        "expand again": lambda: arrays(pae.expand(known, state, width=width, key=key)),
        "put": lambda: (maps.put({"params": state.shared}, {"params": fresh}), maps.put({"params": state.owner})),
    }
    result = harness.compare(harness.in_turn(ways, repeats, 1), "expand")
    weights = sum(leaf.size for leaf in jax.tree.leaves(wide.shared))
    return {
        **result,
        "weights": weights,
        "seconds_per_million_weights": {
            name: harness.significant(1e6 * seconds / weights) for name, seconds in result["seconds"].items()
        },
        "compilations": {"first expansion": compiled.count, "seconds": compiled.seconds},
    }


def main() -> None:
    """Measure the cases and write the result file."""
    settings = harness.options(__doc__, 3)
    harness.publish(
        settings,
        {name: functools.partial(measure, *case, settings.repeats) for name, case in CASES.items()},
    )


if __name__ == "__main__":
    main()
