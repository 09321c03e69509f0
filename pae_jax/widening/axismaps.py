"""Stored index maps: runs of consecutive coordinates, and functions that move arrays by them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pae_jax.widening.programs import is_traced

_FEW_RUNS = 16  # up to this many runs are sliced and joined; more are gathered by index


@dataclasses.dataclass(frozen=True)
class AxisMap:
    """An injective map from the coordinates of a narrow axis to those of its wide counterpart.

    Attributes:
      wide: size of the wide axis.
      runs: pairs (start, length): narrow coordinates, taken in order, sit at start, start + 1, ... of each run.
    """

    wide: int
    runs: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, index: Iterable[int], wide: int) -> AxisMap:
        """From an index array: narrow coordinate i sits at index[i]."""
        index = np.asarray(list(index) if not isinstance(index, np.ndarray) else index, dtype=np.int64)
        if index.size == 0:
            return cls(wide, ())
        starts = np.flatnonzero(np.diff(index, prepend=index[0] - 2) != 1)
        lengths = np.diff(starts, append=index.size)
        return cls(wide, tuple((int(index[s]), int(k)) for s, k in zip(starts, lengths, strict=True)))

    @property
    def narrow(self) -> int:
        """Size of the narrow axis."""
        return sum(length for _, length in self.runs)

    @functools.cached_property
    def index(self) -> np.ndarray:
        """The map as an int64 array of `narrow` entries."""
        if not self.runs:
            return np.zeros(0, np.int64)
        return np.concatenate([np.arange(start, start + length) for start, length in self.runs])

    @property
    def is_identity(self) -> bool:
        return self.narrow == self.wide

    def then(self, other: AxisMap) -> AxisMap:
        """First this map, then `other`."""
        return AxisMap.of(other.index[self.index], other.wide)

    def take(self, array: Any, axis: int) -> Any:
        """Gather the narrow entries of a wide axis."""
        if self.is_identity:
            return array
        if len(self.runs) <= _FEW_RUNS:
            parts = [lax.slice_in_dim(array, start, start + length, axis=axis) for start, length in self.runs]
            if len(parts) == 1:
                return parts[0]
            if parts:
                return lax.concatenate(parts, axis)
        return jnp.take(array, self.index, axis=axis, mode="clip")

    def spread(self, array: Any, axis: int) -> Any:
        """Place narrow entries along the wide axis; entries at new coordinates are undefined."""
        if self.is_identity:
            return array
        if 0 < len(self.runs) <= _FEW_RUNS and sorted(self.runs) == list(self.runs):
            # Of an array that is spread over devices, this moves between them only what changes its place.
            parts, taken, filled = [], 0, 0
            for start, length in self.runs:
                part = lax.slice_in_dim(array, taken, taken + length, axis=axis)
                taken += length
                after = self.wide - start - length if taken == self.narrow else 0
                parts.append(_padded(part, axis, start - filled, after))
                filled = start + length
            return parts[0] if len(parts) == 1 else lax.concatenate(parts, axis)
        source = np.zeros(self.wide, np.int64)
        source[self.index] = np.arange(self.narrow)
        return jnp.take(array, source, axis=axis, mode="clip")

    @property
    def mask(self) -> np.ndarray:
        """Bool array of `wide` entries: True at the old coordinates."""
        mask = np.zeros(self.wide, bool)
        mask[self.index] = True
        return mask

    def __str__(self) -> str:
        if self.is_identity:
            return f"{self.wide}"
        if self.runs == ((0, self.narrow),):
            return f"{self.narrow}->{self.wide}"
        return f"{self.narrow}->{self.wide} in {len(self.runs)} run{'s' if len(self.runs) != 1 else ''}"


@dataclasses.dataclass(frozen=True)
class ArrayMap:
    """Positions of the entries of a narrow array in its wide counterpart: one `AxisMap` per axis."""

    axes: tuple[AxisMap, ...]

    @property
    def narrow(self) -> tuple[int, ...]:
        """Narrow shape."""
        return tuple(axis.narrow for axis in self.axes)

    @property
    def wide(self) -> tuple[int, ...]:
        """Wide shape."""
        return tuple(axis.wide for axis in self.axes)

    @property
    def is_identity(self) -> bool:
        return all(axis.is_identity for axis in self.axes)

    def then(self, other: ArrayMap) -> ArrayMap:
        """First this map, then `other`."""
        return ArrayMap(tuple(a.then(b) for a, b in zip(self.axes, other.axes, strict=True)))

    def take(self, array: Any) -> Any:
        """The narrow entries of a wide array."""
        if self.is_identity:
            return array
        if _on_host(array):
            return _like(np.ascontiguousarray(np.asarray(array)[self._places]), array)
        for i, axis in enumerate(self.axes):
            array = axis.take(array, i)
        return array

    def put(self, array: Any, into: Any = None) -> Any:
        """A wide array with the narrow entries in their places and, elsewhere, 0 or the entries of `into`."""
        if self.is_identity:
            return array
        if _on_host(array) and (into is None or _on_host(into)):
            out = np.zeros(self.wide, array.dtype) if into is None else np.array(into)
            out[self._places] = np.asarray(array)
            return _like(out, array)
        if 0 in self.narrow:
            return jnp.zeros(self.wide, array.dtype) if into is None else into
        array = jnp.asarray(array)
        # Spread along every axis, then select: bits are preserved, and new positions involve no arithmetic.
        mask = jnp.ones(self.wide, bool)
        for i, axis in enumerate(self.axes):
            array = axis.spread(array, i)
            mask = mask if axis.is_identity else mask & lax.broadcast_in_dim(axis.mask, self.wide, (i,))
        return jnp.where(mask, array, jnp.zeros((), array.dtype) if into is None else jnp.asarray(into))

    @property
    def _places(self) -> tuple[Any, ...]:
        """NumPy index of the old entries in a wide array."""
        if all(len(axis.runs) == 1 for axis in self.axes):
            return tuple(slice(start, start + length) for ((start, length),) in (axis.runs for axis in self.axes))
        return np.ix_(*(axis.index for axis in self.axes))

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.axes))})"


def _padded(array: Any, axis: int, before: int, after: int) -> Any:
    """The array with zeros before and after it along an axis."""
    widths = [(before, after, 0) if i == axis else (0, 0, 0) for i in range(array.ndim)]
    return lax.pad(array, jnp.zeros((), array.dtype), widths)


def _on_host(array: Any) -> bool:
    """Whether NumPy can move the entries directly; else (tracers, other devices) JAX, which compiles per shape."""
    if isinstance(array, np.ndarray):
        return True
    if is_traced(array) or not isinstance(array, jax.Array):
        return False
    return all(device.platform == "cpu" for device in array.devices()) and len(array.devices()) == 1


def _like(result: np.ndarray, array: Any) -> jax.Array | np.ndarray:
    """The result as the same kind of array, on the same device, and bound to it only if `array` is."""
    if isinstance(array, np.ndarray):
        return result
    return jax.device_put(result, array.sharding if array.committed else None)
