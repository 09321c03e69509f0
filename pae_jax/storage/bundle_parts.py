"""A state as the tensors and the header of a bundle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.core import Growth, State, TaskState, integrity, names, ownership
from pae_jax.nets import heads
from pae_jax.storage import coding
from pae_jax.storage.bundle_values import Precision, groups, restore, scaled, store
from pae_jax.trees import PARAMS, Tree, describe, flatten


class Places(NamedTuple):
    """Where a bundle says something about a leaf: what its reader's tasks do not own.

    Attributes:
      shape: of the leaf.
      open: int64, places in the flat leaf that are coded; None for all.
    """

    shape: tuple[int, ...]
    open: np.ndarray | None

    @property
    def size(self) -> int:
        """Number of coded places."""
        return int(np.prod(self.shape, dtype=np.int64)) if self.open is None else self.open.size

    def gather(self, leaf: np.ndarray) -> np.ndarray:
        """Return a leaf at the coded places."""
        return leaf.reshape(-1) if self.open is None else leaf.reshape(-1)[self.open]

    def positions(self, inside: np.ndarray) -> np.ndarray:
        """Return where coded places that a mask marks lie in the flat leaf."""
        found = np.flatnonzero(inside)
        return found if self.open is None else self.open[found]


def places(owner: Tree, have: int) -> dict[str, Places]:
    """Return `{path: Places}` for owners of which the tasks 1..have are known; concrete, or abstract if there are none.

    Args:
      owner: owner ids at the width of the bundle, of the known tasks at least.
      have: number of known tasks.
    """

    def leaf(ids: Any) -> Places:
        if not have:
            return Places(tuple(ids.shape), None)
        flat = np.asarray(ids).reshape(-1)
        return Places(tuple(ids.shape), np.flatnonzero((flat < 1) | (flat > have)))

    return {path: leaf(ids) for path, ids in flatten(owner).items()}


def with_precision(state: State, precision: Precision) -> State:
    """Return the state as a bundle of this precision reads back, its digests taken anew."""
    if precision == "float32":
        return state
    owner = flatten(state.owner)

    def leaf(path: str, weights: Any) -> jax.Array:
        flat, ids = np.array(weights).reshape(-1), np.asarray(owner[path]).reshape(-1)
        positions = np.flatnonzero(ids > 0)
        group = groups(weights.shape, positions, ids[positions]) if scaled(flat.dtype, precision) else None
        flat[positions] = restore(store(path, flat[positions], group, precision), group, flat.dtype)
        return jnp.asarray(flat.reshape(weights.shape))

    leaves = [leaf(path, weights) for path, weights in flatten(state.shared).items()]
    state = state.replace(shared=jax.tree.unflatten(jax.tree.structure(state.shared), leaves))
    return with_digests(state, set(state.tasks))


def with_digests(state: State, tasks: set[str]) -> State:
    """Return the state with the digests of some tasks taken anew."""
    new = {
        name: entry.replace(digests=integrity.as_rows(integrity.task_digests(state, entry))) if name in tasks else entry
        for name, entry in state.tasks.items()
    }
    return state.replace(tasks=new)


def task_digest(state: State, entry: TaskState) -> str:
    """Return one SHA-256 for a task: over the paths and the recorded digests of its arrays."""
    whole = hashlib.sha256()
    for path, row in integrity.recorded(state, entry).items():
        whole.update(f"{path}\n".encode() + row)
    return whole.hexdigest()


def growth_digest(growth: Growth) -> str:
    """Return the SHA-256 of an expansion."""
    return hashlib.sha256(json.dumps(growth_json(growth), sort_keys=True).encode()).hexdigest()


def growth_json(growth: Growth) -> dict[str, Any]:
    """Return an expansion as JSON."""
    return {"narrow": growth.narrow, "wide": growth.wide, "maps": growth.maps.to_json()}


def older_places(state: State, entry: TaskState) -> list[np.ndarray]:
    """Return per leaf which weights, at a task's own width, it may pick; flat bool."""
    owner = jax.tree.leaves(ownership.at_width(state, state.owner, entry.width))
    return [(flat > 0) & (flat < entry.id) for flat in (np.asarray(leaf).reshape(-1) for leaf in owner)]


