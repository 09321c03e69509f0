"""Initial values of the weights that a new task claims: preserving the older function, zeros, or newly drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.caching import Cache
from pae_jax.checks import is_traced
from pae_jax.core import ownership
from pae_jax.core.spread_arrays import whole
from pae_jax.core.state import State
from pae_jax.errors import ArgumentError
from pae_jax.nets import Net, features_function, input_sizes
from pae_jax.trees import PARAMS, Tree, flatten, merge
from pae_jax.widening import find_influence, trace

WeightInit = Literal["preserve", "zeros", "fresh"]
WEIGHT_INITS: tuple[str, ...] = get_args(WeightInit)
_TRACES = Cache(8)
_SPARK = 2.0**-24
"""Scale of the weights into a channel that no older weight feeds but older weights read: a rounding error of what it
computes. At exactly 0 a rectifier has no gradient, and the channel would never learn."""


def starting_weights(net: Net, state: State, key: jax.Array, weight_init: WeightInit, sharing: str) -> Tree:
    """Return the shared weights with the initial values of the free ones, as described in `pae.pack`.

    Args:
      net: the network description.
      state: the network before the task.
      key: random key for drawn values.
      weight_init: "preserve", "zeros" or "fresh".
      sharing: which older weights the new task sees.
    """
    if weight_init == "preserve" and state.tasks:
        return _preserved(net, state, key, sharing)
    fresh = weight_init == "fresh"
    restart = _empty_leaves(state.shared, state.owner)
    if not is_traced(restart):
        untouched = not state.tasks and not np.asarray(restart).all()  # its zeros are the model's initial values
        if untouched or (not fresh and not np.asarray(restart).any()):
            return state.shared
    return _redraw(state.shared, state.owner, net.initial(key, state.width)[0], restart | fresh)


def _preserved(net: Net, state: State, key: jax.Array, sharing: str) -> Tree:
    """Draw the free weights that cannot change the features, and set all others to 0."""
    if is_traced(state):
        raise ArgumentError(
            "weight_init='preserve' looks at values, which a traced function does not have; call pack outside jit, or "
            "with weight_init='zeros' or 'fresh'"
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
    return _draw_harmless(state.shared, state.owner, drawn, harmless, nonzero)


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
def _draw_harmless(shared: Tree, owner: Tree, drawn: Tree, harmless: Tree, nonzero: Tree) -> Tree:
    def leaf(w: jax.Array, o: jax.Array, new: jax.Array, allowed: jax.Array, seen: jax.Array) -> jax.Array:
        start = jnp.where(w == 0, new, w)
        unfed = ~seen.any(axis=tuple(range(seen.ndim - 1)), keepdims=True)
        start = jnp.where(allowed, start, jnp.where(unfed, start * _SPARK, jnp.zeros((), w.dtype)))
        return jnp.where(o == ownership.FREE, start.astype(w.dtype), w)

    return jax.tree.map(leaf, shared, owner, drawn, harmless, nonzero)


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
