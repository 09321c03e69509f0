"""Which free weights a new task claims: all of them, or as many as its budget allows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.arrays import Owners, Weights
from pae_jax.checks import check_number, is_traced
from pae_jax.core import ownership
from pae_jax.core.selection import smallest
from pae_jax.core.state import State
from pae_jax.errors import ArgumentError
from pae_jax.trees import Tree, flatten, require_match


def check(state: State, budget: float | None, scores: Tree | None) -> None:
    """Raise `ArgumentError` or `StructureError` if the budget or its scores do not fit this network."""
    if budget is None:
        if scores is not None:
            raise ArgumentError("budget_scores say which weights a budget takes; give budget= too")
        return
    check_number("budget", budget, 0.0, 1.0)
    total = sum(leaf.size for leaf in jax.tree.leaves(state.owner))
    if total > np.iinfo(np.int32).max:
        raise ArgumentError(f"a budget counts up to 2**31 - 1 weights; there are {total:,}")
    if not _count(state.owner, budget):
        raise ArgumentError(f"budget {budget:g} of {total:,} shared weights is not one weight; take a larger share")
    if scores is None:
        return
    found, expected = (
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), bool), tree) for tree in (scores, state.shared)
    )
    require_match("budget_scores", found, expected, "One number per shared weight, such as a squared gradient.")
    for path, leaf in flatten(scores).items():
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ArgumentError(f"budget_scores/{path} must hold floats, found {jnp.result_type(leaf)}")
        if not is_traced(leaf) and not (np.isfinite(leaf) & (np.asarray(leaf) >= 0)).all():
            raise ArgumentError(
                f"budget_scores/{path} has a value that is negative or not finite; take squares or magnitudes of "
                "gradients of a finite loss"
            )


def claimed(owner: Owners, task_id: int, budget: float | None, scores: Tree | None, key: jax.Array) -> Owners:
    """Return the owners after a task claimed all free weights, or those of the largest scores within its budget."""
    new = ownership.id_array(task_id)
    if budget is None:
        return ownership.claim(owner, new)
    if scores is not None:
        scores = jax.tree.map(jnp.asarray, scores)
    else:
        leaves, structure = jax.tree.flatten(owner)
        keys = jax.random.split(key, len(leaves))
        drawn = [jax.random.uniform(k, o.shape, jnp.float32) for k, o in zip(keys, leaves, strict=True)]
        scores = structure.unflatten(drawn)
    return _largest(owner, new, jnp.asarray(_count(owner, budget), jnp.int32), scores)


@jax.jit
def _largest(owner: Owners, task_id: jax.Array, count: jax.Array, scores: Tree) -> Owners:
    """Give the free weights of the largest scores, all at least 0, to a task; ties go to the later position."""
    free = jax.tree.map(lambda o: o == ownership.FREE, owner)
    total = sum(jnp.sum(leaf, dtype=jnp.int32) for leaf in jax.tree.leaves(free))
    leaves = jax.tree.leaves(scores)
    left = jnp.full((len(leaves),), jnp.maximum(total - count, 0), jnp.int32)
    rest = jax.tree.unflatten(jax.tree.structure(owner), smallest(leaves, jax.tree.leaves(free), left, "global"))
    return jax.tree.map(lambda o, f, r: jnp.where(f & ~r, task_id, o), owner, free, rest)


def kept_free(before: Weights, after: Weights, owner: Owners) -> Weights:
    """Return the new weights, with those that stay free as they were."""
    return jax.tree.map(lambda old, new, o: jnp.where(o == ownership.FREE, old, new), before, after, owner)


def _count(owner: Owners, budget: float) -> int:
    return round(budget * sum(leaf.size for leaf in jax.tree.leaves(owner)))
