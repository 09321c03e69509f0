"""Arrays that are spread over devices: where they lie, and their values in the memory of the host, piece by piece."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from pae_jax.checks import is_traced
from pae_jax.errors import ArgumentError
from pae_jax.trees import Tree, flatten


def sharding_of(leaf: Any) -> Sharding | None:
    """Return where an array lies if that is on several devices; None otherwise, and for tracers."""
    if not isinstance(leaf, jax.Array) or is_traced(leaf) or len(leaf.sharding.device_set) == 1:
        return None
    return leaf.sharding


def is_spread(tree: Tree) -> bool:
    """Return whether some array of a tree lies on several devices."""
    return any(sharding_of(leaf) is not None for leaf in jax.tree.leaves(tree))


def pieces(*arrays: Any) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield the values of arrays of one shape, flat and in C order, in parallel pieces.

    A spread array comes in at least as many blocks of rows as it has parts, if it has that many rows; each is put
    together from its shards, and is not kept. In a job of several processes, all of them have to ask for an array that
    is spread over them.
    """
    bounds = sorted(set[int]().union(*map(_bounds, arrays)))
    for start, end in itertools.pairwise(bounds) if len(bounds) > 1 else [(0, 0)]:
        yield tuple(_rows(array, start, end).reshape(-1) for array in arrays)


def whole(array: Any) -> np.ndarray:
    """Return an array in the memory of the host; all processes have to ask for one that is spread over them."""
    if not is_elsewhere(array):
        return np.asarray(array)
    return np.concatenate([piece for (piece,) in pieces(array)]).reshape(array.shape)


def is_elsewhere(array: Any) -> bool:
    """Return whether this process has a part of an array alone."""
    return isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated)


def over_processes(tree: Tree) -> set[Any]:
    """Return the devices of the arrays of which this process has a part alone; none if it has all of them whole."""
    parts = [leaf for leaf in jax.tree.leaves(tree) if is_elsewhere(leaf)]
    return set().union(*(leaf.sharding.device_set for leaf in parts))


def require_here(what: str, tree: Tree) -> None:
    """Raise `ArgumentError` if this process has a part alone of an array."""
    for path, leaf in flatten(tree).items():
        if is_elsewhere(leaf):
            raise ArgumentError(
                f"{what} needs whole arrays, and '{path}' is spread over several processes. Save the network by "
                f"pae.save in all of them; then call {what} in one process, on what pae.load reads there."
            )


def _bounds(array: Any) -> set[int]:
    """Return where the blocks of rows of an array begin and end."""
    rows = np.shape(array)[0] if np.ndim(array) else 1
    if sharding_of(array) is None or not np.ndim(array):
        return {0, rows}
    parts = {str(index): index[0] for index in array.sharding.devices_indices_map(array.shape).values()}
    blocks = {part.indices(rows)[:2] for part in parts.values()}
    each = -(-len(parts) // len(blocks))
    return {low + (high - low) * number // each for low, high in blocks for number in range(each + 1)}


def _rows(array: Any, start: int, end: int) -> np.ndarray:
    """Return rows of an array in the memory of the host; of a scalar, its one number."""
    if sharding_of(array) is None or array.is_fully_replicated:
        return np.asarray(array)[start:end] if np.ndim(array) else np.asarray(array)
    out = np.zeros((end - start, *array.shape[1:]), array.dtype)
    for shard in array.addressable_shards:
        low, high, _ = shard.index[0].indices(array.shape[0])
        if shard.replica_id == 0 and low < end and start < high:
            first, last = max(low, start), min(high, end)
            piece = shard.data
            if (first, last) != (low, high):
                piece = lax.dynamic_slice_in_dim(piece, first - low, last - first)
            out[(slice(first - start, last - start), *shard.index[1:])] = np.asarray(piece)
    return _from_all(out, array.sharding.device_set) if is_elsewhere(array) else out


def _from_all(mine: np.ndarray, devices: set[Any]) -> np.ndarray:
    """Return what the processes of some devices have together; each byte is 0 in all of them but one."""
    one = {device.process_index: device for device in sorted(devices, key=lambda device: -device.id)}
    mesh = Mesh(np.asarray([one[process] for process in sorted(one)]), ("process",))
    local = jax.device_put(mine.reshape(1, -1).view(np.uint8), one[jax.process_index()])
    split = NamedSharding(mesh, PartitionSpec("process"))
    rows = jax.make_array_from_single_device_arrays((len(one), local.shape[1]), split, [local])
    total = np.asarray(_added(rows, NamedSharding(mesh, PartitionSpec())))
    return total.view(mine.dtype).reshape(mine.shape)


@partial(jax.jit, static_argnames="out")
def _added(rows: jax.Array, out: NamedSharding) -> jax.Array:
    return lax.with_sharding_constraint(lax.reduce(rows, np.uint8(0), lax.add, (0,)), out)
