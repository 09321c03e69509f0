"""Cost of packing: the train step of a packed network compared with the plain step of the same network.

Command:   python benchmarks/step_overhead.py            (--every for all batch sizes and dtypes, --only VGG16 for one)
Expected:  packed / plain and user / plain <= 1.03 (SmallCNN, of 15 ms a step, up to 1.10), user / packed <= 1.03,
           memory <= 1 byte per weight more; 6 minutes on 2 CPU cores, half of it compilation
Writes:    benchmarks/results/step_overhead.json

All steps run the same model on the same batch with the same optimizer (SGD with Nesterov momentum), in turn, in one
process. "plain" is the step without this library: value_and_grad, optax update, apply_updates, donated buffers.
"packed" is the step of `pae.fit`, "user" a user's own jitted step over `pae.TrainState`; both train the third of three
tasks, with two frozen ones in the same arrays. "bytes per weight" are those that the compiled program needs: arguments,
results and temporaries. bfloat16 is the dtype of the computation; master weights and optimizer state are float32.
Compilations are traces of the model for training while eight tasks are learned one after the other, all with one
optimizer object.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import steps
import vit

import pae_jax as pae

MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "SmallCNN 112x92x1": (pae.models.SmallCNN, (112, 92, 1)),
    "ViT 32x32x3": (vit.ViT, (32, 32, 3)),
    "VGG16 32x32x3": (pae.models.VGG16, (32, 32, 3)),
    "InceptionResnetV1 96x96x3": (pae.models.InceptionResnetV1, (96, 96, 3)),
}
# Model, batch, dtype; the first list is measured by default, the second with --every.
DEFAULT = [
    ("SmallCNN 112x92x1", 25, "float32"),
    ("ViT 32x32x3", 32, "float32"),
    ("VGG16 32x32x3", 32, "float32"),
    ("InceptionResnetV1 96x96x3", 8, "float32"),
]
MORE = [
    ("SmallCNN 112x92x1", 8, "float32"),
    ("SmallCNN 112x92x1", 100, "float32"),
    ("SmallCNN 112x92x1", 25, "bfloat16"),
    ("ViT 32x32x3", 8, "float32"),
    ("ViT 32x32x3", 128, "float32"),
    ("ViT 32x32x3", 32, "bfloat16"),
    ("VGG16 32x32x3", 8, "float32"),
    ("VGG16 32x32x3", 128, "float32"),
    ("VGG16 32x32x3", 32, "bfloat16"),
    ("InceptionResnetV1 96x96x3", 32, "float32"),
    ("InceptionResnetV1 96x96x3", 8, "bfloat16"),
]


def measure(build: Any, image: tuple[int, ...], batch: int, dtype: str, repeats: int, calls: int = 1) -> dict[str, Any]:
    """Return times, ratios and memory of the three steps, and the operations of one."""
    net = pae.linen(functools.partial(_build, build, dtype), jnp.zeros((1, *image)))
    state = steps.packed_state(net)
    tx = optax.sgd(1e-3, momentum=0.9, nesterov=True)
    data = steps.random_batch((batch, *image))
    makers = {"plain": steps.plain_step, "packed": steps.packed_step, "user": steps.user_step}
    ways = {name: make(net, state, tx, data) for name, make in makers.items()}
    with ThreadPoolExecutor() as pool:  # they compile in parallel
        list(pool.map(lambda way: way.compiled, ways.values()))
    weights = sum(leaf.size for leaf in jax.tree.leaves(state.shared))
    memory = {name: harness.program_bytes(way.compiled) for name, way in ways.items()}
    per_weight = {name: sum(parts.values()) / weights for name, parts in memory.items()}
    per_weight["more"] = max(per_weight["packed"], per_weight["user"]) - per_weight["plain"]
    times = harness.in_turn(ways, repeats, calls=calls)
    found = harness.compare(times, "plain")
    loops = harness.compare({name: times[name] for name in ("packed", "user")}, "packed")["ratios"]
    return {
        **found,
        "ratios": found["ratios"] | loops,
        "weights": weights,
        "operations": ways["plain"].operations,
        "bytes_per_weight": {name: round(count, 2) for name, count in per_weight.items()},
        "bytes": memory,
    }


def _build(build: Any, dtype: str, width: float) -> Any:
    return build(width=width, dtype=jnp.dtype(dtype))


def traces(tasks: int = 8) -> dict[str, int]:
    """Count how often the model is traced for training while tasks are learned with one optimizer object."""
    found = 0

    class Counted(pae.models.MLP):
        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            nonlocal found
            found += int(train)
            return super().__call__(x, train)

    net = pae.linen(Counted, jnp.zeros((1, 8)))
    state = pae.init(net, jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    after_first, tx = 0, optax.adamw(1e-2)
    for index in range(tasks):
        name, key = f"task {index}", jax.random.key(index)
        state = pae.pack(net, state, name, head=2, key=key)
        data = (x, (x[:, index] > 0).astype(np.int32))
        state, _ = pae.fit(net, state, name, data, optimizer=tx, epochs=2, key=key)
        state = pae.freeze(pae.prune(state, name, 0.8), name)
        after_first = found if index == 0 else after_first
    return {"traces_of_task_1": after_first, f"traces_of_tasks_2_to_{tasks}": found - after_first}


def main() -> None:
    """Measure the cases and write the result file."""
    every = ("--every", {"action": "store_true", "help": "all batch sizes and dtypes"})
    settings = harness.options(__doc__, 20, every)
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        f"{model}, batch {batch}, {dtype}": functools.partial(measure, *MODELS[model], batch, dtype, settings.repeats)
        for model, batch, dtype in (DEFAULT + MORE if settings.every or settings.only else DEFAULT)
    }
    harness.publish(settings, cases, compilations=traces())


if __name__ == "__main__":
    main()
