"""Cost of the input pipeline: shuffled batches from arrays, and `pae.fit` compared with the bare train steps.

Command:   python benchmarks/input_pipeline.py           (--only SmallCNN for one model)
Expected:  feed / bare <= 0.03 and fit / bare <= 1.1 for the convolutional models on 2 CPU cores; 2 minutes
Writes:    benchmarks/results/input_pipeline.json

One epoch of each variant, in turn, in one process. "bare" uses the same batch in every step, as a step benchmark does.
"feed" only shuffles the arrays and puts batch after batch on the device. "fit" is the public call of one epoch:
checking the data, copying the state once, cutting batches, taking steps and adding up metrics. "fit, augmented" also
compiles random crops and flips into the step. The epochs are short, so the one-time work of `fit` weighs more than in a
real run. The MLP, whose step takes a tenth of a millisecond, shows almost only that work.
"""

from __future__ import annotations

import functools
from typing import Any

import harness
import jax
import jax.numpy as jnp
import optax
import steps

import pae_jax as pae
from pae_jax.training.batches import feed as fed
from pae_jax.training.batches import form

# Model, shape of a batch, batches per epoch.
CASES: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "MLP 16, 100 batches of 64": (pae.models.MLP, (64, 16), 100),
    "SmallCNN 112x92x1, 60 batches of 25": (pae.models.SmallCNN, (25, 112, 92, 1), 60),
    "VGG16 32x32x3, 12 batches of 32": (pae.models.VGG16, (32, 32, 32, 3), 12),
}


def measure(model: Any, shape: tuple[int, ...], batches: int, repeats: int) -> dict[str, Any]:
    """Return times and ratios of an epoch of each variant."""
    batch, *image = shape
    net = pae.linen(model, jnp.zeros((1, *image)))
    state = steps.packed_state(net, frozen=1)
    tx = optax.sgd(1e-3, momentum=0.9)
    x, y = steps.random_examples(batch * batches, image)
    task_form = form(net, state.width, steps.CLASSES, classes=True)
    step = steps.packed_step(net, state, tx, (jnp.asarray(x[:batch]), jnp.asarray(y[:batch])))

    def bare() -> Any:
        for _ in range(batches):
            step()
        return step.moving

    def feed() -> Any:
        source = fed((x, y), task_form, batch)
        return [jax.device_put(piece) for piece in source.epoch(0, jax.random.key(0))]

    def fit(augment: Any = None) -> Any:
        key = jax.random.key(0)
        once: dict[str, Any] = {"epochs": 1, "batch_size": batch, "augment": augment}
        return pae.fit(net, state, "newest", (x, y), optimizer=tx, key=key, **once)[0].shared

    ways: dict[str, harness.Way] = {"bare": bare, "feed": feed, "fit": fit}
    if len(image) == 3:
        ways["fit, augmented"] = functools.partial(fit, pae.data.crop_and_flip())
    return {**harness.compare(harness.in_turn(ways, repeats, 1), "bare"), "steps": batches}


def main() -> None:
    """Measure the cases and write the result file."""
    settings = harness.options(__doc__, 5)
    harness.publish(
        settings,
        {name: functools.partial(measure, *case, settings.repeats) for name, case in CASES.items()},
    )


if __name__ == "__main__":
    main()
