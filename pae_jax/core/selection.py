"""Exact selection of the smallest magnitudes without sorting, in about a dozen passes over memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, auto_axes

from pae_jax.arrays import BoolArray, Counts, FloatArray

Scope = Literal["leaf", "global"]
Select = Callable[..., list[jax.Array]]
Pool = Callable[[jax.Array], jax.Array]

_DIGIT = 3  # bits decided by one pass; counting for 7 bounds at once is still limited by memory bandwidth on a CPU


def smallest(
    leaves: Sequence[FloatArray], candidates: Sequence[BoolArray], wanted: Counts, scope: Scope
) -> list[BoolArray]:
    """Mark the entries of smallest magnitude, exactly as many as wanted, ties broken by index.

    The magnitudes are read as integers of the same order, and the wanted-th smallest is found digit by digit, highest
    first: each pass counts the entries below the 7 values that the next 3 bits can take. So float32 leaves need 11
    passes, and bfloat16 or float16 leaves alone 5, regardless of the values.

    Args:
      leaves: float arrays; NaN counts as larger than infinity.
      candidates: bool arrays of the same shapes; only these entries may be marked.
      wanted: int32 of shape (leaves,): how many to mark in each leaf, at most its candidates; with scope "global"
        every entry is the number to mark in all leaves together. May be traced, as may everything but shapes and scope.
      scope: "leaf" ranks each leaf by itself, "global" all leaves together.

    Returns:
      bool arrays of the same shapes.

    Example:
      >>> weights = jnp.asarray([[0.5, -0.1, 0.1, -0.3]])
      >>> [mark] = smallest([weights], [weights < 0.4], jnp.asarray([1]), "leaf")
      >>> mark.tolist()
      [[False, True, False, False]]
    """
    shardings = [jax.typeof(leaf).sharding for leaf in leaves]
    select: Select = partial(_smallest, scope=scope)
    if any(axis == AxisType.Explicit for sharding in shardings for axis in sharding.mesh.axis_types):
        # Leaves are cut into rows regardless of their sharding; the partitioner decides how.
        select = cast(Select, auto_axes(select, out_sharding=shardings))
    return select(leaves, candidates, wanted)


def _smallest(
    leaves: Sequence[jax.Array], candidates: Sequence[jax.Array], wanted: jax.Array, scope: Scope
) -> list[jax.Array]:
    together = scope == "global"
    pool: Pool = (lambda n: jnp.broadcast_to(n.sum(axis=0), n.shape)) if together else (lambda n: n)
    keys, bits = _magnitude_keys(leaves, candidates)
    kth = _kth(keys, wanted, bits, pool)
    rows = [_row_counts(key, jnp.stack([bound, bound + 1])) for key, bound in zip(keys, kth, strict=True)]
    below, upto = jnp.unstack(jnp.stack([counts.sum(axis=1) for counts in rows]), axis=1)
    missing = wanted - pool(below)
    if together:  # ties in earlier leaves are taken first
        tied = upto - below
        missing = jnp.clip(missing - (jnp.cumsum(tied) - tied), 0, tied)
    ends = [_tie_end(*args) for args in zip(keys, kth, rows, missing, strict=True)]
    # Entries that are no candidates have the largest key and so are neither below a bound nor tied with it.
    return [
        (key < bound) | ((key == bound) & (_positions(key.shape) < end))
        for key, bound, end in zip(keys, kth, ends, strict=True)
    ]


def _magnitude_keys(leaves: Sequence[jax.Array], candidates: Sequence[jax.Array]) -> tuple[list[jax.Array], int]:
    """Map |w| to unsigned integers of the same order, and say how many low bits they use.

    The bit pattern of an IEEE float without its sign, read as an integer, grows with the magnitude. Leaves of several
    dtypes are compared in a dtype that holds them all. Entries that are no candidates map to the largest integer.
    """
    dtypes = {leaf.dtype for leaf in leaves}
    if len(dtypes) == 1 and jnp.finfo(*dtypes).bits >= 16:
        (common,) = dtypes
    else:
        common = jnp.dtype(jnp.float64 if jnp.dtype(jnp.float64) in dtypes else jnp.float32)
    size = jnp.finfo(common).bits
    unsigned = jnp.dtype(f"uint{size}")
    unsigned_max = jnp.iinfo(unsigned).max

    def key(leaf: jax.Array, candidate: jax.Array) -> jax.Array:
        pattern = lax.bitcast_convert_type(leaf.astype(common), unsigned)
        magnitude = pattern & jnp.asarray(unsigned_max >> 1, unsigned)
        return jnp.where(candidate, magnitude, jnp.asarray(unsigned_max, unsigned))

    return [key(leaf, candidate) for leaf, candidate in zip(leaves, candidates, strict=True)], size - 1


def _kth(keys: list[jax.Array], wanted: jax.Array, bits: int, pool: Pool) -> jax.Array:
    """Return per leaf the wanted-th smallest key (1-based), for keys below 2**bits.

    That is the largest bound with fewer than `wanted` keys below it. Its digits are decided from the highest to the
    lowest: a digit is the number of trial bounds that have too few keys below them.
    """
    unsigned = keys[0].dtype
    digits = jnp.arange(1, 2**_DIGIT, dtype=unsigned)[None]

    def settle(i: jax.Array, bound: jax.Array) -> jax.Array:
        # The last digit may overlap bits already decided; bounds above the next decided one are never too low.
        shift = jnp.maximum(bits - _DIGIT * (i + 1), 0).astype(unsigned)
        trials = bound[:, None] + (digits << shift)
        counts = pool(jnp.stack([_counts_below(key, trial, 0) for key, trial in zip(keys, trials, strict=True)]))
        return bound + (jnp.sum(counts < wanted[:, None], axis=1).astype(unsigned) << shift)

    return lax.fori_loop(0, -(-bits // _DIGIT), settle, jnp.zeros(len(keys), unsigned))


def _counts_below(key: jax.Array, bounds: jax.Array, axis: int) -> jax.Array:
    """Count the keys below each bound over the axes from `axis` on; int32 of shape (bounds, *axes before).

    This is one reduction with several results, because XLA's CPU compiler vectorises it but not a sum of comparisons: 7
    bounds cost a tenth of a single such sum.
    """

    def add(totals: Sequence[jax.Array], counts: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        return tuple(total + count for total, count in zip(totals, counts, strict=True))

    below = tuple((key < bound).astype(jnp.int32) for bound in bounds)
    zeros = (jnp.zeros((), jnp.int32),) * len(below)
    return jnp.stack(lax.reduce(below, zeros, add, tuple(range(axis, key.ndim))))


def _row_axis(shape: tuple[int, ...]) -> int:
    """Return the axis before which a leaf is best cut into rows: as many rows as entries in a row, or nearly."""
    return min(range(len(shape) + 1), key=lambda axis: math.prod(shape[:axis]) + math.prod(shape[axis:]))


def _row_counts(key: jax.Array, bounds: jax.Array) -> jax.Array:
    """Count the keys below each bound row by row; int32 of shape (bounds, rows)."""
    return _counts_below(key, bounds, _row_axis(key.shape)).reshape(len(bounds), -1)


def _tie_end(key: jax.Array, bound: jax.Array, counts: jax.Array, missing: jax.Array) -> jax.Array:
    """Return the position before which exactly `missing` keys equal to a bound lie; uint32.

    `counts` are the row counts below the bound and below its successor. They determine the row of the end. That row is
    selected, not indexed: of a leaf that is spread over devices, no more than one row then moves between them.
    """
    up_to_row = jnp.cumsum(counts[1] - counts[0])
    row = jnp.sum(up_to_row < missing)
    before = jnp.max(jnp.where(up_to_row < missing, up_to_row, 0))
    axis = _row_axis(key.shape)
    here = _positions(key.shape[:axis]) == row.astype(jnp.uint32)
    here = here.reshape(*key.shape[:axis], *[1] * (key.ndim - axis))
    entries = jnp.max(jnp.where(here, key, jnp.zeros((), key.dtype)), axis=tuple(range(axis))).reshape(-1)
    column = jnp.sum(jnp.cumsum(entries == bound, dtype=jnp.int32) < missing - before)
    end = row.astype(jnp.uint32) * jnp.uint32(entries.size) + column.astype(jnp.uint32) + 1
    return jnp.where(missing > 0, end, jnp.uint32(0))


def _positions(shape: tuple[int, ...]) -> jax.Array:
    return jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
