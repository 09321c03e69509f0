"""Training on several devices: speed of the same epoch on 1, 2, 4, ... devices, and whether the results agree.

Command:   python benchmarks/scaling.py
Expected:  on any number of devices the same weights up to the order of summation (largest difference <= 1e-4 of the
           largest weight) and the same bits in frozen ones; on 8 virtual devices of 2 CPU cores nothing gets faster; 2
           minutes. On real devices the epoch on n of them takes about 1 / n
Writes:    benchmarks/results/scaling.json

On a machine with only a CPU, the CPU is split into 8 virtual devices. That shows the cost of dividing the work, not the
gain. "batch" splits every batch over the devices; "batch and weights" splits weights, owners and optimizer state as
well. Each runs one epoch of `pae.fit` on the same batches, in turn, in one process, and is compared with one device
without a mesh.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import functools
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import steps
from jax.sharding import Mesh

import pae_jax as pae

# Model, shape of a batch, batches.
CASES: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "MLP 256, batch 512": (functools.partial(pae.models.MLP, hidden=(1024, 1024)), (512, 256), 40),
    "SmallCNN 32x32x3, batch 128": (functools.partial(pae.models.SmallCNN, stem=2), (128, 32, 32, 3), 20),
}


def measure(model: Any, shape: tuple[int, ...], batches: int, repeats: int) -> dict[str, Any]:
    """Return times of an epoch on each number of devices, and how its result compares with that of one device."""
    batch, *inputs = shape
    net = pae.linen(model, jnp.zeros((1, *inputs)))
    state = steps.packed_state(net)
    data = steps.random_examples(batch * batches, inputs)
    tx = optax.sgd(1e-3, momentum=0.9)

    def fit(devices: pae.Devices | None = None) -> pae.State:
        options: Any = {"optimizer": tx, "epochs": 1, "batch_size": batch, "devices": devices}
        return pae.fit(net, state, "newest", data, key=jax.random.key(0), **options)[0]

    ways: dict[str, Callable[[], pae.State]] = {"1": fit}
    for count in (2**n for n in range(1, len(jax.devices()).bit_length())):
        mesh = Mesh(np.asarray(jax.devices()[:count]), ("data",))
        ways[f"{count}, batch"] = functools.partial(fit, pae.Devices(mesh))
        ways[f"{count}, batch and weights"] = functools.partial(fit, pae.Devices(mesh, split_weights=True))
    reference = ways["1"]()
    results = {name: _compared(way(), reference, state) for name, way in ways.items() if name != "1"}
    timed = {name: functools.partial(_arrays, way) for name, way in ways.items()}
    return {**harness.compare(harness.in_turn(timed, repeats, 1), "1"), "results": results}


def _arrays(way: Callable[[], pae.State]) -> Any:
    return way().shared


def _compared(found: pae.State, reference: pae.State, before: pae.State) -> dict[str, Any]:
    difference, frozen = 0.0, True
    leaves = (found.shared, reference.shared, before.shared, before.owner)
    for mine, theirs, old, owner in zip(*map(jax.tree.leaves, leaves), strict=True):
        mine, theirs, old, kept = (np.asarray(leaf) for leaf in (mine, theirs, old, owner < found.tasks["newest"].id))
        difference = max(difference, float(np.abs(mine - theirs).max() / np.abs(theirs).max()))
        frozen &= mine[kept].tobytes() == old[kept].tobytes()
    return {"largest difference / largest weight": harness.significant(difference, 2), "frozen bits equal": frozen}


def main() -> None:
    """Measure the cases and write the result file."""
    settings = harness.options(__doc__, 5)
    harness.publish(
        settings,
        {name: functools.partial(measure, *case, settings.repeats) for name, case in CASES.items()},
    )


if __name__ == "__main__":
    main()
