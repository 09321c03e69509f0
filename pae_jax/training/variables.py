"""Split and join trees of trained and untrained variables."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import traverse_util

from pae_jax.core import ownership
from pae_jax.trees import Tree


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


@jax.jit
def strayed(owner: Tree, before: Tree, task_id: jax.Array) -> Tree:
    """Count per leaf the weights whose owner changed other than by a release."""
    return jax.tree.map(lambda o, b: jnp.sum((o != b) & ~((b == task_id) & (o == ownership.FREE))), owner, before)
