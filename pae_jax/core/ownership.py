"""Owner algebra: who may see, train, claim and release a weight. Every mask is derived from the owner ids.

Owner ids are int8 arrays parallel to the shared weights: 0 is free, k is owned by task k. One id per weight makes
the tasks disjoint by construction; there is no second mask to keep consistent.
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.arrays import Counts, Masks, Owners, Pairs, Scores, Signs, TaskId, Weights
from pae_jax.checks import is_traced
from pae_jax.core import picking, placement
from pae_jax.core.spread_arrays import whole
from pae_jax.core.state import State, TaskState, check_state, find
from pae_jax.trees import PARAMS, Tree, flatten

FREE = 0


def id_array(task_id: int) -> TaskId:
    """Return a task id as the traced operand that all compiled functions of this library take."""
    return jnp.asarray(task_id, jnp.int8)


def visible(owner: Owners, task_id: TaskId, sharing: str, signs: Signs | None = None) -> Masks:
    """Return the bool tree of the weights that take part in a task's forward pass.

    `1 <= owner <= k` with sharing "all", `owner in {1, k}` with sharing "first"; with signs, `owner == k` and the
    older weights whose sign is not 0; with "masked", those of both whose sign is not 0.
    """
    if signs is not None and sharing == "masked":
        return jax.tree.map(lambda o, s: (o > FREE) & (o <= task_id) & (s != 0), owner, signs)
    if signs is not None:
        return jax.tree.map(lambda o, s: (o == task_id) | ((o > FREE) & (o < task_id) & (s != 0)), owner, signs)
    if sharing == "first":
        return jax.tree.map(lambda o: (o == 1) | (o == task_id), owner)
    return jax.tree.map(lambda o: (o > FREE) & (o <= task_id), owner)


def owned(owner: Owners, task_id: TaskId) -> Masks:
    """Return the bool tree `owner == k`."""
    return jax.tree.map(lambda o: o == task_id, owner)


def select(mask: Tree, tree: Tree) -> Tree:
    """Keep a tree where the mask is True and put 0 elsewhere.

    A product with the mask would let a NaN in a hidden weight through (`nan * 0` is nan); a selection does not.
    """
    return jax.tree.map(lambda m, leaf: jnp.where(m, leaf, jnp.zeros((), leaf.dtype)), mask, tree)


@jax.jit
def claim(owner: Owners, task_id: TaskId) -> Owners:
    """Give every free weight to a task."""
    return jax.tree.map(lambda o: jnp.where(o == FREE, task_id, o), owner)


@jax.jit
def release(shared: Weights, owner: Owners, freed: Masks) -> tuple[Weights, Owners]:
    """Free the weights of a bool tree: their owner becomes 0 and their value exactly 0."""
    keep = jax.tree.map(jnp.logical_not, freed)
    return select(keep, shared), select(keep, owner)


@jax.jit
def counts(owner: Owners, task_id: TaskId) -> tuple[Counts, Counts]:
    """Return `(owned, free)`: weights owned by a task and free weights, int32 of shape (leaves,)."""

    def per_leaf(value: jax.Array | int) -> jax.Array:
        return jnp.stack([jnp.sum(o == value, dtype=jnp.int32) for o in jax.tree.leaves(owner)])

    return per_leaf(task_id), per_leaf(FREE)


def effective(
    shared: Weights, owner: Owners, task_id: TaskId, sharing: str, factors: Scores | Signs | None = None
) -> Weights:
    """Return the weights a task computes with: the visible ones, and 0 elsewhere.

    Args:
      shared: weights.
      owner: parallel owner ids.
      task_id: int8 scalar.
      sharing: rule of the task, as `TaskState.seeing`.
      factors: with picks, the factor of each older weight: signs, or their straight-through factors; with "masked" also
        that of each own weight.
    """
    if factors is None:
        # A -0.0 becomes +0.0, which is the same weight: an update of +0.0 would do the same.
        seen = jax.tree.map(lambda m, w: m & (w != 0), visible(owner, task_id, sharing), shared)
        return select(seen, shared)

    def leaf(w: jax.Array, own: jax.Array, old: jax.Array, factor: jax.Array) -> jax.Array:
        # A product, not a selection, so that the score of a hidden weight gets its gradient; but 0 * NaN is NaN.
        zero = jnp.zeros((), w.dtype)
        known = jnp.where((factor != 0) | jnp.isfinite(w), w, zero)
        return jnp.where(own, w, jnp.where(old, known * factor.astype(w.dtype), zero))

    mine, old = owned(owner, task_id), picking.older(owner, task_id)
    if sharing == "masked":
        old = jax.tree.map(jnp.logical_or, mine, old)
        mine = jax.tree.map(jnp.zeros_like, mine)
    return jax.tree.map(leaf, shared, mine, old, factors)


_effective = jax.jit(effective, static_argnames="sharing")


def at_width(state: State, tree: Tree, width: float) -> Tree:
    """Gather a tree parallel to `state.shared` at one of the widths the state has had."""
    maps = tuple(growth.maps for growth in reversed(state.growth) if growth.narrow >= width)
    return placement.gathered(maps, {PARAMS: tree})[PARAMS]


def local_at_width(state: State, entry: TaskState, fresh: Tree) -> Tree:
    """Return a task's local variables at the state's width, with new entries from fresh ones."""
    growths = [growth for growth in state.growth if growth.narrow >= entry.width]
    if not growths:
        return entry.local
    whole = growths[0].maps
    for growth in growths[1:]:
        whole = whole.then(growth.maps)
    return placement.local_widened(whole, entry.local, fresh)


def _widened(state: State, entry: TaskState, tree: Tree | None) -> Tree | None:
    """Place a tree parallel to the weights at a task's width into the state's width; new entries are 0."""
    if tree is None:
        return None
    for growth in state.growth:
        if growth.narrow >= entry.width:
            tree = placement.widened(growth.maps, {PARAMS: tree})[PARAMS]
    return tree


def task_weights(state: State, entry: TaskState) -> Weights:
    """Return the weights a task computes with, at the task's own width: the visible ones, and 0 elsewhere."""
    shared = at_width(state, state.shared, entry.width)
    owner = at_width(state, state.owner, entry.width)
    return _effective(shared, owner, id_array(entry.id), entry.seeing, signs(entry))