def by_dtype(tree: Tree) -> dict[str, list[Any]]:
    """Return the leaves of a tree by the name of their dtype, each list in flattening order."""
    found: dict[str, list[Any]] = {}
    for leaf in jax.tree.leaves(tree):
        found.setdefault(str(leaf.dtype), []).append(leaf)
    return found


def state_parts(
    state: State, original: State, have: int, precision: Precision
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return what the header says, and the tensors, of all tasks but the first `have`.

    Args:
      state: the tasks of the bundle and of its reader alone, with the values that the reader gets.
      original: the same with the values that were trained.
      have: number of tasks that the reader has.
      precision: of the weights.
    """
    header: dict[str, Any] = {"owners": {}, "picks": {}}
    tensors: dict[str, np.ndarray] = {}
    symbols = []
    owner, shared = flatten(state.owner), flatten(original.shared)
    for path, place in places(state.owner, have).items():
        ids = place.gather(np.asarray(owner[path]))
        inside = ids > have
        symbols.append(np.where(inside, ids - have, 0).astype(np.uint8))
        header["owners"][path] = coding.counts_of(symbols[-1], len(state.tasks) - have + 1).tolist()
        positions = place.positions(inside)
        values = np.asarray(shared[path]).reshape(-1)[positions]
        group = groups(place.shape, positions, ids[inside]) if scaled(values.dtype, precision) else None
        found = store(path, values, group, precision)
        tensors[f"values/{path}"] = found.data
        if found.scales is not None:
            tensors[f"scales/{path}"] = found.scales
    tensors["owners"] = coding.encode(symbols, [np.asarray(counts) for counts in header["owners"].values()])
    for name in names(state)[have:]:
        entry = state.tasks[name]
        for dtype, leaves in by_dtype([entry.local, entry.head]).items():
            tensors[f"tasks/{entry.id}/{dtype}"] = np.concatenate([np.asarray(leaf).reshape(-1) for leaf in leaves])
        if entry.pick is not None:
            counts, stream = _coded_pick(state, entry)
            header["picks"][str(entry.id)], tensors[f"picks/{entry.id}"] = counts, stream
    return header | _records(state, have), tensors


def _coded_pick(state: State, entry: TaskState) -> tuple[list[list[int]], np.ndarray]:
    """Return the counts of signs -1, 0, 1 per leaf, and their code."""
    picked = zip(jax.tree.leaves(entry.pick), older_places(state, entry), strict=True)
    signs = [(np.asarray(leaf).reshape(-1)[older].astype(np.int8) + 1).astype(np.uint8) for leaf, older in picked]
    counts = [coding.counts_of(leaf, 3) for leaf in signs]
    return [leaf.tolist() for leaf in counts], coding.encode(signs, counts)


def _records(state: State, have: int) -> dict[str, Any]:
    """Return the shapes and the records of all tasks but the first `have`."""
    new = [state.tasks[name] for name in names(state)[have:]]
    known = state.tasks[names(state)[have - 1]].width if have else new[0].width
    return {
        "width": state.width,
        "shared": jax.tree.map(describe, state.shared),
        "local": {str(entry.width): jax.tree.map(describe, entry.local) for entry in new},
        "tasks": list(_task_records(state, have)),
        "growth": [growth_json(growth) for growth in state.growth if growth.narrow >= known],
    }


def _task_records(state: State, have: int) -> Iterator[dict[str, Any]]:
    for name in names(state)[have:]:
        entry = state.tasks[name]
        own, _ = ownership.host_counts(state.owner, entry.id)
        yield {
            "id": entry.id,
            "name": name,
            "width": entry.width,
            "sharing": entry.sharing,
            "picking": None if entry.picking is None else asdict(entry.picking),
            "head": heads.describe(entry.head_spec),
            "head_variables": jax.tree.map(describe, entry.head),
            "weights": int(own.sum()),
            "sha256": task_digest(state, entry),
        }


def laid_out(growths: Any, tree: Tree) -> Tree:
    """Return a tree parallel to shared weights at the width after some expansions; new entries are 0."""
    for growth in growths:
        tree = growth.maps.put({PARAMS: tree})[PARAMS]
    return tree
