"""Parts of weights: a trained parameter may be a block of a leaf, or a list of single entries of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from pae_jax.trees import Tree

Path = tuple[str, ...]
SMALLEST = 256
"""Leaves below this number of weights are trained whole."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Which entries of a leaf a parameter holds.

    A parameter has as many axes as its leaf, because optimizers tell kernels from biases by the number of axes: single
    entries are one row, (1, ..., 1, n). As a column, each would be a unit of its own for `optax.centralize`, whose mean
    it would lose: all of it.

    Attributes:
      index: int32 vectors, one for each of `axes`. A block is the product of these sets of positions and of all
        positions of the other axes. Single entries have the coordinates `index[0][n], index[1][n], ...`; entries that
        only fill up the row lie outside the leaf.
      axes: the axes that `index` speaks of, ascending when made by `find`; all axes for single entries.
      scattered: whether these are single entries.
    """

    index: tuple[jax.Array, ...]
    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    scattered: bool = dataclasses.field(metadata={"static": True})

    def take(self, leaf: jax.Array) -> jax.Array:
        """Return the parameter: these entries of a leaf, and 0 for those outside."""
        return leaf.at[self._where(leaf)].get(mode="fill", fill_value=0)

    def put(self, leaf: jax.Array, part: jax.Array) -> jax.Array:
        """Return the leaf with these entries replaced by a parameter."""
        return leaf.at[self._where(leaf)].set(part, mode="drop", unique_indices=True)

    def add(self, leaf: jax.Array, part: jax.Array) -> jax.Array:
        """Return the leaf with a parameter added to these entries."""
        return leaf.at[self._where(leaf)].add(part, mode="drop")

    def transposed(self, permutation: tuple[int, ...]) -> Places:
        """Return the places in the transposed leaf."""
        return dataclasses.replace(self, axes=tuple(permutation.index(axis) for axis in self.axes))

    def _where(self, leaf: jax.Array) -> tuple[jax.Array | slice, ...]:
        """Return an index whose result has the axes of the leaf in their order, the last of them for single entries."""
        known = dict(zip(self.axes, self.index, strict=True))
        if self.scattered:
            return tuple(known[axis].reshape(*[1] * (leaf.ndim - 1), -1) for axis in range(leaf.ndim))
        first, last = min(self.axes), max(self.axes)
        between = [known.get(axis, jnp.arange(leaf.shape[axis])) for axis in range(first, last + 1)]
        return (*[slice(None)] * first, *jnp.ix_(*between))


def find(owner: np.ndarray, task_id: int) -> Places | None:
    """Return where a task's weights lie, or None if the leaf should be trained whole.

    A block of at most a quarter of the leaf is trained as a block; at most a sixteenth of the leaf as single entries.
    Where both fit, a block is taken if the task owns at least a quarter of it.

    Args:
      owner: owner ids of one leaf.
      task_id: the task.
    """
    own = owner == task_id
    count = int(np.count_nonzero(own))
    if count == 0 or own.size < SMALLEST:
        return None
    sets = [np.flatnonzero(own.any(axis=tuple(a for a in range(own.ndim) if a != axis))) for axis in range(own.ndim)]
    block, length = math.prod(map(len, sets)), _rounded(count)
    fits = 4 * block <= own.size
    if 16 * length <= own.size and not (fits and block <= 4 * count):
        return _entries(own, length)
    if not fits:
        return None
    axes = tuple(axis for axis, found in enumerate(sets) if len(found) < own.shape[axis])
    return Places(tuple(jnp.asarray(sets[axis], jnp.int32) for axis in axes), axes, scattered=False)


def _rounded(count: int) -> int:
    """Round up to a number of three binary digits, so that tasks of about equal size have parameters of equal shape."""
    unit = 1 << max(count.bit_length() - 3, 0)
    return -(-count // unit) * unit


def _entries(own: np.ndarray, length: int) -> Places:
    coordinates = [axis.astype(np.int32) for axis in np.nonzero(own)]
    more = np.arange(length - len(coordinates[0]), dtype=np.int32)
    filled = [np.concatenate([axis, 0 * more]) for axis in coordinates]
    filled[0][len(coordinates[0]) :] += own.shape[0] + more
    return Places(tuple(map(jnp.asarray, filled)), tuple(range(own.ndim)), scattered=True)


def find_all(owner: Tree, task_id: int, moving: Collection[Path]) -> Tree:
    """Return the places of those of the named leaves that are trained in part; not of leaves on several devices."""
    found = {}
    for path, leaf in _flat(owner).items():
        if path in moving and not (isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1):
            found[path] = find(np.asarray(leaf), task_id)
    return traverse_util.unflatten_dict({path: places for path, places in found.items() if places is not None})


def put(places: Tree, base: Tree, shared: Tree) -> Tree:
    """Return parameters with whole leaves: those with places put into the leaf of the base, the others as they are."""
    known, at = _flat(base), _flat(places)
    wholes = {path: at[path].put(known[path], leaf) if path in at else leaf for path, leaf in _flat(shared).items()}
    return traverse_util.unflatten_dict(wholes)


def take(places: Tree, whole: Tree, wanted: Tree) -> Tree:
    """Return the leaves of a tree of whole leaves that another tree has: those with places as the entries there."""
    known, at = _flat(whole), _flat(places)
    parts = {path: at[path].take(known[path]) if path in at else known[path] for path in _flat(wanted)}
    return traverse_util.unflatten_dict(parts)


def pairs(places: Tree, shared: Tree) -> dict[Path, tuple[jax.Array, Places]]:
    """Return the parameters that have places, by path."""
    parts = _flat(shared)
    return {path: (parts[path], found) for path, found in _flat(places).items()}


def _flat(tree: Tree) -> dict[Path, Any]:
    return traverse_util.flatten_dict(tree)
