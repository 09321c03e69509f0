"""Reductions, windows, cumulative operations and sorting."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from pae_jax.widening.ranges import ANYTHING, ZERO, Range, hull, total, unknown
from pae_jax.widening.registry import rule
from pae_jax.widening.rules import softmax
from pae_jax.widening.rules.elementwise import assumed_finite
from pae_jax.widening.steps import KEEP_SIZE, Step
from pae_jax.widening.terms import Copies, Term, copies, resolve
from pae_jax.widening.values import Value

# Whether a reduction over old entries does not change when entries of the range `new` are added.
_NEUTRAL: dict[str, Callable[[Range, Range], bool]] = {
    "reduce_sum": lambda new, old: new.zero,
    "reduce_prod": lambda new, old: new.exact and new.lo == 1,
    "reduce_max": lambda new, old: new.finite and new.hi <= old.lo,
    "reduce_min": lambda new, old: new.finite and new.lo >= old.hi,
    "reduce_and": lambda new, old: new.exact and new.lo == 1,
    "reduce_or": lambda new, old: new.zero,
}
_OVER = "it reduces over an axis growing {n} -> {w} whose new entries would change the result"
_OVER_FIX = (
    "reduce over axes of fixed size; to normalise, use BatchNorm or groups of fixed size; for attention, grow the "
    "number of heads and not what softmax runs over"
)


@rule(*_NEUTRAL)
def reduce(step: Step, operands: Sequence[Value]) -> list[Value]:
    """Growing axes may be reduced only if new entries are neutral."""
    (value,) = operands
    gone = frozenset(step.params["axes"])
    neutral = _NEUTRAL[step.primitive]
    if step.primitive == "reduce_and" and step.narrow.outvars[0].aval.dtype != bool:
        neutral = lambda new, old: False  # noqa: E731
    for i in gone:
        axis = value.axes[i]
        if axis.n == axis.w:
            continue
        # Copies of old entries: more of them change a sum, but not a maximum.
        fresh = value.new if i in value.growing else value.old
        idle = step.primitive in ("reduce_max", "reduce_min", "reduce_and", "reduce_or") and i not in value.growing
        if not (idle or neutral(fresh, value.old)) or (axis.n == 0 and step.primitive in ("reduce_max", "reduce_min")):
            step.refuse(_OVER.format(n=axis.n, w=axis.w), _OVER_FIX, fresh)
    axes = [axis for i, axis in enumerate(value.axes) if i not in gone]
    old = assumed_finite(_combine(step, value.old, math.prod(value.narrow[i] for i in gone)), [value.old])
    new = old
    if value.growing - gone:
        new = _combine(step, value.new, math.prod(value.wide[i] for i in gone))
    result = step.value(0, axes, old, new)
    if step.primitive == "reduce_max":
        return [softmax.after_maximum(value, gone, result)]
    return [softmax.after_sum(value, gone, result)] if step.primitive == "reduce_sum" else [result]


def _is_copies(axis: Term) -> bool:
    return isinstance(resolve(axis), Copies)


def _combine(step: Step, held: Range, count: int) -> Range:
    if step.primitive == "reduce_sum":
        return total(held, count)
    if step.primitive == "reduce_prod":
        inside = 0 <= held.lo and held.hi <= 1
        return hull((held, ZERO)) if inside else unknown(held)
    return held


@rule("argmax", "argmin", "reduce_xor", "reduce", may_differ=("computation",))
def refused_when_growing(step: Step, operands: Sequence[Value]) -> list[Value]:
    """Positions and general reductions: fixed axes only."""
    gone = frozenset(step.params.get("axes", step.params.get("dimensions", ())))
    arrays = operands[: len(step.narrow.outvars)]
    results = []
    for index, value in enumerate(arrays):
        for i in gone:
            axis = value.axes[i]
            if axis.n != axis.w:
                step.refuse(_OVER.format(n=axis.n, w=axis.w), _OVER_FIX)
        axes = _shared(step, arrays, [i for i in range(len(value.axes)) if i not in gone])
        results.append(step.value(index, axes, unknown(), unknown() if step.primitive[:3] == "arg" else ANYTHING))
    return results


def _shared(step: Step, arrays: Sequence[Value], which: Sequence[int]) -> list[Term]:
    """Axes that several operands have in common."""
    axes = []
    for i in which:
        solid = [v.axes[i] for v in arrays if not _is_copies(v.axes[i])]
        for term in solid[1:]:
            step.unify(solid[0], term, "the operands")
        axes.append(solid[0] if solid else copies(arrays[0].axes[i].n, arrays[0].axes[i].w))
    return axes


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def cumulative(step: Step, operands: Sequence[Value]) -> list[Value]:
    """Cumulative operations along an axis of fixed size."""
    (value,) = operands
    axis = value.axes[step.params["axis"]]
    if axis.n != axis.w:
        step.refuse(f"it accumulates along an axis growing {axis.n} -> {axis.w}", KEEP_SIZE)
    if step.primitive == "cumsum":
        ranges = [hull((r, total(r, axis.n))) for r in (value.old, value.new)]
    elif step.primitive in ("cummax", "cummin"):
        ranges = [value.old, value.new]
    else:
        ranges = [unknown(value.old), unknown(value.new)]
    return [step.value(0, value.axes, *ranges)]


@rule("sort")
def sort(step: Step, operands: Sequence[Value]) -> list[Value]:
    """Sorting along an axis of fixed size moves operands together."""
    along = step.params["dimension"]
    for value in operands:
        axis = value.axes[along]
        if axis.n != axis.w:
            step.refuse(f"it sorts along an axis growing {axis.n} -> {axis.w}", KEEP_SIZE)
            break
    axes = _shared(step, operands, range(len(operands[0].axes)))
    # A broadcast operand is reordered by the others, so its new cells may be any of its old ones.
    return [step.value(i, axes, v.old, hull((v.new, v.old))) for i, v in enumerate(operands)]


@rule("top_k", "approx_top_k")
def top_k(step: Step, operands: Sequence[Value]) -> list[Value]:
    """The largest entries along an axis of fixed size."""
    (value,) = operands
    along = int(step.params.get("axis", step.params.get("reduction_dimension", -1))) % len(value.axes)
    if value.axes[along].n != value.axes[along].w:
        axis = value.axes[along]
        step.refuse(f"it picks the largest entries of an axis growing {axis.n} -> {axis.w}", KEEP_SIZE)
    results = []
    for index, (old, new) in enumerate(((value.old, value.new), (unknown(), unknown()))):
        narrow, wide = step.shapes(index)
        axes = list(value.axes)
        axes[along] = step.open_axis(narrow[along], wide[along])
        results.append(step.value(index, axes, old, new))
    return results


@rule(
    "reduce_window_max", "reduce_window_min", "reduce_window_sum", "reduce_window", may_differ=("window_dimensions",)
)  # fmt: skip
def windows(step: Step, operands: Sequence[Value]) -> list[Value]:
    """Pooling: the window may not cover a growing axis."""
    value = operands[0]
    params, wide_params = step.narrow.params, step.wide.params
    rank = len(value.axes)
    ones = (1,) * rank
    axes: list[Term] = []
    narrow, wide = step.shapes(0)
    empty = False
    for i, axis in enumerate(value.axes):
        window = params["window_dimensions"][i]
        lo, hi = params["padding"][i]
        steps = [(params.get(k) or ones)[i] for k in ("window_strides", "base_dilation", "window_dilation")]
        idle = window == 1 and (lo, hi) == (0, 0) and steps == [1, 1, 1]
        if window != wide_params["window_dimensions"][i]:
            step.refuse(
                f"its window is {window} in the narrow and {wide_params['window_dimensions'][i]} in the wide network",
                "give the window a size that does not depend on the width",
            )
        if idle and window == wide_params["window_dimensions"][i]:
            axes.append(axis)
            continue
        empty |= max(lo, hi) >= window or steps[1:] != [1, 1]  # a window may be entirely in the padding
        if axis.n != axis.w:
            step.refuse(f"its window covers an axis growing {axis.n} -> {axis.w}", "pool over axes of fixed size only")
        axes.append(step.open_axis(narrow[i], wide[i]))
    size = math.prod(params["window_dimensions"])
    old, new = (_window_range(step.primitive, r, size, empty) for r in (value.old, value.new))
    old = dataclasses.replace(old, finite=value.old.finite)
    same = len(operands) == 1 or all(v.unchanged for v in operands[1:])
    if not same:
        step.refuse("it pools several growing arrays together", KEEP_SIZE)
    return [step.value(index, axes, old, new) for index in range(len(step.narrow.outvars))]


def _window_range(primitive: str, cells: Range, size: int, empty: bool) -> Range:
    if primitive == "reduce_window_sum":
        return total(hull((cells, ZERO)), size) if not cells.zero else cells
    if primitive in ("reduce_window_max", "reduce_window_min") and not empty:
        return cells
    return dataclasses.replace(ANYTHING, leaves=cells.leaves)
