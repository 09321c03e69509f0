"""Overhead of the lifelong loop over its train steps, and the number of compilations in a whole run.

Command:   python benchmarks/lifelong_cost.py
Expected:  learn / bare <= 1.03 and learn / by hand <= 1.1 on 2 CPU cores; every distinct train step is traced once per
           width, regardless of the number of tasks, rungs and attempts; 4 minutes
Writes:    benchmarks/results/lifelong_cost.json

"time": a second task, trained and pruned on two rungs, validated after every epoch. "bare" takes the same number of
compiled train and evaluation steps, on one batch already on the device. "by hand" calls `pack`, `fit` and `freeze` as a
notebook would. "learn" makes the same calls, and "learn, with a run folder" also writes every stage. All programs are
compiled before timing.

"compilations": five tasks whose goal cannot be reached, so that the network is expanded to its largest width. It counts
the traces of the model in training, per width, and all programs that later tasks compile at a width already used. PAE
has one train step per width. CPG has three: without picks, for the first task; with the optimizer of picks; and with
picks that are not trained.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import optax
import steps

import pae_jax as pae
from pae_jax.core import ownership
from pae_jax.lifelong.recipes import Expansion, Ladder, Phase, Rate, Recipe, Sgd
from pae_jax.trees import merge

BATCH, TRAIN, VAL = 64, 1920, 512
LADDER = (0.4, 0.6)


def cost(repeats: int) -> dict[str, Any]:
    """Return the times of learning a task with each variant."""
    shape = (32, 32, 3)
    net = pae.linen(functools.partial(pae.models.SmallCNN, stem=2), jnp.zeros((1, *shape)))
    state = steps.packed_state(net, frozen=1)
    start = pae.drop(state, "newest")
    train, val = steps.random_examples(TRAIN, shape), steps.random_examples(VAL, shape, 1)
    own, rung = Phase(8, Rate(1e-3), Sgd()), Phase(4, Rate(1e-3), Sgd())
    ladder = Ladder(LADDER, rung, ramp=1.0, choose="last")
    recipe = Recipe("two rungs", own, BATCH, ladder=ladder)
    task, key = pae.Task("new", steps.CLASSES, train, val), jax.random.key(3)
    tx = optax.chain(Sgd().transformation(), optax.scale(1e-3))

    def by_hand() -> Any:
        now = pae.pack(net, start, "new", head=steps.CLASSES, key=key)
        options: Any = {"optimizer": tx, "batch_size": BATCH, "val": val, "key": key, "keep": "best"}
        now, _ = pae.fit(net, now, "new", train, epochs=own.epochs, **options)
        before = 0.0
        for fraction in LADDER:
            schedule = pae.CubicSchedule(final=fraction, end=TRAIN // BATCH, initial=before, every=ladder.every)
            now, _ = pae.fit(net, now, "new", train, epochs=rung.epochs, pruning=schedule, **options)
            before = fraction
        return pae.freeze(now, "new").shared

    def learn(run: pae.Run | None = None) -> Any:
        return pae.learn(net, start, task, recipe, key=key, run=run).state.shared

    def learn_on_disk() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            return learn(pae.Run(folder))

    epochs = own.epochs + len(LADDER) * rung.epochs
    step = steps.packed_step(net, state, optax.sgd(1e-3, momentum=0.9), steps.random_batch((BATCH, *shape)))
    entry = state.tasks["newest"]
    batch = steps.random_batch((256, *shape))
    judge = steps.eval_step(net, state.width, batch)
    piece = (merge(ownership.task_weights(state, entry), entry.local), entry.head, *batch)
    ones = jnp.ones(256)

    def bare() -> Any:
        for _ in range(epochs):
            for _ in range(TRAIN // BATCH):
                step()
            jax.block_until_ready([judge(*piece, ones) for _ in range(VAL // 256)])
        return step.moving

    ways = {"by hand": by_hand, "bare": bare, "learn": learn, "learn, with a run folder": learn_on_disk}
    times = harness.in_turn(ways, repeats, 1)
    found = harness.compare(times, "by hand")
    bare_ratios = harness.compare({name: times[name] for name in ("learn", "by hand", "bare")}, "bare")["ratios"]
    return {**found, "ratios": found["ratios"] | bare_ratios, "steps": epochs * (TRAIN // BATCH)}


def compilations(recipe: Recipe, tasks: int = 5) -> dict[str, Any]:
    """Count the training traces of a model while a recipe learns tasks, and the compilations at known widths."""
    traced: Counter[str] = Counter()

    class Counted(pae.models.MLP):
        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            if train:
                traced[f"size ratio {self.width**2:.3g}"] += 1
            return super().__call__(x, train)

    net = pae.linen(Counted, jnp.zeros((1, 8)))
    val = steps.random_examples(64, (8,), 9)
    stream = [pae.Task(f"{i}", steps.CLASSES, steps.random_examples(128, (8,), i), val) for i in range(tasks)]
    key = jax.random.key(0)
    first = pae.learn_all(net, pae.init(net, key), stream[:2], recipe, key=key)
    known = dict(traced)
    with harness.compilations() as later:
        pae.learn_all(net, first.state, stream[2:], recipe, key=key)
    new = {name: count - known.get(name, 0) for name, count in traced.items() if count > known.get(name, 0)}
    return {"traces of the first two tasks": known, "traces of the others": new, "programs of the others": later.count}


def main() -> None:
    """Measure the cases and write the result file."""
    settings = harness.options(__doc__, 5)
    phase = Phase(4, Rate(0.01), Sgd())
    ladder = Ladder((0.5, 0.8), phase, ramp=1.0)
    pae_like = Recipe("pae", phase, 16, ladder=ladder, goal=2.0, expansion=Expansion(0.5, 2.0))
    cpg_like = dataclasses.replace(
        pae_like, name="cpg", train=dataclasses.replace(phase, pick_rate=Rate(0.01)), retrain=phase, sharing="picked"
    )
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "time, SmallCNN 32x32x3, batch 64": functools.partial(cost, settings.repeats),
        "compilations, PAE, five tasks": functools.partial(compilations, pae_like),
        "compilations, CPG, five tasks": functools.partial(compilations, cpg_like),
    }
    harness.publish(settings, cases)


if __name__ == "__main__":
    main()