def seen_weights(state: State, entry: TaskState) -> Weights:
    """Return the weights a task may see at its own width, regardless of its picks; 0 elsewhere."""
    shared, owner = (at_width(state, tree, entry.width) for tree in (state.shared, state.owner))
    sharing = "all" if entry.sharing == "picked" else entry.sharing
    return _effective(shared, owner, id_array(entry.id), sharing, None)


@jax.jit
def changed(shared: Weights, handed: Weights, owner: Owners, task_id: TaskId) -> Pairs:
    """Return per leaf how many weights that a task does not own have changed, and how many there are.

    int32 (2,). Weights that the task released must be 0. A NaN that stays NaN does not count as changed.
    """

    def leaf(w: jax.Array, before: jax.Array, o: jax.Array) -> jax.Array:
        foreign = o != task_id
        expected = jnp.where(o == FREE, jnp.zeros((), w.dtype), before)
        differs = foreign & (w != expected) & ~(jnp.isnan(w) & jnp.isnan(expected))
        return jnp.stack([jnp.sum(differs, dtype=jnp.int32), jnp.sum(foreign, dtype=jnp.int32)])

    return jax.tree.map(leaf, shared, handed, owner)


@jax.jit
def taken(shared: Weights, owner: Owners, trained: Weights, after: Owners, task_id: TaskId) -> Weights:
    """Return the shared weights, with a task's own replaced by trained values and the weights it released by 0."""

    def leaf(w: jax.Array, o: jax.Array, new: jax.Array, own: jax.Array) -> jax.Array:
        return jnp.where(own == task_id, new, jnp.where(o == task_id, jnp.zeros((), w.dtype), w))

    return jax.tree.map(leaf, shared, owner, trained, after)


