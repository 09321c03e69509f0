"""A stream of three tasks by a recipe: one call trains, prunes, expands if needed, and resumes.

Command:   python examples/recipe.py --out runs/recipe       (run it again to resume)
Expected:  a matrix whose columns are constant from the row of their task on, and forgetting 0; 20 seconds, 2 CPU cores
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import pae_jax as pae
from pae_jax import recipes


def tasks() -> list[pae.Task]:
    """Return three tasks on the same 16 numbers: which of three hidden directions is closest to an example?"""
    rng = np.random.default_rng(0)
    found = []
    for number in range(3):
        directions = rng.normal(size=(3, 16))
        x = rng.normal(size=(1200, 16)).astype(np.float32)
        y = (x @ directions.T).argmax(axis=1).astype(np.int32)
        train, val, test = ((x[rows], y[rows]) for rows in (slice(0, 600), slice(600, 900), slice(900, 1200)))
        found.append(pae.Task(f"task {number + 1}", head=3, train=train, val=val, test=test))
    return found


def recipe() -> pae.Recipe:
    """Return Packing and Expanding, with short trainings for a small network."""
    train = recipes.Phase(20, recipes.Rate(1e-2, cosine=True), recipes.Adam())
    rung = recipes.Phase(4, recipes.Rate(3e-3, cosine=True), recipes.Adam())
    return dataclasses.replace(
        recipes.pae(),
        batch_size=50,
        train=train,
        ladder=recipes.Ladder((0.3, 0.5, 0.7, 0.8, 0.9), rung, ramp=2.0, every=2, misses=2),  # pruning, rung by rung
        goal="baseline",  # keep the accuracy of the task's own network ...
        tolerance=0.02,  # ... minus at most two points
        expansion=recipes.Expansion(step=0.5, maximum=2.0),  # expand if that fails, to at most twice the weights
    )


def main(out: Path) -> pae.metrics.AccuracyMatrix:
    """Learn the stream; return the accuracy of every task after every task."""
    net = pae.linen(lambda width: pae.models.MLP(width, (32, 32)), jnp.zeros((1, 16)))
    key = jax.random.key(0)
    stream = pae.learn_all(net, pae.init(net, key), tasks(), recipe(), key=key, run=pae.Run(out))
    for outcome in stream.outcomes:
        print(outcome)
    assert stream.matrix is not None
    print(pae.report(stream.state), stream.matrix, f"forgetting {stream.matrix.forgetting()}", sep="\n\n")
    return stream.matrix


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/recipe"), help="folder of the run")
    main(parser.parse_args().out)
