"""Cost of serving beyond the forward pass, and how often the task of an input is recognised.

Command:   python benchmarks/serving.py
Expected:  Server.predict / bare <= 1.05 for SmallCNN, batch 25; switching among 8 tasks compiles nothing; the group of
           >= 0.75 of the ORL test images, one of 8, is found by confidence (chance 0.125); about 2 minutes on 2 CPU
           cores
Writes:    benchmarks/results/serving.json

Requests cycle through the eight tasks. Every way to answer the same request is timed in turn, in one process; ratios
are ratios of medians. "bare" is the compiled function on weights prepared beforehand, as one would write it to serve
one task. The faces are eight groups of five people, learned into one network. The test images, which were used for no
choice, are given without the name of their group, one by one and by person (three images).
"""

from __future__ import annotations

import functools
import itertools
import time
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

import pae_jax as pae
from pae_jax import data
from pae_jax.core import ownership
from pae_jax.nets.forward import apply_task
from pae_jax.serving.server import Server

TASKS, CLASSES = 8, 5
CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "MLP 16, batch 1": (pae.models.MLP, (1, 16)),
    "SmallCNN 112x92x1, batch 1": (pae.models.SmallCNN, (1, 112, 92, 1)),
    "SmallCNN 112x92x1, batch 25": (pae.models.SmallCNN, (25, 112, 92, 1)),
    "ResNet18 32x32x3, batch 1": (pae.models.resnet18, (1, 32, 32, 3)),
}


def frozen_state(net: pae.Net) -> pae.State:
    """Return a network with eight frozen tasks, each pruned to half of its weights."""
    state = pae.init(net, jax.random.key(0))
    for index in range(TASKS):
        state = pae.pack(net, state, f"task {index}", head=CLASSES, key=jax.random.key(index))
        state = pae.freeze(pae.prune(state, f"task {index}", 0.5), f"task {index}")
    return state


def measure(model: Any, shape: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Compare the ways to answer for one task and for all, and count what switching tasks compiles."""
    net = pae.linen(model, jnp.zeros((1, *shape[1:])))
    state = frozen_state(net)
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    fast, small = Server(net, state), Server(net, state, resident="masks")
    with harness.compilations() as first:
        jax.block_until_ready((fast.predict(fast.tasks[0], x), small.predict(small.tasks[0], x)))
    with harness.compilations() as switching:
        for task in fast.tasks:
            jax.block_until_ready((fast.predict(task, x), small.predict(task, x)))

    entries = [state.tasks[task] for task in fast.tasks]
    operands = [(ownership.task_weights(state, entry), entry.local, entry.head) for entry in entries]
    apply = apply_task(net, 1.0, CLASSES)
    turns = {name: itertools.cycle(range(TASKS)) for name in ("bare", "weights", "masks", "predict")}
    one = {
        "bare": lambda: apply(*operands[next(turns["bare"])], x),
        "Server": lambda: fast.predict(fast.tasks[next(turns["weights"])], x),
        "Server, masks": lambda: small.predict(small.tasks[next(turns["masks"])], x),
        "pae.predict": lambda: pae.predict(net, state, fast.tasks[next(turns["predict"])], x),
    }
    compile_seconds = {}
    for name, server in (("weights", fast), ("masks", small)):
        start = time.perf_counter()
        jax.block_until_ready(server.predict_all(x, together=True))
        compile_seconds[name] = round(time.perf_counter() - start, 2)
    every = {
        "bare, one by one": lambda: [apply(*own, x) for own in operands],
        "predict_all": lambda: fast.predict_all(x),
        "together": lambda: fast.predict_all(x, together=True),
        "predict_all, masks": lambda: small.predict_all(x),
        "together, masks": lambda: small.predict_all(x, together=True),
    }
    shared = sum(leaf.nbytes for leaf in jax.tree.leaves(state.shared))
    return {
        "compiled by the first request": first.count,
        "compiled by switching tasks": switching.count,
        "one task": harness.compare(harness.in_turn(one, repeats * TASKS), "bare"),
        "all tasks": harness.compare(harness.in_turn(every, repeats), "bare, one by one"),
        "first call together, seconds": compile_seconds,
        "resident bytes / shared bytes": {
            "weights": round(fast.nbytes / shared, 3),
            "masks": round(small.nbytes / shared, 3),
        },
    }


def learn_faces(epochs: int) -> tuple[Server, list[data.FaceGroup]]:
    """Learn the eight groups of faces into one network, each pruned to a fifth of its weights."""
    groups = data.groups(data.load_orl())
    net = pae.linen(pae.models.SmallCNN, jnp.zeros((1, 112, 92, 1)))
    state = pae.init(net, jax.random.key(0))
    steps = 18 * epochs
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    tuning = optax.adam(optax.cosine_decay_schedule(1e-3, steps // 2))
    for index, group in enumerate(groups):
        key = jax.random.fold_in(jax.random.key(0), index)
        images = data.augmented(group.train)
        options = {"batch_size": 25, "key": key}
        state = pae.pack(net, state, group.name, head=CLASSES, key=key)
        state, _ = pae.fit(net, state, group.name, images, optimizer=optimizer, epochs=epochs, **options)
        schedule = pae.CubicSchedule(final=0.8, end=steps // 4)
        state, _ = pae.fit(
            net, state, group.name, images, optimizer=tuning, epochs=epochs // 2, pruning=schedule, **options
        )
        state = pae.freeze(state, group.name)
    return Server(net, state), groups


def recognise(epochs: int) -> dict[str, Any]:
    """Return how often a test image's group is found, and how often its person, given the group and not."""
    server, groups = learn_faces(epochs)
    tests = {group.name: group.test[0] for group in groups}
    result: dict[str, Any] = {"chance": 1 / len(groups)}
    for by in ("confidence", "entropy"):
        for images, group in (("1 image", 1), ("3 images of a person", 3)):
            found = server.task_inference_accuracy(tests, by=by, group=group)
            result[f"group found by {by}, {images}"] = round(found["accuracy"], 4)
    told, guessed = [], []
    for group in groups:
        x, y = group.test
        told.append(np.asarray(server.predict(group.name, x)).argmax(axis=1) == y)
        found = server.infer_task(x)
        labels = [int(found.logits[task][row].argmax()) for row, task in enumerate(found.tasks)]
        guessed.append((np.asarray(found.tasks) == group.name) & (np.asarray(labels) == y))
    result["person right, group told"] = round(float(np.concatenate(told).mean()), 4)
    result["person right among 40, group guessed"] = round(float(np.concatenate(guessed).mean()), 4)
    return result


def main() -> None:
    """Measure all cases and write the result file."""
    epochs = ("--epochs", {"type": int, "default": 12, "help": "epochs per group of faces (default 12)"})
    settings = harness.options(__doc__, 15, epochs)
    timings = {name: functools.partial(measure, *case, settings.repeats) for name, case in CASES.items()}
    harness.publish(settings, {"faces": functools.partial(recognise, settings.epochs), **timings})


if __name__ == "__main__":
    main()
