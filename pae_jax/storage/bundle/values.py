"""Values as a bundle stores them: as they are, in half precision, or as int8 with a scale per channel."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np

from pae_jax.errors import StructureError

Floating = Literal["float32", "bfloat16", "float16"]
FLOATING: tuple[str, ...] = get_args(Floating)
Precision = Literal["float32", "bfloat16", "float16", "int8"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
_BFLOAT16 = np.dtype(jnp.bfloat16)
_LEVELS = 127


class Stored(NamedTuple):
    """What is written of some weights of a leaf.

    Attributes:
      data: the values, in the dtype of the file.
      scales: bfloat16 (groups,), one for each group of `groups`; None where values need none.
    """

    data: np.ndarray
    scales: np.ndarray | None = None


def stored_dtype(dtype: np.dtype, precision: str) -> np.dtype:
    """Return the dtype in which the values of a leaf are written; never a larger one than its own.

    Leaves of integers and booleans, which local variables may have, stay as they are.
    """
    kinds = {"bfloat16": _BFLOAT16, "float16": np.dtype(np.float16), "int8": np.dtype(np.int8)}
    wanted = kinds.get(precision, dtype) if jnp.issubdtype(dtype, jnp.floating) else dtype
    return wanted if wanted.itemsize < dtype.itemsize else dtype


def scaled(dtype: np.dtype, precision: str) -> bool:
    """Say whether the values of a leaf are stored with scales."""
    return stored_dtype(dtype, precision).kind == "i"


def groups(shape: tuple[int, ...], ids: np.ndarray, have: int) -> np.ndarray:
    """Return for each new weight which scale is its own: one per task and channel, the last axis, that has any weight.

    Numbered by task, then by channel: neither a later task nor a wider leaf changes the scales of a task.

    Args:
      shape: of the leaf.
      ids: int8, owners in the flat leaf; a new weight is one of a task after the first `have`.
      have: number of tasks whose weights are left out.
    """
    channels = shape[-1] if len(shape) > 1 else 1
    positions = np.flatnonzero(ids > have)
    keys = ids[positions].astype(np.int64) * channels + positions % channels
    return (np.cumsum(np.bincount(keys) > 0) - 1)[keys] if keys.size else keys


def store(tree: str, path: str, values: np.ndarray, group: np.ndarray | None, precision: str) -> Stored:
    """Return values of a leaf as they are written; raise `StructureError` where lower precision cannot say them.

    int8: `w = q s`, q in -127..127, s the bfloat16 nearest to `max |w| / 127` over the group. The product is exact in
    float32, so every machine reads the same bits, and values once rounded are not rounded again.
    """
    dtype = stored_dtype(values.dtype, precision)
    if dtype == values.dtype:
        return Stored(values)
    with np.errstate(over="ignore", invalid="ignore"):
        found = Stored(values.astype(dtype)) if group is None else _quantised(values, group)
        lost = ~np.isfinite(restore(found, group, values.dtype).astype(np.float32))
    if lost.any():
        count = f"{int(lost.sum())} values that are not finite, or would not be"
        raise StructureError(tree, path, count, f"values in the range of {precision}", 'Store them as "float32".')
    return found


def restore(stored: Stored, group: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
    """Return the weights that stored values stand for, in the dtype of the leaf."""
    if stored.scales is None or group is None:
        return stored.data.astype(dtype, copy=False)
    return (stored.data.astype(np.float32) * stored.scales.astype(np.float32)[group]).astype(dtype)


def _quantised(values: np.ndarray, group: np.ndarray) -> Stored:
    exact = values.astype(np.float32)
    largest = np.zeros(int(group.max(initial=-1)) + 1, np.float32)
    np.maximum.at(largest, group, np.where(np.isnan(exact), np.float32(np.inf), np.abs(exact)))
    scales = (largest / _LEVELS).astype(_BFLOAT16)
    step = scales.astype(np.float32)[group]
    levels = np.divide(exact, step, out=np.zeros_like(exact), where=(step > 0) & np.isfinite(step))
    return Stored(np.clip(np.rint(levels), -_LEVELS, _LEVELS).astype(np.int8), scales)
