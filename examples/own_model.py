"""Your own Flax model learns two tasks: train, prune, freeze, expand, train, save. The first task keeps every bit.

Command:   python examples/own_model.py --out runs/own_model
Expected:  accuracy of about 1.0 on both tasks, and "bit-identical: True"; 15 seconds on 2 CPU cores
"""

import argparse
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import pae_jax as pae


class Backbone(nn.Module):
    """Two convolutions. `width` multiplies the channels, so that the network can be expanded later."""

    width: float = 1.0

    @nn.compact
    def __call__(self, x, train: bool):
        for channels in (8, 16):
            x = nn.Conv(int(channels * self.width), (3, 3), strides=2)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.relu(x)
        return x.mean(axis=(1, 2))  # features; every task has its own head on top of them


def images(seed: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return 512 noisy images of 16 x 16 pixels: stripes of four directions, or spots of three sizes."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4 if kind == "stripes" else 3, 512)
    row, column = np.mgrid[:16, :16].astype(np.float32)[:, None]
    if kind == "stripes":
        angle = (y * np.pi / 4)[:, None, None]
        clean = np.sin(np.cos(angle) * row + np.sin(angle) * column + rng.uniform(0, 6, (512, 1, 1)))
    else:
        centre = rng.uniform(5, 11, (2, 512, 1, 1))
        clean = 2.0 * ((row - centre[0]) ** 2 + (column - centre[1]) ** 2 < (2 + 1.5 * y[:, None, None]) ** 2)
    return (clean + rng.normal(0, 0.5, clean.shape))[..., None].astype(np.float32), y.astype(np.int32)


def main(out: Path) -> dict[str, float]:
    """Learn both tasks; return their test accuracies and whether the first is bit-identical."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    net = pae.linen(Backbone, jnp.zeros((1, 16, 16, 1)))
    state = pae.init(net, next(keys))
    optimizer = optax.adam(3e-3)  # made once: a new object would compile again

    state = pae.pack(net, state, "stripes", head=4, key=next(keys))
    train, test = images(0, "stripes"), images(1, "stripes")
    state, _ = pae.fit(net, state, "stripes", train, optimizer=optimizer, epochs=6, key=next(keys))
    state = pae.prune(state, "stripes", 0.5)  # free the smaller half of the weights, then retrain
    state, _ = pae.fit(net, state, "stripes", train, optimizer=optimizer, epochs=2, key=next(keys))
    state = pae.freeze(state, "stripes")
    before = pae.predict(net, state, "stripes", test[0])

    state = pae.expand(net, state, width=pae.width_for(2.0), key=next(keys))  # twice the weights
    state = pae.pack(net, state, "spots", head=3, key=next(keys))  # may use what "stripes" learned
    state, _ = pae.fit(net, state, "spots", images(2, "spots"), optimizer=optimizer, epochs=6, key=next(keys))
    state = pae.freeze(state, "spots")

    pae.save(out / "02-spots", state)
    state = pae.load(net, out / "02-spots")
    tests = {"stripes": test, "spots": images(3, "spots")}
    found = {name: pae.evaluate(net, state, name, data)["accuracy"] for name, data in tests.items()}
    found["bit-identical"] = bool((before == pae.predict(net, state, "stripes", test[0])).all())
    print(pae.report(state), *(f"{name}: {value}" for name, value in found.items()), sep="\n")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/own_model"), help="folder of the saved network")
    main(parser.parse_args().out)
