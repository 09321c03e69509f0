"""What packing costs: the train step of a packed network against the plain step of the same network.

Command:   python benchmarks/step_overhead.py
Expected:  masked / plain <= 1.10 on 2 CPU cores; about 5 minutes, nearly all of it compilation
Writes:    benchmarks/results/step_overhead.json

Both steps run the same model on the same batch with the same optimizer, in turn, in one process; the ratio is that of
the medians. The plain step is what one writes without this library: value_and_grad, optax update, apply_updates,
donated buffers. The packed step trains the third of three tasks, with two frozen ones in the same arrays.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import pae_jax as pae
from pae_jax import heads, ownership, training, trees

CASES = {
    "SmallCNN 112x92x1, batch 25": (pae.models.SmallCNN, (25, 112, 92, 1)),
    "VGG16 32x32x3, batch 32": (pae.models.VGG16, (32, 32, 32, 3)),
}


def plain_step(net: pae.Net, head: int, tx: optax.GradientTransformation):
    """Return the train step that knows nothing of packing, over the whole tree of parameters."""
    backbone, output = net.program(1.0), heads.program(head)

    def step(params, collections, opt_state, key, x, y):
        def objective(params):
            variables = {**collections, "params": params["backbone"]}
            features, updates = backbone.apply(variables, x, True, key)
            logits, _ = output.apply({"params": params["head"]}, features, True, key)
            return training.softmax_cross_entropy(logits, y).mean(), updates

        (loss, updates), grads = jax.value_and_grad(objective, has_aux=True)(params)
        changes, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, changes), {**collections, **updates}, opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1, 2))


def packed_state(net: pae.Net, head: int) -> pae.State:
    """Return a network with two frozen tasks, each pruned to half its room, and a third one in training."""
    state = pae.init(net, jax.random.key(0))
    for index, name in enumerate(("first", "second", "third")):
        state = pae.pack(net, state, name, head=head, key=jax.random.key(index))
        if name != "third":
            state = pae.freeze(pae.prune(state, name, 0.5), name)
    return state


def measure(model: Any, shape: tuple[int, ...], repeats: int) -> dict[str, float]:
    """Return medians in seconds of both steps, and their ratio."""
    head, key = 5, jax.random.key(0)
    net = pae.linen(model, jnp.zeros((1, *shape[1:])))
    tx = optax.sgd(1e-3, momentum=0.9, nesterov=True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    y = jnp.arange(shape[0]) % head
    state = packed_state(net, head)
    entry = state.tasks["third"]

    task_id = ownership.id_array(entry.id)
    parts = jax.tree.map(jnp.copy, (state.shared, entry.local, entry.head))
    opt_state = training.optimizer_init(net, tx)(*parts, state.owner, task_id)
    zero = jnp.zeros((), jnp.int32)
    shared, local, head_variables = parts
    carry = training.Carry(shared, local, head_variables, opt_state, zero, zero - 1, jnp.zeros(()))
    packed = training.train_step(net, entry, tx, training.softmax_cross_entropy)

    variables = jax.tree.map(jnp.copy, trees.merge(state.shared, entry.local))
    params = {"backbone": variables.pop("params"), "head": jax.tree.map(jnp.copy, entry.head["params"])}
    plain = plain_step(net, head, tx)
    run = (params, variables, tx.init(params))

    times: dict[str, list[float]] = {"plain": [], "packed": []}
    for repeat in range(repeats + 3):
        start = time.perf_counter()
        *run, _ = plain(*run, key, x, y)
        jax.block_until_ready(run)
        middle = time.perf_counter()
        carry = packed(carry, state.owner, task_id, key, x, y)
        jax.block_until_ready(carry)
        if repeat >= 3:
            times["plain"].append(middle - start)
            times["packed"].append(time.perf_counter() - middle)
    plain_median, packed_median = (statistics.median(times[name]) for name in ("plain", "packed"))
    return {
        "plain_seconds": round(plain_median, 5),
        "packed_seconds": round(packed_median, 5),
        "ratio": round(packed_median / plain_median, 3),
    }


def compilations() -> dict[str, int]:
    """Count how often the model is traced for training while eight tasks are learned, each with a new optimizer."""
    traces = 0

    class Counted(pae.models.MLP):
        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            nonlocal traces
            traces += int(train)
            return super().__call__(x, train)

    net = pae.linen(Counted, jnp.zeros((1, 8)))
    state = pae.init(net, jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    after_first = 0
    for index in range(8):
        name = f"task {index}"
        state = pae.pack(net, state, name, head=2, key=jax.random.key(index))
        data = (x, (x[:, index] > 0).astype(np.int32))
        optimizer = optax.adamw(1e-2)
        state, _ = pae.fit(
            net, state, name, data, optimizer=optimizer, epochs=2, key=jax.random.key(index), progress=False
        )
        state = pae.freeze(pae.prune(state, name, 0.8), name)
        after_first = traces if index == 0 else after_first
    return {"traces_of_task_1": after_first, "traces_of_tasks_2_to_8": traces - after_first}


def main() -> None:
    """Measure all cases and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30, help="timed steps of each kind (default 30)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step_overhead.json")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "command": "python benchmarks/step_overhead.py",
        "hardware": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("jax", "flax", "optax")},
        "repeats": options.repeats,
        "compilations": compilations(),
        "cases": {},
    }
    print("compilations:", result["compilations"])
    for name, (model, shape) in CASES.items():
        result["cases"][name] = measure(model, shape, options.repeats)
        print(f"{name}: {result['cases'][name]}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
