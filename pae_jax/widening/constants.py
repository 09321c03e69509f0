"""Constants: compare the literals and arrays of the two programs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.errors import StructureError
from pae_jax.widening.ranges import UNKNOWN, Range, exactly, hull
from pae_jax.widening.terms import copies, given, opened
from pae_jax.widening.values import Reason, Value, unchanged

SMALL = 4096  # index arrays of at most this many entries are tracked by value

_REMEDY = (
    "compute it from sizes that do not grow, for example normalise over groups of fixed size (or use BatchNorm), or "
    "give attention more heads instead of a larger head_dim"
)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a constant is used: layer, operation and "file.py:line", for messages."""

    where: str
    primitive: str = "constant"
    source: str = ""


def constant(narrow: Any, wide: Any, place: Place) -> Value:
    """What is known about a constant that is `narrow` in one program and `wide` in the other."""
    if getattr(narrow, "shape", ()) == () == getattr(wide, "shape", ()) and not _is_key(narrow):
        return _scalar(np.asarray(narrow), np.asarray(wide), place)
    if narrow.ndim != wide.ndim or any(a > b for a, b in zip(narrow.shape, wide.shape, strict=True)):
        raise StructureError(
            "wide program", place.where, f"a constant of shape {wide.shape}", f"one that holds {narrow.shape}",
            "A network can only grow.",
        )  # fmt: skip
    if _is_key(narrow) and narrow.shape == wide.shape:
        same = np.array_equal(jax.random.key_data(narrow), jax.random.key_data(wide))
        value = unchanged(narrow.shape)
        return value if same else _differs(value, place, "a random key has other bits")
    n, w = np.asarray(narrow), np.asarray(wide)
    if n.shape == w.shape:
        value = unchanged(n.shape, old=hull((_range(n), _range(w))), content=_content(n, w))
        same = np.array_equal(n, w, equal_nan=n.dtype.kind in "fc")
        return value if same else _differs(value, place, f"a constant array of shape {n.shape} has other entries")
    if n.size and np.all(n == n.flat[0]) and np.all(w == n.flat[0]):
        axes = tuple(copies(a, b) for a, b in zip(n.shape, w.shape, strict=True))
        return Value(axes, _range(n), _range(n), content=_content(n, w))
    corner = tuple(slice(size) for size in n.shape)
    if np.array_equal(w[corner], n):  # true for the leading block, so the map must be the leading block
        axes = tuple(given(range(a), b) for a, b in zip(n.shape, w.shape, strict=True))
        return Value(axes, _range(n), _range(w), content=_content(n, w))
    axes = tuple(opened(a, b) for a, b in zip(n.shape, w.shape, strict=True))
    problem = f"a constant array of shape {n.shape} becomes another one of shape {w.shape}"
    return _differs(Value(axes, content=_content(n, w)), place, problem)


def _scalar(n: np.ndarray, w: np.ndarray, place: Place) -> Value:
    value = unchanged((), old=hull((_range(n), _range(w))), content=_content(n, w))
    if n == w or (n != n and w != w):
        return value
    problem = (
        f"the constant {n} becomes {w} when the network is widened (typically a mean over a growing axis, or a scale "
        "by its size), so old results change"
    )
    return _differs(value, place, problem)


def _differs(value: Value, place: Place, problem: str) -> Value:
    reason = Reason(place.where, place.primitive, "", problem, _REMEDY, place.source)
    return dataclasses.replace(value, reasons=frozenset({reason}))


def _range(array: np.ndarray) -> Range:
    if array.size == 0 or array.dtype.kind == "c":
        return UNKNOWN
    if array.dtype.kind not in "biuf":  # bfloat16 and similar dtypes
        array = array.astype(np.float32)
    return hull((exactly(float(array.min())), exactly(float(array.max()))))


def _content(n: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    small = max(n.size, w.size) <= SMALL and n.dtype.kind in "iub"
    return (n, w) if small else None


def _is_key(value: Any) -> bool:
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
