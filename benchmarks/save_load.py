"""How fast stages are saved and loaded, compared with plain writes of the same bytes.

Command:   python benchmarks/save_load.py                (--only VGG16 for one model; --folder to choose the disk)
Expected:  save / plain write 2 to 9 and load / plain read 4 to 6 for VGG16, by the speed of the disk: compression and
           checksums are our part, and a save reads back what it wrote; 4 of 5 bytes per weight on the disk; 1 minute
Writes:    benchmarks/results/save_load.json

Three tasks, two of them frozen. All weights are random, so they hardly compress; free weights would compress to almost
nothing. The plain variant writes every array to a separate file by `numpy.save`, flushes it to the disk, and reads it
back by `numpy.load`: no digests, no check of shapes, no atomic folder. Both read from the page cache of the operating
system, which cannot be emptied without root privileges. Bandwidths are bytes of arrays in memory per second.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np

import pae_jax as pae

CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "SmallCNN 112x92x1": (pae.models.SmallCNN, (1, 112, 92, 1)),
    "VGG16 32x32x3": (pae.models.VGG16, (1, 32, 32, 3)),
}


def three_tasks(net: pae.Net) -> pae.State:
    """Return a network with three tasks whose weights are all drawn at random."""
    state = pae.init(net, jax.random.key(0))
    for index in range(3):
        name, key = f"task {index}", jax.random.key(index)
        state = pae.pack(net, state, name, head=5, key=key, weight_init="fresh")
        if index < 2:
            state = pae.freeze(pae.prune(state, name, 0.5), name)
    return state


def measure(model: Any, shape: tuple[int, ...], repeats: int, parent: Path | None) -> dict[str, Any]:
    """Return times, ratios and bandwidths of saving and loading."""
    net = pae.linen(model, jnp.zeros(shape))
    state = three_tasks(net)
    arrays = jax.tree.leaves((state.shared, state.owner, [(e.local, e.head) for e in state.tasks.values()]))
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        saved = Path(folder) / "stage"
        pae.save(saved, state)
        plain = [Path(folder) / f"{index}.npy" for index in range(len(arrays))]
        fresh = itertools.count()

        def write() -> None:
            for path, array in zip(plain, arrays, strict=True):
                with path.open("wb") as file:
                    np.save(file, np.asarray(array))
                    file.flush()
                    os.fsync(file.fileno())

        def read() -> Any:
            return [jnp.asarray(np.load(path)) for path in plain]

        def load() -> Any:
            loaded = pae.load(net, saved)
            return loaded.shared, loaded.owner

        saving = {"plain write": write, "save": lambda: pae.save(Path(folder) / f"stage-{next(fresh)}", state)}
        writing = harness.compare(harness.in_turn(saving, repeats, 1), "plain write")
        reading = harness.compare(harness.in_turn({"plain read": read, "load": load}, repeats, 1), "plain read")
        on_disk = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    weights = sum(leaf.size for leaf in jax.tree.leaves(state.shared))
    in_memory = harness.array_bytes(arrays)
    seconds = {**writing["seconds"], **reading["seconds"]}
    return {
        "seconds": seconds,
        "ratios": {**writing["ratios"], **reading["ratios"]},
        "megabytes_per_second": {name: round(in_memory / 1e6 / value) for name, value in seconds.items()},
        "bytes_per_weight": {"memory": round(in_memory / weights, 2), "disk": round(on_disk / weights, 2)},
    }


if __name__ == "__main__":
    harness.publish_on_disk(__doc__, CASES, measure)
