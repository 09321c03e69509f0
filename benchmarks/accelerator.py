"""One short run on an accelerator: train steps, the paper's protocol, pruning, serving and bit exactness.

Command:   python benchmarks/accelerator.py --minutes 9      (--small on a CPU: tiny networks, some seconds)
Expected:  packed / plain and user / plain <= 1.03; the CIFAR-100 paper protocol in 15 minutes for 20 tasks on an
           H100-class GPU; prune / step <= 1; every "bits" entry true except "compiled anew", where a GPU may choose
           other algorithms
Writes:    accelerator.json in --out FOLDER (default benchmarks/results), again after every case

Needs only jax, flax, optax, orbax-checkpoint, chex and tqdm. If the package is not installed, set PYTHONPATH to the
repository. Cases run from short to long. No case starts after the time limit; the result names those left out.

"step" cases are those of `step_overhead.py`; `calls` steps are dispatched before the script waits for the last one, so
that dispatch overlaps with computation as in a training loop. "share_of_roofline" divides the operations of the plain
step by the speed of a large matrix product in the same dtype, measured here at the default precision, and by its time.
"paper protocol" is `paper_speed.py`, "prune" `prune_cost.py`, "serving" `serving.py`.

"bits" is law 5. It compares the outputs of a frozen task on the same batch before and after another task is packed,
trained, pruned and frozen, after an expansion, and after saving and loading, all in one process. Then it compares them
with every program recompiled, and from two further processes, both under XLA's deterministic operations.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paper_speed
import prune_cost
import serving
import step_overhead
import steps

import pae_jax as pae

VGG, VIT, INCEPTION = "VGG16 32x32x3", "ViT 32x32x3", "InceptionResnetV1 96x96x3"
# Model, batch, dtype, steps per round; the most informative first, the longest compilations last.
STEPS: list[tuple[str, int, str, int]] = [
    (VGG, 32, "float32", 40),
    (VIT, 32, "float32", 40),
    (VGG, 256, "bfloat16", 20),
    (VIT, 256, "bfloat16", 20),
    (INCEPTION, 32, "float32", 20),
    (VGG, 256, "float32", 20),
    (VIT, 256, "float32", 20),
    (INCEPTION, 256, "bfloat16", 10),
    (VGG, 32, "bfloat16", 40),
    (VIT, 32, "bfloat16", 40),
    (INCEPTION, 256, "float32", 10),
    (INCEPTION, 32, "bfloat16", 20),
]
DETERMINISTIC = {"XLA_FLAGS": "--xla_gpu_deterministic_ops=true"}


@functools.cache
def rate(size: int, dtype: str) -> float:
    """Return the operations per second of a product of large square matrices of a dtype."""
    return paper_speed.matmul_rate(size, dtype)


def step(model: Any, image: tuple[int, ...], batch: int, dtype: str, calls: int, size: int) -> dict[str, Any]:
    """Return what `step_overhead.py` measures, and the plain step's share of what the hardware could do."""
    found = step_overhead.measure(model, image, batch, dtype, 10, calls)
    possible = found["operations"] / rate(size, dtype)
    return {**found, "share_of_roofline": harness.significant(possible / found["seconds"]["plain"], 2)}


def bits(model: Any, image: tuple[int, ...], batch: int) -> dict[str, Any]:
    """Return whether the outputs of a frozen task stay the same bits, after every operation on the network."""
    net = pae.linen(model, jnp.zeros((1, *image)))
    examples = steps.random_examples(4 * batch, image)
    x, tx = examples[0][:batch], optax.sgd(1e-2, momentum=0.9)

    def learn(state: pae.State, name: str) -> pae.State:
        key = jax.random.key(len(state.tasks))
        state = pae.pack(net, state, name, head=steps.CLASSES, key=key)
        state, _ = pae.fit(net, state, name, examples, optimizer=tx, epochs=2, batch_size=batch, key=key)
        return pae.freeze(pae.prune(state, name, 0.5), name)

    state = learn(pae.init(net, jax.random.key(9)), "old")
    before = outputs(net, state, x)
    found = {}
    state = learn(state, "new")
    found["another task trained"] = outputs(net, state, x) == before
    state = pae.expand(net, state, width=1.5, key=jax.random.key(3))
    found["expanded"] = outputs(net, state, x) == before
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder) / "stage"
        pae.save(stage, state)
        found["saved and loaded"] = outputs(net, pae.load(net, stage), x) == before
        pae.clear_caches()
        jax.clear_caches()
        found["compiled anew"] = outputs(net, state, x) == before
        np.save(Path(folder) / "x.npy", x)
        others = [another_process(model, image, stage) for _ in range(2)]
    return found | {"two processes, deterministic operations": others[0] == others[1]}


