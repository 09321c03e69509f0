"""Work on large arrays: on all cores, and in blocks that stay in the processor's cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

T = TypeVar("T")
Where = Callable[[slice], np.ndarray]
"""Returns the bool mask of a block of an array."""

_BLOCK = 1 << 16
_SMALL = 1 << 20  # less work than threads take to start


def in_threads(work: Sequence[Callable[[], T]], sizes: Sequence[int]) -> list[T]:
    """Call functions on as many threads as there are cores, the largest first; return their results in order.

    Args:
      work: functions without arguments that spend their time where Python's lock is released. They make no arrays of
        JAX: contexts such as `jax.enable_x64` do not reach other threads. What one raises is raised here, that of the
        first in order.
      sizes: how large each is, in elements or bytes; where all of it is small, no thread is started.
    """
    if sum(sizes) < _SMALL:
        return [function() for function in work]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        order = sorted(range(len(work)), key=lambda number: -sizes[number])
        futures = {number: pool.submit(work[number]) for number in order}
        return [futures[number].result() for number in range(len(work))]


def blocks(size: int) -> Iterator[slice]:
    """Yield the blocks of a flat array; all but the last have a length that 8 divides."""
    for start in range(0, size, _BLOCK):
        yield slice(start, min(start + _BLOCK, size))


def selected(values: np.ndarray, where: Where) -> np.ndarray:
    """Return the values of a flat array that a mask marks: `values[mask]`, a few times faster."""
    found, end = np.empty(values.size, values.dtype), 0  # the system gives no memory for what is not written
    for block in blocks(values.size):
        places = where(block).nonzero()[0]
        start, end = end, end + places.size
        values[block].take(places, out=found[start:end], mode="clip")
    return found[:end]


def place(target: np.ndarray, where: Where, values: np.ndarray) -> None:
    """Write values, one for each place that a mask marks, into a flat array: `target[mask] = values`."""
    end = 0
    for block in blocks(target.size):
        places = where(block).nonzero()[0]
        start, end = end, end + places.size
        target[block][places] = values[start:end]


def packed_mask(size: int, where: Where) -> np.ndarray:
    """Return the mask of a flat array as bits: `np.packbits(mask)`."""
    return np.concatenate([np.packbits(where(block)) for block in blocks(size)] or [np.zeros(0, np.uint8)])
