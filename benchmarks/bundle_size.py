"""How small bundles are, how close to what they must hold, how fast, and whether damage is ever missed.

Command:   python benchmarks/bundle_size.py               (--only SmallCNN for one network)
Expected:  coded owners and picks <= 1.05 times their entropy; every round trip bit-equal; every flipped bit refused;
           write and read >= 0.5 times the speed of safetensors on the dense arrays where the disk is slower than both;
           3 minutes on 2 CPU cores
Writes:    benchmarks/results/bundle_size.json

Weights are drawn at random, ownership is that of the published runs: the first task keeps 20 % of all weights, each
later one a few percent, and the rest is free. `entropy_ratio` is the coded bytes, and the counts that the header keeps
for them, over the entropy of the owners leaf by leaf. Dense is `safetensors` of shared weights and owners.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

import pae_jax as pae

Network = tuple[Callable[[float], Any], tuple[int, ...], int, dict[str, Any]]
"""Builder, shape of the inputs, number of tasks, options of `pack`."""

CASES: dict[str, Network] = {
    "SmallCNN 112x92x1, 8 tasks": (pae.models.SmallCNN, (1, 112, 92, 1), 8, {}),
    "SmallCNN 112x92x1, 8 tasks that pick": (pae.models.SmallCNN, (1, 112, 92, 1), 8, {"sharing": "picked"}),
    "VGG16 32x32x3, 20 tasks": (pae.models.VGG16, (1, 32, 32, 3), 20, {}),
    "InceptionResnetV1 160x160x3, 3 tasks": (pae.models.InceptionResnetV1, (1, 160, 160, 3), 3, {}),
}
FLIPS = 1000


def network(case: Network) -> tuple[pae.Net, pae.State]:
    """Return a network of frozen tasks whose weights, and picks, are drawn at random."""
    build, shape, tasks, options = case
    net = pae.linen(build, jnp.zeros(shape))
    state = pae.init(net, jax.random.key(0))
    for number in range(1, tasks + 1):
        name, key = f"task {number}", jax.random.key(number)
        state = pae.pack(net, state, name, head=5, key=key, **options)
        draw = np.random.default_rng(number)
        entry = state.tasks[name]
        if entry.pick is not None:
            pick = jax.tree.map(lambda p, draw=draw: jnp.asarray(draw.normal(size=p.shape) * 0.01, p.dtype), entry.pick)
            state = state.replace(tasks={**state.tasks, name: entry.replace(pick=pick)})
        values = jax.tree.map(
            lambda w, o, draw=draw, number=number: jnp.where(
                o == number, jnp.asarray(draw.normal(size=w.shape) * 0.05, w.dtype), w
            ),
            state.shared,
            state.owner,
        )
        own = 0.2 if number == 1 else 0.4 / tasks
        state = pae.prune(state.replace(shared=values), name, 1 - own / available(state, number))
        state = pae.freeze(state, name)
    return net, state


def available(state: pae.State, number: int) -> float:
    """Return the share of all weights that the newest task owns or could claim."""
    owners = [np.asarray(leaf) for leaf in jax.tree.leaves(state.owner)]
    return sum(int(((o == 0) | (o == number)).sum()) for o in owners) / sum(o.size for o in owners)


def entropy_bytes(counts: list[Any]) -> float:
    """Return the least number of bytes for symbols of these counts, leaf by leaf."""
    bits = 0.0
    for leaf in counts:
        found = np.asarray([n for n in leaf if n], np.float64)
        bits += float(np.sum(found * np.log2(found.sum() / found)))
    return bits / 8


def tensor_bytes(path: Path) -> dict[str, int]:
    """Return the bytes of each kind of tensor of a bundle."""
    found: dict[str, int] = {}
    for name, tensor in safetensors.numpy.load_file(path).items():
        kind = name.partition("/")[0]
        found[kind] = found.get(kind, 0) + tensor.nbytes
    return found


def coded(header: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """Return how close coded owners and picks are to their entropy, with the counts that decoding needs."""
    found = {}
    kinds = {"owners": [header["owners"]], "picks": list(header["picks"].values())}
    for kind, groups in kinds.items():
        counts = [leaf for group in groups for leaf in (group.values() if isinstance(group, dict) else group)]
        if counts and sizes.get(kind):
            text = sum(len(str(leaf)) for leaf in counts)
            bound = entropy_bytes(counts)
            found[kind] = {
                "bytes": sizes[kind],
                "bytes_of_counts": text,
                "entropy_ratio": round(sizes[kind] / bound, 4),
                "entropy_ratio_with_counts": round((sizes[kind] + text) / bound, 4),
            }
    return found


def sizes(net: pae.Net, state: pae.State, folder: Path) -> dict[str, Any]:
    """Write everything once and return its bytes; every bundle must come back bit for bit."""
    names = list(state.tasks)
    pae.save(folder / "stage", state)
    shutil.make_archive(str(folder / "stage"), "zip", folder / "stage")
    found = {
        "stage": sum(file.stat().st_size for file in (folder / "stage").rglob("*") if file.is_file()),
        "zip of the stage": (folder / "stage.zip").stat().st_size,
    }
    headers = {}
    for weights in ("float32", "bfloat16", "int8"):
        path = folder / weights
        headers[weights] = pae.write_bundle(path, net, state, weights=weights)
        found[f"bundle {weights}"] = path.stat().st_size
    pae.write_bundle(folder / "before", net, state, tasks=names[:-1])
    for weights in ("float32", "int8"):
        pae.write_bundle(folder / f"delta {weights}", net, state, after=names[-2], weights=weights)
        found[f"delta of the last task, {weights}"] = (folder / f"delta {weights}").stat().st_size
    pae.write_bundle(folder / "one", net, state, tasks=names[-1:])
    found["last task alone, float32"] = (folder / "one").stat().st_size
    before = pae.read_bundle(net, folder / "before")
    after = pae.read_bundle(net, folder / "delta float32", onto=before)
    whole = pae.read_bundle(net, folder / "float32")
    equal = all(map(np.array_equal, jax.tree.leaves(after), jax.tree.leaves(whole)))
    equal &= pae.certificate(state, whole).holds
    owned = sum(int((np.asarray(o) > 0).sum()) for o in jax.tree.leaves(state.owner))
    parts = tensor_bytes(folder / "float32")
    return {
        "bytes": found,
        "round_trips_bit_equal": bool(equal),
        "coded": coded(headers["float32"], parts),
        "values": {"owned_weights": owned, "bytes": parts["values"], "bytes_per_owned_weight": parts["values"] / owned},
        "bytes_of_local_variables_and_heads": parts["tasks"],
    }


def refusals(net: pae.Net, folder: Path, flips: int) -> dict[str, int]:
    """Flip bits and cut a delta at random; return how often it was refused."""
    onto, raw = pae.read_bundle(net, folder / "before"), (folder / "delta int8").read_bytes()
    draw = np.random.default_rng(0)
    found = {"tried": 0, "refused": 0}
    for trial in range(flips):
        damaged = bytearray(raw)
        if trial % 10:
            damaged[draw.integers(len(raw))] ^= 1 << draw.integers(8)
        else:
            del damaged[draw.integers(len(raw)) :]
        (folder / "damaged").write_bytes(damaged)
        found["tried"] += 1
        try:
            pae.read_bundle(net, folder / "damaged", onto=onto)
        except pae.CheckpointError:
            found["refused"] += 1
    return found


def speed(net: pae.Net, state: pae.State, folder: Path, repeats: int) -> dict[str, Any]:
    """Return times of bundles beside safetensors of the dense arrays."""
    shared = {f"shared/{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state.shared))}
    dense = shared | {f"owner/{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state.owner))}
    path, other = folder / "timed", folder / "dense"

    def write() -> None:
        path.unlink(missing_ok=True)
        pae.write_bundle(path, net, state)

    writing = {"safetensors": lambda: safetensors.numpy.save_file(dense, other), "bundle": write}
    reading = {
        "safetensors": lambda: jax.tree.map(jnp.asarray, safetensors.numpy.load_file(other)),
        "bundle": lambda: pae.read_bundle(net, path),
    }
    moved = {"safetensors": harness.array_bytes(dense), "bundle": harness.array_bytes(dense)}
    found = {}
    for name, ways in (("write", writing), ("read", reading)):
        times = harness.compare(harness.in_turn(ways, repeats, 1), "safetensors")
        rates = {way: round(moved[way] / 1e6 / seconds) for way, seconds in times["seconds"].items()}
        found[name] = times | {"megabytes_of_dense_arrays_per_second": rates}
    return found


def exported(net: pae.Net, state: pae.State, shape: tuple[int, ...]) -> dict[str, bool]:
    """Say whether exported programs give the bits of `predict`."""
    x = np.random.default_rng(0).normal(size=(3, *shape[1:])).astype(np.float32)
    task = list(state.tasks)[-1]
    wanted = np.asarray(pae.predict(net, state, task, x)).tobytes()
    places: tuple[Any, ...] = ("inside", "beside")
    return {
        f"weights {place}": np.asarray(pae.export(net, state, task, weights=place).call(x)).tobytes() == wanted
        for place in places
    }


def measure(case: Network, repeats: int) -> dict[str, Any]:
    """Return all figures of a network."""
    net, state = network(case)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = sizes(net, state, folder)
        found["damaged_deltas"] = refusals(net, folder, FLIPS)
        found["speed"] = speed(net, state, folder, repeats)
    found["exported_bits_equal_predict"] = exported(net, state, case[1])
    return found


def main() -> None:
    """Measure the cases and write the result file."""
    settings = harness.options(__doc__, 5)
    harness.publish(
        settings, {name: functools.partial(measure, case, settings.repeats) for name, case in CASES.items()}
    )


if __name__ == "__main__":
    main()
