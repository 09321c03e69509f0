"""How long saving a stage holds up training, with and without `wait=False`.

Command:   python benchmarks/background_saving.py        (--only SmallCNN for one model; --folder to choose the disk)
Expected:  `save(wait=False)` returns after less than a tenth of the time of `save`; 20 seconds for the MLP
Writes:    benchmarks/results/background_saving.json

Three tasks, two of them frozen; all weights are random. "blocked" compares the calls themselves: `save` returns once
the stage is on the disk, `save(wait=False)` once the arrays are copied; "whole" is the latter with its `wait`.
"training" is a few steps of `fit` alone, with a `save` before them, and with a `save(wait=False)` before and its `wait`
after them. On a CPU the writing takes its share of the cores from the training.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import save_load

import pae_jax as pae

STEPS = 6
CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "MLP 1000": (lambda width: pae.models.MLP(width, (2000, 2000)), (1, 1000)),
    **save_load.CASES,
}


def measure(model: Any, shape: tuple[int, ...], repeats: int, parent: Path | None) -> dict[str, Any]:
    """Return times and ratios of saving, and of training beside it."""
    net = pae.linen(model, jnp.zeros(shape))
    state, optimizer = save_load.three_tasks(net), pae.recipes.Sgd(learning_rate=0.01)
    rng = np.random.default_rng(0)
    data = rng.normal(size=(16 * STEPS, *shape[1:])).astype(np.float32), rng.integers(0, 5, 16 * STEPS)
    fresh = itertools.count()
    with tempfile.TemporaryDirectory(dir=parent) as folder:

        def stage() -> Path:
            return Path(folder) / f"stage-{next(fresh)}"

        def train() -> Any:
            options: Any = {"optimizer": optimizer, "epochs": 1, "batch_size": 16, "key": jax.random.key(1)}
            return pae.fit(net, state, "task 2", data, **options)[0].shared

        def save_then_train() -> Any:
            pae.save(stage(), state)
            return train()

        def save_and_train() -> Any:
            saving = pae.save(stage(), state, wait=False)
            trained = train()
            saving.wait()
            return trained

        times: dict[str, list[float]] = {"save": [], "save(wait=False)": [], "whole": []}
        for number in range(1 + repeats):
            moments = [time.perf_counter()]
            pae.save(stage(), state)
            moments.append(time.perf_counter())
            saving = pae.save(stage(), state, wait=False)
            moments.append(time.perf_counter())
            saving.wait()
            if number:
                times["save"].append(moments[1] - moments[0])
                times["save(wait=False)"].append(moments[2] - moments[1])
                times["whole"].append(time.perf_counter() - moments[1])
        ways: dict[str, harness.Way] = {
            "train": train,
            "save, train": save_then_train,
            "save(wait=False), train, wait": save_and_train,
        }
        training = harness.compare(harness.in_turn(ways, repeats, 1), "train")
    weights = sum(leaf.size for leaf in jax.tree.leaves(state.shared))
    return {"weights": weights, "steps": STEPS, "blocked": harness.compare(times, "save"), "training": training}


if __name__ == "__main__":
    harness.publish_on_disk(__doc__, CASES, measure)
