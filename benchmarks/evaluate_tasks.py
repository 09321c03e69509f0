"""Cost of evaluating every task of a network, compared with the bare forward passes.

Command:   python benchmarks/evaluate_tasks.py           (--only SmallCNN for one model)
Expected:  evaluate / bare <= 1.15 for the convolutional models on 2 CPU cores; the second task compiles nothing;
           1 minute
Writes:    benchmarks/results/evaluate_tasks.json

T frozen tasks, each owning half of the weights that were free, are evaluated one after the other on the same images.
"bare" runs the compiled evaluation step on weights masked beforehand and on batches already on the device, and waits
once per task, as `evaluate` must to return numbers. `evaluate` also checks the data, masks the weights once per task,
cuts batches and adds up the sums.
"""

from __future__ import annotations

import functools
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import steps

import pae_jax as pae
from pae_jax.core import ownership
from pae_jax.trees import merge

CLASSES = steps.CLASSES
# Model, shape of a batch, batches, tasks.
CASES: dict[str, tuple[Any, tuple[int, ...], int, int]] = {
    "MLP 16, 8 tasks of 20 batches of 256": (pae.models.MLP, (256, 16), 20, 8),
    "SmallCNN 112x92x1, 8 tasks of 4 batches of 100": (pae.models.SmallCNN, (100, 112, 92, 1), 4, 8),
    "VGG16 32x32x3, 4 tasks of 4 batches of 100": (pae.models.VGG16, (100, 32, 32, 3), 4, 4),
}


def frozen_tasks(net: pae.Net, count: int) -> pae.State:
    """Return a network with frozen tasks, each pruned to half of its weights."""
    state = pae.init(net, jax.random.key(0))
    for index in range(count):
        name = f"task {index}"
        state = pae.pack(net, state, name, head=CLASSES, key=jax.random.key(index))
        state = pae.freeze(pae.prune(state, name, 0.5), name)
    return state


def measure(model: Any, shape: tuple[int, ...], batches: int, tasks: int, repeats: int) -> dict[str, Any]:
    """Return the times of evaluating all tasks both ways, and the compilations of the first and the later tasks."""
    batch, *image = shape
    net = pae.linen(model, jnp.zeros((1, *image)))
    state = frozen_tasks(net, tasks)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch * batches, *image)).astype(np.float32)
    y = rng.integers(0, CLASSES, len(x)).astype(np.int32)
    names = list(state.tasks)
    with harness.compilations() as first:
        pae.evaluate(net, state, names[0], (x, y), batch_size=batch)
    with harness.compilations() as later:
        for name in names[1:]:
            pae.evaluate(net, state, name, (x, y), batch_size=batch)

    entries = list(state.tasks.values())
    variables = [merge(ownership.task_weights(state, entry), entry.local) for entry in entries]
    step = steps.eval_step(net, state.width, (x[:batch], y[:batch]))
    ones = jnp.ones(batch, jnp.float32)
    cuts = [slice(start, start + batch) for start in range(0, len(x), batch)]
    pieces = [(jnp.asarray(x[cut]), jnp.asarray(y[cut]), ones) for cut in cuts]

    def bare() -> None:
        for entry, own in zip(entries, variables, strict=True):
            jax.block_until_ready([step(own, entry.head, *piece) for piece in pieces])

    def evaluate() -> None:
        for name in names:
            pae.evaluate(net, state, name, (x, y), batch_size=batch)

    result = harness.compare(harness.in_turn({"bare": bare, "evaluate": evaluate}, repeats, 1), "bare")
    return {
        **result,
        "seconds_per_task": {name: harness.significant(s / tasks) for name, s in result["seconds"].items()},
        "compilations": {"first task": first.count, "later tasks": later.count},
    }


def main() -> None:
    """Measure the cases and write the result file."""
    settings = harness.options(__doc__, 7)
    harness.publish(
        settings,
        {name: functools.partial(measure, *case, settings.repeats) for name, case in CASES.items()},
    )


if __name__ == "__main__":
    main()