def outputs(net: pae.Net, state: pae.State, x: Any) -> str:
    """Return the SHA-256 of the outputs of the task "old"."""
    return hashlib.sha256(np.asarray(pae.predict(net, state, "old", x)).tobytes()).hexdigest()


def another_process(model: Any, image: tuple[int, ...], stage: Path) -> str:
    """Return the SHA-256 of the same outputs, from a separate process under deterministic operations."""
    script = "import sys, accelerator; accelerator.answer(*sys.argv[1:])"
    words = [sys.executable, "-c", script, model.__name__, ",".join(map(str, image)), str(stage)]
    env = os.environ | DETERMINISTIC | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    return done.stdout.split()[-1]


def answer(model: str, image: str, stage: str) -> None:
    """Print the SHA-256 of the outputs of the task "old" of a stage on the batch stored beside it."""
    net = pae.linen(getattr(pae.models, model), jnp.zeros((1, *map(int, image.split(",")))))
    print(outputs(net, pae.load(net, stage), np.load(Path(stage).parent / "x.npy")))


def cases(small: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the measurements by name: full size for an accelerator, or tiny for a CPU."""
    if small:
        shape = (8, 8, 3)
        models: dict[str, Any] = {"SmallCNN": functools.partial(pae.models.SmallCNN, channels=(8, 16))}
        wanted = [("SmallCNN", shape, 8, "float32", 2)]
        model, size, images, epochs, repeats = pae.models.MLP, 256, 64, 1, 2
    else:
        models = {name: build for name, (build, _) in step_overhead.MODELS.items()}
        wanted = [(name, step_overhead.MODELS[name][1], batch, dtype, calls) for name, batch, dtype, calls in STEPS]
        model, size, images, epochs, repeats = pae.models.VGG16, 8192, paper_speed.IMAGES, 10, 5
        shape = (32, 32, 3)
    tests = {
        f"step, {name}, batch {batch}, {dtype}": functools.partial(step, models[name], image, batch, dtype, calls, size)
        for name, image, batch, dtype, calls in wanted
    }
    protocol = {
        f"paper protocol, size ratio {ratio}": functools.partial(
            paper_speed.measure, pae.width_for(ratio), repeats, epochs, model, images, size
        )
        for ratio in ((1.0,) if small else (1.0, 1.5))
    }
    batch = 8 if small else 32
    first, others = dict(list(tests.items())[:2]), dict(list(tests.items())[2:])
    return {
        **first,
        **dict(list(protocol.items())[:1]),
        "bits": functools.partial(bits, model, shape, batch),
        "prune": functools.partial(prune_cost.measure, model, (batch, *shape), repeats),
        "serving 8 tasks": functools.partial(serving.measure, model, (batch, *shape), repeats),
        **others,
        **protocol,
    }


def main() -> None:
    """Run the cases that fit in the time limit."""
    settings = harness.options(
        __doc__,
        10,
        ("--minutes", {"type": float, "default": 9.0, "help": "no case begins after so many minutes (default 9)"}),
        ("--small", {"action": "store_true", "help": "tiny networks, for a machine without an accelerator"}),
    )
    settings.out = settings.out if settings.out.suffix == ".json" else settings.out / "accelerator.json"
    harness.publish(settings, cases(settings.small), 60 * settings.minutes)


if __name__ == "__main__":
    main()
