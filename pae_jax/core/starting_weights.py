"""Initial values of the weights that a new task claims: preserving the older function, zeros, or newly drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.caching import Cache
from pae_jax.checks import is_traced
from pae_jax.core import ownership, placement
from pae_jax.core.spread_arrays import whole
from pae_jax.core.state import State
from pae_jax.errors import ArgumentError
from pae_jax.nets import (
    Net,
    apply_backbone,
    as_complex,
    batch_size,
    features_function,
    full_precision,
    input_sizes,
    largest,
    relative_limit,
    trial_batch,
)
from pae_jax.trees import PARAMS, Tree, flatten, merge
from pae_jax.widening import find_influence, tables, trace

WeightInit = Literal["preserve", "zeros", "fresh"]
WEIGHT_INITS: tuple[str, ...] = get_args(WeightInit)
_TRACES = Cache(8)
_SPARK = 2.0**-24
"""Scale of the weights into a channel that no older weight feeds but older weights read: a rounding error of what it
computes. At exactly 0 a rectifier has no gradient, and the channel would never learn. A step, or a norm of numbers that
are all 0, makes more of it than a rounding error; where the features show that, these weights are 0."""
_ALIKE = 1e-4
"""Largest difference of features, relative to the largest of them, that counts as rounding: norms enlarge it."""
_ROWS = (8, 64)
"""Fewest and most trial examples: a larger one has fewer."""
_NUMBERS = 2**20


def starting_weights(
    net: Net, state: State, key: jax.Array, weight_init: WeightInit, sharing: str, local: Tree
) -> Tree:
    """Return the shared weights with the initial values of the free ones, as described in `pae.pack`.

    Args:
      net: the network description.
      state: the network before the task.
      key: random key for drawn values.
      weight_init: "preserve", "zeros" or "fresh".
      sharing: which older weights the new task sees.
      local: the new task's local variables.
    """
    if weight_init == "preserve" and state.tasks:
        return _preserved(net, state, key, sharing, local)
    fresh = weight_init == "fresh"
    restart = _empty_leaves(state.shared, state.owner)
    if not is_traced(restart):
        untouched = not state.tasks and not np.asarray(restart).all()  # its zeros are the model's initial values
        if untouched or (not fresh and not np.asarray(restart).any()):
            return state.shared
    return _redraw(state.shared, state.owner, net.initial(key, state.width)[0], restart | fresh)


def _preserved(net: Net, state: State, key: jax.Array, sharing: str, local: Tree) -> Tree:
    """Draw the free weights that cannot change the features, and set all others to 0, or next to it."""
    if is_traced((state, key)):
        raise ArgumentError(
            "weight_init='preserve' looks at values, which a traced function does not have; call pack outside jit and "
            "vmap, or with weight_init='zeros' or 'fresh'"
        )
    layout = net.layout(state.width)
    variables = merge(layout.shared, layout.local)
    features = features_function(net, state.width)
    programs = _TRACES.get(
        (net, state.width),
        lambda: [trace(features, variables, x) for x in input_sizes(net, features, variables)],
    )
    seen = ownership.visible(state.owner, ownership.id_array(len(state.tasks) + 1), sharing)
    nonzero = jax.tree.map(lambda w, m: whole((w != 0) & m), state.shared, seen)
    paths = {f"{PARAMS}/{path}": leaf for path, leaf in flatten(nonzero).items()}
    found = [find_influence(program, variables, paths) for program in programs]
    marks = {path: _at_any_size([marks[path] for marks, _ in found]) for path in paths}
    alive = any(alive for _, alive in found)
    drawn = net.initial(key, state.width)[0]
    if not alive:  # the older weights compute a constant, so there is no function to preserve
        return _redraw(state.shared, state.owner, drawn, jnp.ones(len(paths), bool))
    harmless = jax.tree.unflatten(jax.tree.structure(state.shared), [~marks[path] for path in paths])
    start, sparks = _draw_harmless(state.shared, state.owner, drawn, harmless, nonzero)
    shown = jax.tree.map(lambda mask, owner: mask | (owner == ownership.FREE), seen, state.owner)
    read = tables(programs[0].body)
    empty = [np.flatnonzero(~mask.any(axis=1)) for mask in paths.values() if mask.ndim == 2 and mask.shape in read]
    chosen = _harmless_sparks(net, state.width, (start, sparks, shown, local), [rows for rows in empty if rows.size])
    return _with_sparks(start, sparks, chosen, 1.0)


def _at_any_size(marks: Sequence[np.ndarray]) -> np.ndarray:
    """Join the marks of a leaf for inputs of several sizes.

    Along an axis where they differ, as in a table of which longer inputs read more rows, all entries count as marked
    where one is: inputs of still another size may reach them.
    """
    joined = np.logical_or.reduce(marks)
    for axis in range(joined.ndim):
        slices = [mark.any(axis=tuple(i for i in range(mark.ndim) if i != axis)) for mark in marks]
        if any((one != slices[0]).any() for one in slices):
            joined = np.broadcast_to(joined.any(axis=axis, keepdims=True), joined.shape)
    return joined


@jax.jit
def _draw_harmless(shared: Tree, owner: Tree, drawn: Tree, harmless: Tree, nonzero: Tree) -> tuple[Tree, Tree]:
    """Return the weights, and the small ones that may take the place of some of their zeros."""

    def leaf(w: jax.Array, o: jax.Array, new: jax.Array, allowed: jax.Array, seen: jax.Array) -> tuple[Any, Any]:
        drawn, zero = jnp.where(w == 0, new, w), jnp.zeros((), w.dtype)
        unfed = ~seen.any(axis=tuple(range(seen.ndim - 1)), keepdims=True)
        start = jnp.where(o == ownership.FREE, jnp.where(allowed, drawn, zero).astype(w.dtype), w)
        spark = jnp.where((o == ownership.FREE) & ~allowed & unfed, drawn * _SPARK, zero)
        return start, spark.astype(w.dtype)

    pairs = jax.tree.map(leaf, shared, owner, drawn, harmless, nonzero)
    return jax.tree.transpose(jax.tree.structure(shared), jax.tree.structure((0, 0)), pairs)


@jax.jit
def _with_sparks(start: Tree, sparks: Tree, chosen: jax.Array, factor: Any) -> Tree:
    """Put small weights in the place of zeros, in the chosen leaves."""
    leaves = jax.tree.unflatten(jax.tree.structure(start), list(chosen))
    return jax.tree.map(
        lambda w, spark, lit: jnp.where(lit & (spark != 0), spark * jnp.asarray(factor, w.dtype), w),
        start,
        sparks,
        leaves,
    )


def _harmless_sparks(
    net: Net, width: float, weights: tuple[Tree, Tree, Tree, Tree], empty: Sequence[np.ndarray]
) -> np.ndarray:
    """Return in which leaves small weights change the features by rounding alone, on trial inputs; bool (leaves,).

    They are tried with both signs, all leaves together, and if that is too much, each leaf alone.

    Args:
      net: the network description.
      width: its width.
      weights: `(start, sparks, which weights the task sees, its local variables)`.
      empty: per table of embeddings, the numbers of rows in which no older weight is.
    """
    start, sparks, shown, local = placement.automatic(weights)
    some = np.asarray([bool(jnp.any(spark != 0)) for spark in jax.tree.leaves(sparks)])
    none = np.zeros_like(some)
    if not some.any():
        return none
    batches, run = _trials(net, width, empty), apply_backbone(net, width)

    def features(chosen: np.ndarray, sign: float) -> list[np.ndarray]:
        weights = ownership.select(shown, _with_sparks(start, sparks, chosen, sign))
        return [whole(leaf) for x in batches for leaf in jax.tree.leaves(run(weights, local, x))]

    with full_precision():
        before = features(none, 1.0)

        def kept(chosen: np.ndarray) -> bool:
            return all(_alike(before, features(chosen, sign)) for sign in (1.0, -1.0))

        if kept(some):
            return some
        places = np.arange(some.size)
        alone = np.asarray([bool(lit) and kept(places == place) for place, lit in enumerate(some)])
        return alone if kept(alone) else none


def _trials(net: Net, width: float, empty: Sequence[np.ndarray]) -> list[Tree]:
    """Return drawn inputs, and the same with the numbers of empty rows as integers.

    They have `_ROWS` examples, or as many as the sample has where the model takes no other number.
    """
    size = sum(leaf.size for leaf in jax.tree.leaves(net.sample)) // batch_size(net.sample)
    x = trial_batch(net, width, min(max(_NUMBERS // max(size, 1), _ROWS[0]), _ROWS[1]))

    def numbered(leaf: np.ndarray, rows: np.ndarray) -> np.ndarray:
        integers = jnp.issubdtype(leaf.dtype, jnp.integer)
        return np.resize(rows, leaf.shape).astype(leaf.dtype) if integers else leaf

    return [x, *(jax.tree.map(lambda leaf, rows=rows: numbered(leaf, rows), x) for rows in empty)]


def _alike(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> bool:
    """Return whether features are equal up to rounding; False where none of them is finite."""
    pairs = [(old, new, jnp.issubdtype(old.dtype, jnp.inexact)) for old, new in zip(before, after, strict=True)]
    numbers = [old for old, _, inexact in pairs if inexact]
    if numbers and not any(np.isfinite(as_complex(old)).any() for old in numbers):
        return False
    return all(_close(old, new) if inexact else np.array_equal(old, new) for old, new, inexact in pairs)


def _close(old: np.ndarray, new: np.ndarray) -> bool:
    before, after = as_complex(old), as_complex(new)
    known = np.isfinite(before)
    same = np.array_equal(before[~known], after[~known], equal_nan=True)
    limit = relative_limit(old.dtype, _ALIKE) * (largest(before[known]) or 1.0)
    return same and largest(after[known] - before[known]) <= limit  # False for NaN


@jax.jit
def _empty_leaves(shared: Tree, owner: Tree) -> jax.Array:
    """Return per leaf whether all its weights are free and 0; bool of shape (leaves,)."""
    pairs = zip(jax.tree.leaves(shared), jax.tree.leaves(owner), strict=True)
    return jnp.stack([jnp.all((w == 0) & (o == ownership.FREE)) for w, o in pairs])


@jax.jit
def _redraw(shared: Tree, owner: Tree, drawn: Tree, leaves: jax.Array) -> Tree:
    """Give zero free weights of the marked leaves their drawn value."""
    chosen = jax.tree.unflatten(jax.tree.structure(shared), list(leaves))
    return jax.tree.map(
        lambda w, o, new, leaf: jnp.where((o == ownership.FREE) & (w == 0) & leaf, new, w), shared, owner, drawn, chosen
    )
