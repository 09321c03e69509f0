"""`widen_maps`: compute the maps between the variables of two traced functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.errors import ArgumentError, StructureError
from pae_jax.trees import PARAMS, flatten
from pae_jax.widening import programs
from pae_jax.widening.axismaps import ArrayMap, AxisMap
from pae_jax.widening.maps import WidenMaps
from pae_jax.widening.ranges import NOT_NEGATIVE, UNKNOWN, ZERO, Range
from pae_jax.widening.terms import Clash, Term, given, index_map, opened
from pae_jax.widening.trees import skeleton
from pae_jax.widening.values import Reason, Value, unchanged
from pae_jax.widening.walk import Notes, walk

Overrides = Mapping[str, Mapping[int, Sequence[int]]]


def widen_maps(
    narrow_fn: Callable[..., Any],
    narrow_vars: Any,
    wide_fn: Callable[..., Any],
    wide_vars: Any,
    *sample: Any,
    overrides: Overrides | None = None,
) -> WidenMaps:
    """Find the positions of a narrow network's weights in a wider build of the same architecture.

    Both functions are traced (nothing is computed or compiled) and compared operation by operation; the operations
    determine the index maps of all axes. With the narrow variables put into the wide tree by these maps, the wide
    function returns the narrow function's outputs, at the positions given by `maps.outputs`, up to summation order, for
    any input, provided that

    - new entries of weights are 0: of floating leaves of two or more axes (where the variables have a collection
      "params": of those in it), and of every integer or boolean leaf (owners, masks),
    - new entries of the local leaves, which are all others (biases, norm scales, offsets and statistics), are finite
    and not negative, such as the usual initial values 0 and 1, except that new entries of `maps.zero_leaves` are 0,
    - the narrow function's own intermediate values are finite, apart from -inf of a mask that hides some but never all
    entries of a softmax, and nothing overflows.

    Args:
      narrow_fn: pure function of (variables, *sample); returns any pytree of arrays.
      narrow_vars: its variables; a pytree of arrays or `jax.ShapeDtypeStruct`.
      wide_fn: the same architecture, built wider.
      wide_vars: its variables; same key paths and ranks, no axis shorter.
      *sample: example inputs of both functions, concrete or abstract.
      overrides: leaf path -> {axis: positions}, explicit maps of single axes: narrow coordinate i sits at positions[i].
    Returns: the maps; `maps.report` lists the places, if any, where the function cannot be preserved, in the order of
      the program: the first one is the cause of those that follow from it.
    Raises:
      StructureError: the two are not the same architecture, or an axis shrinks.
      ArgumentError: an override that is not a valid index map of its axis.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def apply(v, x):
      ...     h = jax.nn.relu(x @ v["a"])
      ...     return jnp.concatenate([h, x], -1) @ v["b"]
      >>> def variables(hidden):
      ...     shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
      ...     return {"a": shape(3, hidden), "b": shape(hidden + 3, 2)}
      >>> maps = widen_maps(apply, variables(2), apply, variables(4), jnp.ones((1, 3)))
      >>> maps.preserved
      True
      >>> maps["b"].axes[0].index.tolist()  # the two old hidden units, then x after the four wide ones
      [0, 1, 4, 5, 6]
    """
    narrow, wide = flatten(narrow_vars), flatten(wide_vars)
    _same_tree(narrow, wide)
    leaves = _leaf_axes(narrow, wide, _checked(overrides or {}, narrow, wide))
    programs_ = (programs.trace(narrow_fn, narrow_vars, *sample), programs.trace(wide_fn, wide_vars, *sample))
    inputs = [unchanged(tuple(np.shape(x))) for x in jax.tree.leaves(sample)]
    shape = skeleton(programs_[0].outputs)
    if shape != skeleton(programs_[1].outputs):
        raise StructureError("outputs of the wide function", "", skeleton(programs_[1].outputs), shape)

    zero: frozenset[str] = frozenset()
    while True:
        # Unification modifies the terms, so every round starts from fresh ones.
        terms = {path: make() for path, make in leaves.items()}
        arguments = [
            Value(axes, UNKNOWN, ZERO if path in zero else _new_entries(path, narrow), leaf=path)
            for path, axes in terms.items()
        ]
        notes = Notes()
        outputs = walk(programs_[0].body, programs_[1].body, [*arguments, *inputs], notes)
        reasons = frozenset[Reason]().union(*(value.reasons for value in outputs))
        if not reasons or notes.blame <= zero:
            break
        zero |= notes.blame  # with 0 as new entries of these, the function may be preserved

    return WidenMaps(
        leaves=tuple((path, _array_map(axes)) for path, axes in terms.items()),
        output_maps=tuple(_array_map(value.axes) for value in outputs),
        output_skeleton=shape,
        reasons=tuple(sorted(reasons, key=lambda reason: (notes.order.get(reason, len(notes.order)), str(reason)))),
        zero_leaves=tuple(sorted(zero)) if not reasons else (),
    )


def _new_entries(path: str, leaves: Mapping[str, Any]) -> Range:
    """Range of the values allowed at the new coordinates of a leaf."""
    if starts_at_zero(path, leaves[path], any(name.startswith(f"{PARAMS}/") for name in leaves)):
        return ZERO
    return dataclasses.replace(NOT_NEGATIVE, leaves=frozenset({path}))


def starts_at_zero(path: str, leaf: Any, has_params: bool = True) -> bool:
    """Return whether new entries of a leaf are 0 by the assumptions of `widen_maps`: those of weights, owners, masks.

    Args:
      path: of the leaf in the variables.
      leaf: an array, concrete or abstract.
      has_params: whether the variables have a collection "params".
    """
    local = len(leaf.shape) < 2 or (has_params and not path.startswith(f"{PARAMS}/"))
    return not (local and jnp.issubdtype(leaf.dtype, jnp.inexact))


def _same_tree(narrow: Mapping[str, Any], wide: Mapping[str, Any]) -> None:
    for path in (*narrow, *wide):
        if path not in wide:
            raise StructureError("wide variables", path, "no such leaf", "the leaves of the narrow variables")
        if path not in narrow:
            raise StructureError("wide variables", path, "a leaf", "none: the narrow variables have no such leaf")
    if list(narrow) != list(wide):
        raise StructureError("wide variables", "", "leaves in another order", "the order of the narrow variables")
    for path, n in narrow.items():
        w = wide[path]
        if len(n.shape) != len(w.shape):
            expected = f"{len(n.shape)} axes as in {tuple(n.shape)}"
            raise StructureError("wide variables", path, f"shape {tuple(w.shape)}", expected)
        if n.dtype != w.dtype:
            raise StructureError("wide variables", path, w.dtype, n.dtype)
        if any(a > b for a, b in zip(n.shape, w.shape, strict=True)):
            raise StructureError(
                "wide variables", path, f"shape {tuple(w.shape)}", f"at least {tuple(n.shape)}",
                "A network can only grow: no axis may be shorter than before.",
            )  # fmt: skip


def _checked(overrides: Overrides, narrow: Mapping[str, Any], wide: Mapping[str, Any]) -> dict[tuple[str, int], Term]:
    terms: dict[tuple[str, int], Term] = {}
    for path, by_axis in overrides.items():
        if path not in narrow:
            raise ArgumentError(f"overrides: no leaf '{path}'; the variables have {', '.join(map(repr, narrow))}.")
        for axis, positions in by_axis.items():
            rank = len(narrow[path].shape)
            if not -rank <= axis < rank:
                raise ArgumentError(f"overrides['{path}']: axis {axis} is outside of a leaf with {rank} axes.")
            n, w = narrow[path].shape[axis], wide[path].shape[axis]
            index = [int(i) for i in positions]
            if len(index) != n or len(set(index)) != n or not all(0 <= i < w for i in index):
                raise ArgumentError(
                    f"overrides['{path}'][{axis}]: found {len(index)} positions {index}, expected {n} different ones "
                    f"in [0, {w})."
                )
            try:
                terms[path, axis % rank] = given(index, w)
            except Clash as clash:
                raise ArgumentError(f"overrides['{path}'][{axis}]: {clash}.") from clash
    return terms


def _leaf_axes(
    narrow: Mapping[str, Any], wide: Mapping[str, Any], explicit: Mapping[tuple[str, int], Term]
) -> dict[str, Callable[[], tuple[Term, ...]]]:
    def maker(path: str) -> Callable[[], tuple[Term, ...]]:
        sizes = list(zip(narrow[path].shape, wide[path].shape, strict=True))
        return lambda: tuple(explicit.get((path, i)) or opened(n, w) for i, (n, w) in enumerate(sizes))

    return {path: maker(path) for path in narrow}


def _array_map(axes: Sequence[Term]) -> ArrayMap:
    return ArrayMap(tuple(AxisMap.of(index_map(axis), axis.w) for axis in axes))
