"""How long the published CIFAR-100 protocol takes on this machine: steps per second, and the hardware limit.

Command:   python benchmarks/paper_speed.py
Expected:  on 2 CPU cores about 1.7 steps per second, half of the roofline, so three days for 20 tasks; on an H100-class
           GPU the target is 15 minutes; 4 minutes
Writes:    benchmarks/results/paper_speed.json

The setting is that of `examples/cifar100/cifar100_20tasks.py --preset paper`: VGG16 with two dense layers of 4096 (34
million weights), batch 32, SGD with Nesterov momentum, random crops and flips, 2250 training images a task. "fit" is
the public call on the third task of a network, with its default steps per call, after compilation. Its time for all 20
tasks assumes the longest path of CPG for each task: 330 epochs of 70 steps at the first width. "roofline" divides the
operations of a step by the speed of a large float32 matrix product measured here, at the default precision.
"""

from __future__ import annotations

import functools
import statistics
from typing import Any

import harness
import jax
import jax.numpy as jnp
import optax
import steps

import pae_jax as pae

BATCH, IMAGES, TASKS, EPOCHS = 32, 2250, 20, 330
MATRIX = 4096


def matmul_rate(size: int = MATRIX, dtype: str = "float32", repeats: int = 5) -> float:
    """Return the operations per second of a product of large square matrices, at the default precision."""
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    seconds = harness.in_turn({"matmul": lambda: product(a, a)}, repeats, 1)["matmul"]
    return 2 * size**3 / statistics.median(seconds)


def measure(
    width: float, repeats: int, epochs: int, model: Any = pae.models.VGG16, images: int = IMAGES, matrix: int = MATRIX
) -> dict[str, Any]:
    """Return steps per second at a width, the operations of a step, and the time of all tasks."""
    shape = (32, 32, 3)
    net = pae.linen(model, jnp.zeros((1, *shape)))
    state = steps.packed_state(net, width=width)
    data = steps.random_examples(images, shape)
    tx = optax.sgd(1e-3, momentum=0.9, nesterov=True)
    options: Any = {"optimizer": tx, "epochs": epochs, "batch_size": BATCH, "augment": pae.data.crop_and_flip(4)}

    def fit() -> Any:
        return pae.fit(net, state, "newest", data, key=jax.random.key(0), **options)[0].shared

    seconds = statistics.median(harness.in_turn({"fit": fit}, repeats, 1)["fit"])
    rate = epochs * (images // BATCH) / seconds
    step = steps.packed_step(net, state, tx, steps.random_batch((BATCH, *shape)))
    flops = step.operations
    possible = matmul_rate(matrix) / flops
    total = TASKS * EPOCHS * (IMAGES // BATCH)
    return {
        "steps_per_second": harness.significant(rate, 3),
        "operations_per_step": flops,
        "roofline_steps_per_second": harness.significant(possible, 3),
        "share_of_roofline": harness.significant(rate / possible, 2),
        "minutes_of_20_tasks": harness.significant(total / rate / 60, 3),
    }


def main() -> None:
    """Measure the widths and write the result file."""
    epochs = ("--epochs", {"type": int, "default": 1, "help": "epochs per round (default 1; take 10 on a GPU)"})
    settings = harness.options(__doc__, 3, epochs)
    cases = {
        f"size ratio {ratio}": functools.partial(measure, pae.width_for(ratio), settings.repeats, settings.epochs)
        for ratio in (1.0, 1.5)
    }
    harness.publish(settings, cases)


if __name__ == "__main__":
    main()
