"""Where should the weights start that a task takes over from a strongly pruned one?

Command:   python benchmarks/starting_weights.py         (--only 0.9 for one fraction)
Expected:  at 0.9 and 0.95 all means are within two deviations of "preserve", the default of `pack`; at 0.98 "largest
           0.1" is 1.6 points above it, and some seeds learn nothing from "zeros"; 5 minutes on 2 CPU cores
Writes:    benchmarks/results/starting_weights.json

Task "a" is trained and pruned, task "b" takes what it freed. Where pruning leaves a channel with weights that are 0 on
both sides, neither side has a gradient. A weight that training did not change is dead. The starts of b's weights:

- zeros, fresh, preserve: `weight_init` of `pack`.
- gradient 0.1, gradient 1: "preserve", and weights that it leaves at 0 start against their gradient over b's training
  data, as large as 0.1 or 1 times the root mean square of the drawn weights of their leaf (an idea of Evci et al.,
  "GradMax", ICLR 2022). Where the gradient is 0 they stay at 0.
- largest 0.1, largest 1: "preserve", and the largest 0.1 or all of the weights of a leaf that pruning took from a start
  with the values that it took (after Han et al., "DSD", ICLR 2017, which starts them at 0).

The network has three layers of 64, 64 and 32 units, a sign of one of eight inputs is task a, the sign of a product of
two is task b: 512 training examples, accuracy on 4,096 others, mean and standard deviation over `--repeats` seeds.
What stays dead with "preserve" are channels that the pruned weights of task a keep at or below 0 for all of the data:
they cannot be changed without changing task a's function, from which task b starts. Nothing is chosen by these figures.
"""

from __future__ import annotations

import functools
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import pae_jax as pae
from pae_jax.lifelong.stage_maker import unmoved

FRACTIONS = (0.9, 0.95, 0.98)
SHARES = (0.1, 1.0)


class Network(nn.Module):
    """Dense layers with batch normalization after the first."""

    width: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dense(round(64 * self.width))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.relu(nn.Dense(round(64 * self.width))(x))
        return nn.relu(nn.Dense(round(32 * self.width))(x))


NET = pae.linen(Network, jnp.zeros((1, 8)))


def examples(seed: int, number: int) -> tuple[Any, Any]:
    """Return the data of both tasks."""
    x = np.random.default_rng(seed).normal(size=(number, 8)).astype(np.float32)
    return (x, (x[:, 0] > 0).astype(np.int32)), (x, (x[:, 1] * x[:, 2] > 0).astype(np.int32))


def trained(state: pae.State, task: str, data: Any, epochs: int, key: jax.Array) -> pae.State:
    """Train a task by Adam."""
    return pae.fit(NET, state, task, data, optimizer=optax.adam(1e-2), epochs=epochs, key=key)[0]


def with_own(state: pae.State, new: Any) -> pae.State:
    """Return the network with other values, but for 0, where task b owns weights that start at 0, or near it."""

    def leaf(mine: jax.Array, w: jax.Array, other: jax.Array) -> jax.Array:
        return jnp.where(mine & (jnp.abs(w) < 1e-6) & (other != 0), other, w)

    return state.replace(shared=jax.tree.map(leaf, pae.trainable(state, "b"), state.shared, new))


def against_gradient(state: pae.State, data: Any, share: float) -> pae.State:
    """Start the weights at 0 against their gradient, at a share of the size of the drawn ones."""
    ts = pae.TrainState.create(NET, state, "b", tx=optax.sgd(1.0))

    def loss(params: Any) -> jax.Array:
        y, _ = ts.apply_fn(params, data[0])
        return optax.softmax_cross_entropy_with_integer_labels(y, data[1]).mean()

    moved = ts.apply_gradients(grads=jax.grad(loss)(ts.params)).commit(NET, state)

    def leaf(before: jax.Array, after: jax.Array) -> jax.Array:
        drawn = jnp.sqrt(jnp.mean(before**2, where=before != 0))
        step = after - before
        size = jnp.sqrt(jnp.mean(step**2, where=step != 0))
        return jnp.where(size > 0, share * step * jnp.nan_to_num(drawn) / jnp.maximum(size, 1e-30), 0)

    return with_own(state, jax.tree.map(leaf, state.shared, moved.shared))


def taken_back(state: pae.State, before: pae.State, share: float) -> pae.State:
    """Start the largest share of the weights of each leaf that pruning took with the values that it took."""

    def leaf(mine: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.where(jnp.abs(w) >= jnp.quantile(jnp.abs(w)[mine], 1 - share), w, 0)

    return with_own(state, jax.tree.map(leaf, pae.trainable(state, "b"), before.shared))


def accuracies(fraction: float, seed: int) -> dict[str, tuple[float, float]]:
    """Return accuracy and dead share of task b by its start."""
    keys = jax.random.split(jax.random.key(seed), 5)
    one, two = examples(2 * seed, 512)
    _, other = examples(2 * seed + 1, 4096)
    empty = pae.init(NET, keys[0])
    first = trained(pae.pack(NET, empty, "a", head=2, key=keys[1]), "a", one, 8, keys[2])
    frozen = pae.freeze(pae.prune(first, "a", fraction), "a")
    pack = functools.partial(pae.pack, NET, frozen, "b", head=2, key=keys[3])
    preserve = pack()
    starts = {"zeros": pack(weight_init="zeros"), "fresh": pack(weight_init="fresh"), "preserve": preserve}
    starts |= {f"gradient {share:g}": against_gradient(preserve, two, share) for share in SHARES}
    starts |= {f"largest {share:g}": taken_back(preserve, first, share) for share in SHARES}
    found = {}
    for name, start in starts.items():
        end = trained(start, "b", two, 40, keys[4])
        pae.verify(end)
        found[name] = (pae.evaluate(NET, end, "b", other)["accuracy"], unmoved(start, end, "b") or 0.0)
    return found


def measure(fraction: float, repeats: int) -> dict[str, Any]:
    """Return mean and deviation of accuracy, and mean dead share, by start."""
    runs = [accuracies(fraction, seed) for seed in range(repeats)]
    return {
        name: {
            "accuracy": harness.significant(float(np.mean([run[name][0] for run in runs]))),
            "deviation": harness.significant(float(np.std([run[name][0] for run in runs], ddof=1)), 2),
            "dead": harness.significant(float(np.mean([run[name][1] for run in runs])), 2),
        }
        for name in runs[0]
    }


def main() -> None:
    """Measure all fractions and write the result file."""
    settings = harness.options(__doc__, 5)
    cases = {f"pruned {f:g}": functools.partial(measure, f, settings.repeats) for f in FRACTIONS}
    harness.publish(settings, cases)


if __name__ == "__main__":
    main()
