"""A state as the tensors and the header of a bundle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.core import Growth, State, TaskState, integrity, names, ownership
from pae_jax.large_arrays import in_threads, place, selected
from pae_jax.nets import heads
from pae_jax.storage.bundle import coding
from pae_jax.storage.bundle.values import Floating, Precision, Stored, groups, restore, scaled, store, stored_dtype
from pae_jax.trees import PARAMS, Tree, describe, flatten


class Places(NamedTuple):
    """Where a bundle says something about a leaf: what its reader's tasks do not own.

    Attributes:
      shape: of the leaf.
      open: bool, places in the flat leaf that are coded; None for all.
    """

    shape: tuple[int, ...]
    open: np.ndarray | None

    @property
    def size(self) -> int:
        """Number of coded places."""
        return int(np.prod(self.shape, dtype=np.int64)) if self.open is None else int(np.count_nonzero(self.open))

    def gather(self, leaf: np.ndarray) -> np.ndarray:
        """Return a flat leaf at the coded places."""
        return leaf if self.open is None else selected(leaf, self.open.__getitem__)

    def scatter(self, leaf: np.ndarray, found: np.ndarray) -> np.ndarray:
        """Return a flat leaf with other values at the coded places."""
        if self.open is None:
            return found
        new = leaf.copy()
        place(new, self.open.__getitem__, found)
        return new


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
        return Places(tuple(ids.shape), (flat < 1) | (flat > have))

    return {path: leaf(ids) for path, ids in flatten(owner).items()}


def with_precision(state: State, precision: Precision, local: Floating) -> State:
    """Return the state as a bundle of this precision reads back, its digests taken anew."""
    if precision == local == "float32":
        return state
    state = state.replace(tasks={name: _rounded(name, entry, local) for name, entry in state.tasks.items()})
    owner, shared = flatten(state.owner), flatten(state.shared)

    def leaf(path: str) -> np.ndarray:
        weights, ids = np.array(shared[path]).reshape(-1), np.asarray(owner[path]).reshape(-1)

        def owned(block: slice) -> np.ndarray:
            return ids[block] > 0

        group = groups(shared[path].shape, ids, 0) if scaled(weights.dtype, precision) else None
        stored = store("shared", path, selected(weights, owned), group, precision)
        place(weights, owned, restore(stored, group, weights.dtype))
        return weights.reshape(shared[path].shape)

    leaves = in_threads([lambda path=path: leaf(path) for path in shared], [w.size for w in shared.values()])
    arrays = [jnp.asarray(leaf) for leaf in leaves]  # here: contexts such as jax.enable_x64 do not reach other threads
    state = state.replace(shared=jax.tree.unflatten(jax.tree.structure(state.shared), arrays))
    return with_digests(state, set(state.tasks))


def _rounded(task: str, entry: TaskState, precision: Floating) -> TaskState:
    """Return a task with local variables and head as they are read back."""

    def leaf(path: str, value: Any) -> jax.Array:
        array = np.asarray(value)
        return jnp.asarray(restore(store(f"task {task!r}", path, array, None, precision), None, array.dtype))

    def tree(part: str, values: Tree) -> Tree:
        leaves = [leaf(f"{part}/{path}", value) for path, value in flatten(values).items()]
        return jax.tree.unflatten(jax.tree.structure(values), leaves)

    return entry.replace(local=tree("local", entry.local), head=tree("head", entry.head))


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
    state: State, original: State, have: int, precision: Precision, local: Floating
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return what the header says, and the tensors, of all tasks but the first `have`.

    Args:
      state: the tasks of the bundle and of its reader alone, with the values that the reader gets.
      original: the same with the values that were trained.
      have: number of tasks that the reader has.
      precision: of the weights.
      local: of local variables and heads.
    """
    new, owner, shared = len(state.tasks) - have, flatten(state.owner), flatten(original.shared)

    def leaf(path: str, spot: Places) -> tuple[np.ndarray, np.ndarray, Stored]:
        ids, weights = (np.asarray(tree[path]).reshape(-1) for tree in (owner, shared))
        coded = spot.gather(ids)
        symbols = (np.maximum(coded, np.int8(have)) - np.int8(have) if have else coded).view(np.uint8)
        values = selected(weights, lambda block: ids[block] > have)
        group = groups(spot.shape, ids, have) if scaled(values.dtype, precision) else None
        return symbols, coding.counts_of(symbols, new + 1), store("shared", path, values, group, precision)

    spots = places(state.owner, have)
    work = [lambda path=path, spot=spot: leaf(path, spot) for path, spot in spots.items()]
    leaves = in_threads(work, [spot.size for spot in spots.values()])
    header: dict[str, Any] = {"owners": {}, "picks": {}}
    tensors: dict[str, np.ndarray] = {}
    for path, (_, counts, found) in zip(spots, leaves, strict=True):
        header["owners"][path] = counts.tolist()
        tensors[f"values/{path}"] = found.data
        if found.scales is not None:
            tensors[f"scales/{path}"] = found.scales
    tensors["owners"] = coding.encode([symbols for symbols, _, _ in leaves], [counts for _, counts, _ in leaves])
    for name in names(state)[have:]:
        entry = state.tasks[name]
        for dtype, leaves in by_dtype([entry.local, entry.head]).items():
            values = np.concatenate([np.asarray(leaf).reshape(-1) for leaf in leaves])
            tensors[f"tasks/{entry.id}/{dtype}"] = values.astype(stored_dtype(values.dtype, local), copy=False)
        if entry.pick is not None:
            counts, stream = _coded_pick(state, entry)
            header["picks"][str(entry.id)], tensors[f"picks/{entry.id}"] = counts, stream
    own = [sum(counts[number] for counts in header["owners"].values()) for number in range(1, new + 1)]
    return header | _records(state, have, own), tensors


