"""Arrays in the memory of the host, piece by piece: of an array that is spread over devices, one shard at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from pae_jax.core.placement import sharding_of


def pieces(*arrays: Any) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield the values of arrays of one shape, flat and in C order, in parallel pieces.

    A spread array comes in the blocks of its leading axis, each put together from its shards; the pieces are not kept.
    In a job of several processes, all of them have to ask for an array that is spread over them.
    """
    cuts = [_cuts(array) for array in arrays]
    if any(cut != cuts[0] for cut in cuts):
        cuts = [[(0, len(array))] for array in arrays]
    for start, end in cuts[0]:
        yield tuple(_rows(array, start, end).reshape(-1) for array in arrays)


def _cuts(array: Any) -> list[tuple[int, int]]:
    """Return the blocks of rows into which the shards of an array cut it."""
    rows = np.shape(array)[0] if np.ndim(array) else 1
    if sharding_of(array) is None or not array.is_fully_addressable or not np.ndim(array):
        return [(0, rows)]
    return sorted({shard.index[0].indices(rows)[:2] for shard in array.addressable_shards})


def _rows(array: Any, start: int, end: int) -> np.ndarray:
    if sharding_of(array) is None or not np.ndim(array):
        return np.asarray(array)
    if not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    out = np.empty((end - start, *array.shape[1:]), array.dtype)
    for shard in array.addressable_shards:
        low, high, _ = shard.index[0].indices(array.shape[0])
        if shard.replica_id == 0 and low < end and start < high:
            rows = slice(max(low, start) - start, min(high, end) - start)
            piece = np.asarray(shard.data)[max(start - low, 0) : end - low]
            out[(rows, *shard.index[1:])] = piece
    return out
