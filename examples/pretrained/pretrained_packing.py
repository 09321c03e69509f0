"""Adding tasks to a pretrained encoder by packing: each task owns a few weights, its biases, its norms and its head.

The encoder is the first task, frozen; no task changes a bit of it or of another task.

local      biases, norms and head alone
expand     a few new channels in every layer; the task starts as exactly the pretrained encoder
reuse      the same, with the channels of all older tasks in view; biases and norms start from those of the older task
           whose features tell the new classes best apart by nearest neighbours
budget     half a percent of the kernels, where the smallest fifth was zeroed, chosen by squared gradients
distilled  the same after the pruned encoder was retrained to give its former features on all examples, unlabelled
           "distilled-0.01" has twice the budget
picked     new channels, and a choice among the older weights (CPG's picks)
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pretrained_encoder import Encoder, Inputs, Task, flat, nested
from pretrained_settings import Result, Settings

import pae_jax as pae

BASE = "pretrained"


@dataclasses.dataclass(frozen=True)
class Way:
    """Settings of a way to pack.

    Attributes:
      expand: whether the network gets new channels for every task.
      prune: share of each kernel that is zeroed before the first task, to make room.
      budget: share of the encoder's kernels that a task may own; needs room.
      distil: epochs of retraining after pruning, on examples without labels.
      sharing: which older weights a task sees.
      reuse: whether a task starts from the biases and norms of an older task.
    """

    expand: bool = False
    prune: float = 0.0
    budget: float | None = None
    distil: int = 0
    sharing: Literal["all", "first", "picked"] = "first"
    reuse: bool = False


WAYS = {
    "local": Way(),
    "expand": Way(expand=True),
    "reuse": Way(expand=True, sharing="all", reuse=True),
    "budget": Way(prune=0.2, budget=0.005),
    "distilled": Way(prune=0.2, budget=0.005, distil=1),
    "distilled-0.01": Way(prune=0.2, budget=0.01, distil=1),
    "picked": Way(expand=True, sharing="picked"),
}


def network(encoder: Encoder) -> pae.Net:
    """Return the network description of an encoder."""
    return pae.linen(encoder.build, encoder.sample, free_axes=encoder.free_axes)


def start(way: Way, encoder: Encoder, net: pae.Net, unlabelled: Inputs, settings: Settings, seed: int) -> pae.State:
    """Return the network whose first, frozen task is the pretrained encoder, pruned if the way needs room."""
    state = pae.from_variables(net, encoder.variables)
    state = pae.pack(net, state, BASE, head=None, key=jax.random.key(seed))
    if way.distil:
        features = np.asarray(pae.features(net, state, BASE, unlabelled, batch_size=128))
        state = pae.fit(
            net,
            pae.prune(state, BASE, way.prune),
            BASE,
            (unlabelled, features),
            optimizer=settings.optimizer(way.distil * len(features) // settings.epochs, "full"),
            epochs=way.distil,
            batch_size=settings.batch_size,
            key=jax.random.key(seed + 1),
            loss=_distance,
            parts=("shared",),
        )[0]
    elif way.prune:
        state = pae.prune(state, BASE, way.prune)
    return pae.freeze(state, BASE)


def _distance(features: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.square(features - target).sum(axis=1)


def learn(
    way: Way, encoder: Encoder, net: pae.Net, state: pae.State, task: Task, settings: Settings, seed: int
) -> tuple[pae.State, float, dict[str, Any]]:
    """Learn one more task; return the network with the task frozen, its validation accuracy and notes."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), len(state.tasks)), 3)
    notes: dict[str, Any] = {}
    if way.expand:
        state = pae.expand(net, state, width=encoder.width(len(state.tasks)), key=keys[0])
    new: dict[str, Any] = {"head": task.classes, "key": keys[1], "sharing": way.sharing, "local_init": BASE}
    if way.reuse and len(state.tasks) > 1:
        started = time.perf_counter()
        new["local_init"] = pae.nearest_task(net, state, task.train, head=task.classes, key=keys[1]) or BASE
        notes = {"from": new["local_init"], "seconds to find it": round(time.perf_counter() - started, 1)}
    if way.budget is not None:
        scored = {path: leaf.size for path, leaf in flat(state.shared).items() if encoder.is_kernel(path)}
        share = sum(scored.values()) / sum(leaf.size for leaf in jax.tree.leaves(state.shared))
        new["weight_init"] = "zeros"
        scores = pae.gradient_scores(net, state, task.name, task.train, **new)
        new["budget"] = way.budget * share
        new["budget_scores"] = nested(
            {path: leaf if encoder.is_kernel(path) else jnp.zeros_like(leaf) for path, leaf in flat(scores).items()}
        )
    state = pae.pack(net, state, task.name, allow_empty=True, **new)
    kind = "room" if way.budget is not None else "picked" if way.sharing == "picked" else ""
    state, history = pae.fit(
        net,
        state,
        task.name,
        task.train,
        optimizer=settings.optimizer(len(task.train[1]), kind),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        val=task.val,
        keep="best",
        key=keys[2],
    )
    val = max(float(row["val_accuracy"]) for row in history.rows)
    return pae.freeze(state, task.name), val, notes


def deliver(net: pae.Net, before: pae.State, state: pae.State, path: Path) -> tuple[pae.State, int]:
    """Write what the newest task adds to a file, in half precision; return what its reader has, and the bytes.

    The reader has the network before the task. What it reads is what the next task builds on.
    """
    path.unlink(missing_ok=True)
    older = max(before.tasks, key=lambda name: before.tasks[name].id)
    pae.write_bundle(path, net, state, after=older, weights="float16", local="float16")
    return pae.read_bundle(net, path, onto=before), path.stat().st_size


def measured(net: pae.Net, state: pae.State, task: Task, learned: dict[str, Any]) -> Result:
    """Return what a learned task reaches on its test part."""
    entry = state.tasks[task.name]
    own = sum(int((owner == entry.id).sum()) for owner in jax.tree.leaves(state.owner))
    own += sum(leaf.size for leaf in jax.tree.leaves((entry.local, entry.head)))
    accuracy = pae.evaluate(net, state, task.name, task.test)["accuracy"]
    return Result(task.name, accuracy, trained=own, **learned)