def _coded_pick(state: State, entry: TaskState) -> tuple[list[list[int]], np.ndarray]:
    """Return the counts of signs -1, 0, 1 per leaf, and their code."""
    picked = zip(jax.tree.leaves(entry.pick), older_places(state, entry), strict=True)
    flat = [selected(np.asarray(leaf).reshape(-1), older.__getitem__) for leaf, older in picked]
    signs = [(leaf.astype(np.int8) + 1).view(np.uint8) for leaf in flat]
    counts = [coding.counts_of(leaf, 3) for leaf in signs]
    return [leaf.tolist() for leaf in counts], coding.encode(signs, counts)


def _records(state: State, have: int, own: Sequence[int]) -> dict[str, Any]:
    """Return the shapes and the records of all tasks but the first `have`, which own so many weights."""
    new = [state.tasks[name] for name in names(state)[have:]]
    known = state.tasks[names(state)[have - 1]].width if have else new[0].width
    return {
        "width": state.width,
        "shared": jax.tree.map(describe, state.shared),
        "local": {str(entry.width): jax.tree.map(describe, entry.local) for entry in new},
        "tasks": list(_task_records(state, have, own)),
        "growth": [growth_json(growth) for growth in state.growth if growth.narrow >= known],
    }


def _task_records(state: State, have: int, own: Sequence[int]) -> Iterator[dict[str, Any]]:
    for name, weights in zip(names(state)[have:], own, strict=True):
        entry = state.tasks[name]
        yield {
            "id": entry.id,
            "name": name,
            "width": entry.width,
            "sharing": entry.sharing,
            "picking": None if entry.picking is None else asdict(entry.picking),
            "head": heads.describe(entry.head_spec),
            "program": entry.program,
            "head_variables": jax.tree.map(describe, entry.head),
            "weights": weights,
            "sha256": task_digest(state, entry),
        }


def laid_out(growths: Any, tree: Tree) -> Tree:
    """Return a tree parallel to shared weights at the width after some expansions; new entries are 0."""
    for growth in growths:
        tree = growth.maps.put({PARAMS: tree})[PARAMS]
    return tree
