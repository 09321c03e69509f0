"""Cost of one update of gradual pruning, per million weights and compared with a train step.

Command:   python benchmarks/prune_cost.py               (--only VGG16 for one model)
Expected:  prune / step <= 0.4 for VGG16 with batch 32 on 2 CPU cores, either scope; no recompilation for another
           target; 1 minute
Writes:    benchmarks/results/prune_cost.json

A train step, as `pae.fit` runs it, and the release of the smallest weights are timed in turn, in one process. Every
update has another target, as in a cubic schedule, on the same network. "by sorting" finds the same thresholds by
`jnp.sort` of each leaf, which the counting passes replace. Weights are float32 as drawn by the model.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import steps

import pae_jax as pae
from pae_jax.core import ownership
from pae_jax.core.pruning import release_smallest

CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "SmallCNN 112x92x1, batch 25": (pae.models.SmallCNN, (25, 112, 92, 1)),
    "VGG16 32x32x3, batch 32": (pae.models.VGG16, (32, 32, 32, 3)),
}
FRACTIONS = tuple(0.05 + 0.9 * i / 16 for i in range(17))


@jax.jit
def sorted_thresholds(shared: Any, owner: Any, task_id: jax.Array, wanted: jax.Array) -> list[jax.Array]:
    """Return the wanted-th smallest magnitude of each leaf by sorting it."""
    leaves = zip(jax.tree.leaves(shared), jax.tree.leaves(owner), wanted, strict=True)
    return [jnp.sort(jnp.where(o == task_id, jnp.abs(w), jnp.inf), axis=None)[n - 1] for w, o, n in leaves]


def measure(model: Any, shape: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Return times and ratios of a train step, an update in each scope, and sorting."""
    net = pae.linen(model, jnp.zeros((1, *shape[1:])))
    state = steps.packed_state(net, frozen=0)
    shared, owner = state.shared, state.owner
    sizes = np.asarray([leaf.size for leaf in jax.tree.leaves(shared)])
    task_id = ownership.id_array(state.tasks["newest"].id)

    def quotas(together: bool) -> Callable[[], jax.Array]:
        base = np.full_like(sizes, sizes.sum()) if together else sizes
        rounds = itertools.cycle([jnp.asarray(np.round(share * base), jnp.int32) for share in FRACTIONS])
        return lambda: next(rounds)

    leaf, together = quotas(together=False), quotas(together=True)
    ways: dict[str, harness.Way] = {
        "step": steps.packed_step(net, state, optax.sgd(1e-3, momentum=0.9), steps.random_batch(shape)),
        "prune": lambda: release_smallest(shared, owner, task_id, leaf(), "leaf"),
        "prune, global": lambda: release_smallest(shared, owner, task_id, together(), "global"),
        "by sorting": lambda: sorted_thresholds(shared, owner, task_id, leaf()),
    }
    with harness.compilations() as first:
        harness.in_turn(ways, 1, 1)
    with harness.compilations() as later:
        times = harness.in_turn(ways, repeats, 1)
    result = harness.compare(times, "step")
    millions = sizes.sum() / 1e6
    program = release_smallest.lower(shared, owner, task_id, leaf(), "leaf").compile()
    return {
        **result,
        "weights": int(sizes.sum()),
        "milliseconds_per_million_weights": {
            name: harness.significant(1e3 * seconds / millions)
            for name, seconds in result["seconds"].items()
            if name != "step"
        },
        "compilations": {"first updates": first.count, "seconds": first.seconds, "later updates": later.count},
        "bytes": harness.program_bytes(program),
    }


def main() -> None:
    """Measure the cases and write the result file."""
    settings = harness.options(__doc__, 12)
    harness.publish(
        settings,
        {name: functools.partial(measure, *case, settings.repeats) for name, case in CASES.items()},
    )


if __name__ == "__main__":
    main()