def signs(entry: TaskState) -> Signs | None:
    """Return which older weights a task picks, at the task's width; None if it does not pick."""
    if entry.picking is None or entry.pick is None:
        return None
    return entry.picking.signs(entry.pick)


def masks(state: State, task: str) -> Masks:
    """Return which shared weights take part in a task's forward pass.

    `1 <= owner <= k` for sharing "all", `owner in {1, k}` for sharing "first", `owner == k` and the picked older ones
    for sharing "picked".

    Args:
      state: the network.
      task: name of a task, in any phase.

    Returns:
      bool tree parallel to `state.shared`, at the state's width.

    Raises:
      UnknownTaskError: no task of this name.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.init(net, jax.random.key(0))
      >>> state = pae.pack(net, state, "a", head=2, key=jax.random.key(1))
      >>> bool(jax.tree.leaves(pae.masks(state, "a"))[0].all())
      True
    """
    entry = find(state, task)
    return visible(state.owner, id_array(entry.id), entry.seeing, _widened(state, entry, signs(entry)))


def hidden(state: State, entry: TaskState) -> Masks | None:
    """Return which of its own weights a task does not pick, at the state's width; None if it sees all of its own."""
    if entry.seeing != "masked":
        return None
    task_id, picked = id_array(entry.id), _widened(state, entry, signs(entry))
    return jax.tree.map(lambda o, s: (o == task_id) & (s == 0), state.owner, picked)


def shown(state: State, entry: TaskState) -> Tree:
    """Return the owners, with 0 where a task owns a weight that it does not pick."""
    unpicked = hidden(state, entry)
    if unpicked is None:
        return state.owner
    return jax.tree.map(lambda o, h: jnp.where(h, jnp.zeros((), o.dtype), o), state.owner, unpicked)


def trainable(state: State, task: str) -> Masks:
    """Return which shared weights training this task may change.

    `owner == k` while task k is not frozen; nothing afterwards.

    Args:
      state: the network.
      task: name of a task, in any phase.

    Returns:
      bool tree parallel to `state.shared`, at the state's width.

    Raises:
      UnknownTaskError: no task of this name.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.init(net, jax.random.key(0))
      >>> state = pae.freeze(pae.pack(net, state, "a", head=2, key=jax.random.key(1)), "a")
      >>> bool(jax.tree.leaves(pae.trainable(state, "a"))[0].any())
      False
    """
    entry = find(state, task)
    if entry.frozen:
        return jax.tree.map(lambda o: jnp.zeros(o.shape, bool), state.owner)
    return owned(state.owner, id_array(entry.id))


def owner_counts(state: State) -> dict[str, np.ndarray]:
    """Return per leaf path the number of weights of each owner, int64 of shape (tasks + 1,), free ones first."""
    size = len(state.tasks) + 1
    return {
        path: np.bincount(whole(leaf).ravel(), minlength=size).astype(np.int64)
        for path, leaf in flatten(state.owner).items()
    }


def free_fraction(state: State) -> float | jax.Array:
    """Return the share of the shared weights that no task owns.

    `#{owner == 0} / #weights`, at the state's width.

    Args:
      state: the network.

    Returns:
      float in [0, 1]; float32 scalar inside `jax.jit`.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.init(net, jax.random.key(0))
      >>> pae.free_fraction(state)
      1.0
    """
    check_state(state)
    _, free = counts(state.owner, id_array(FREE))
    total = sum(leaf.size for leaf in jax.tree.leaves(state.owner))
    if is_traced(free):
        return jnp.sum(free.astype(jnp.float32)) / total
    return int(np.asarray(free, np.int64).sum()) / total


def host_counts(owner: Tree, task_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `counts` on the host, int64 of shape (leaves,)."""
    own, free = cast("tuple[jax.Array, jax.Array]", counts(owner, id_array(task_id)))
    return np.asarray(own, np.int64), np.asarray(free, np.int64)
