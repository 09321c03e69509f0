"""Split, join and check trees of trained and untrained variables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import AxisType, reshard

from pae_jax.checks import is_traced
from pae_jax.core import ownership
from pae_jax.errors import ArgumentError, StructureError, kind_of
from pae_jax.trees import Tree, describe, flatten, require_match


def paths(tree: Tree) -> list[tuple[str, ...]]:
    """Return the paths of a tree's leaves as tuples, in the order in which JAX flattens them."""
    return [tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def joined(tree: Tree, other: Tree) -> Tree:
    flat = {**traverse_util.flatten_dict(tree), **traverse_util.flatten_dict(other)}
    return traverse_util.unflatten_dict(flat)


def without_empty(variables: Tree) -> Tree:
    return {name: tree for name, tree in variables.items() if jax.tree.leaves(tree)}


def with_updates(variables: Tree, updates: Tree) -> Tree:
    """Return variables with the collections updated by a call, without sown values."""

    def collection(name: str) -> Tree:
        flat, found = (traverse_util.flatten_dict(tree.get(name, {})) for tree in (variables, updates))
        return traverse_util.unflatten_dict({path: found.get(path, leaf) for path, leaf in flat.items()})

    return {name: collection(name) for name in variables}


def require_like(name: str, tree: Tree, params: Tree) -> None:
    """Raise `StructureError` unless a tree has the paths and shapes of the parameters; dtypes may differ."""
    same = jax.tree.structure(tree) == jax.tree.structure(params)
    if not same or any(map(_other_shape, jax.tree.leaves(tree), jax.tree.leaves(params))):
        found, wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), np.float32), (tree, params))
        require_match(name, found, wanted, "It must have the tree of ts.params, with its shapes.")


def require_updates(updates: dict[str, Tree], variables: dict[str, Tree]) -> None:
    """Raise unless updates are what `TrainState.apply_fn` returns."""
    expected = "expected those that apply_fn returns: {'backbone': {collection: ...}, 'head': {...}}"
    if not isinstance(updates, Mapping):
        raise ArgumentError(f"updates is {kind_of(updates)}, {expected}")
    for part, collections in updates.items():
        if part not in ("backbone", "head"):
            raise ArgumentError(f"updates has {part!r}, {expected}")
        for found in (collections, *(collections.values() if isinstance(collections, Mapping) else ())):
            if not isinstance(found, Mapping):
                raise ArgumentError(f"updates has {kind_of(found)} in {part!r}, {expected}")
        known = flatten(variables[part])
        for path, leaf in flatten(collections).items():
            if path in known and _other_shape(leaf, known[path]):
                raise StructureError(f"updates of the {part}", path, describe(leaf), describe(known[path]))


def _other_shape(leaf: Any, wanted: Any) -> bool:
    return np.shape(leaf) != np.shape(wanted)


def on_devices_of(tree: Tree, like: Tree) -> Tree:
    """Return arrays on the devices of parallel ones where these are others; nothing is moved to the host."""

    def move(leaf: Any, target: Any) -> Any:
        placed = isinstance(leaf, jax.Array) and isinstance(target, jax.Array) and not is_traced((leaf, target))
        moves = placed and leaf.committed and leaf.sharding.device_set != target.sharding.device_set
        return jax.device_put(leaf, target.sharding) if moves else leaf

    return jax.tree.map(move, tree, like)


def laid_like(tree: Tree, like: Tree) -> Tree:
    """Return traced arrays with the layout of parallel ones, on meshes of explicit axes; others stay as they are."""

    def lay(leaf: Any, target: Any) -> Any:
        found, wanted = (jax.typeof(array).sharding for array in (leaf, target))
        return reshard(leaf, wanted) if found != wanted and AxisType.Explicit in wanted.mesh.axis_types else leaf

    return jax.tree.map(lay, tree, like)


@jax.jit
def strayed(owner: Tree, before: Tree, task_id: jax.Array) -> Tree:
    """Count per leaf the weights whose owner changed other than by a release."""
    return jax.tree.map(lambda o, b: jnp.sum((o != b) & ~((b == task_id) & (o == ownership.FREE))), owner, before)
