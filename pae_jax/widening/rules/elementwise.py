"""Elementwise operations: axes are unified, ranges go through the table of `pointwise`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from pae_jax.widening import pointwise
from pae_jax.widening.ranges import Range, hull, unknown
from pae_jax.widening.registry import rule
from pae_jax.widening.rules import softmax
from pae_jax.widening.steps import Step
from pae_jax.widening.terms import Copies, Term, copies, resolve
from pae_jax.widening.values import Value, subsets

# Index arithmetic that is tracked by value (negative indices, offsets).
_FOLDED = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative, "max": np.maximum, "min": np.minimum,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
    "select_n": lambda which, no, yes: np.where(which, yes, no),
    "clamp": lambda lo, x, hi: np.clip(x, lo, hi),
    "convert_element_type": np.asarray,
}  # fmt: skip


@rule(*(name for name in pointwise.POINTWISE if name != "optimization_barrier"))
def elementwise(step: Step, operands: Sequence[Value]) -> list[Value]:
    """One result; operands of rank 0 and axes of size 1 broadcast."""
    narrow, wide = step.shapes(0)
    axes = [_axis(step, operands, i, n, w) for i, (n, w) in enumerate(zip(narrow, wide, strict=True))]
    old = assumed_finite(_range(step, [value.old for value in operands]), [value.old for value in operands])
    growing = frozenset().union(*(value.growing for value in operands))
    new = hull(_new_range(step, operands, fresh) for fresh in subsets(growing)) if growing else old
    result = step.value(0, axes, old, new, content=_fold(step, operands, (narrow, wide)))
    return [softmax.after_elementwise(step, operands, result)]


@rule("optimization_barrier", "sharding_constraint", "mesh_cast", "device_put", "pvary", "reshard")
def unchanged_operands(step: Step, operands: Sequence[Value]) -> list[Value]:
    """Results are the operands."""
    return list(operands)


def assumed_finite(result: Range, operands: Sequence[Range]) -> Range:
    """Old entries are those of the narrow network, whose values are assumed to be finite."""
    if result.finite or not all(operand.finite for operand in operands):
        return result
    return dataclasses.replace(result, finite=True)


def _range(step: Step, operands: Sequence[Range]) -> Range:
    dtype = step.narrow.outvars[0].aval.dtype
    same = step.primitive == "mul" and step.operands[0] is step.operands[1]
    if same:
        return pointwise.apply("square", step.params, dtype, (operands[0],))
    return pointwise.apply(step.primitive, step.params, dtype, tuple(operands))


def _new_range(step: Step, operands: Sequence[Value], fresh: frozenset[int]) -> Range:
    """Range of the cells that are new along the axes `fresh`.

    A divisor that does not grow also divides old entries, which stay finite, so none of its entries is 0.
    """
    ranges = [value.at(fresh) for value in operands]
    result = _range(step, ranges)
    shared = step.primitive == "div" and not operands[1].growing and all(step.shapes(0)[0])
    if shared and not result.finite and all(known.finite for known in ranges):
        return ranges[0] if ranges[0].zero else unknown(*ranges)
    return result


def _axis(step: Step, operands: Sequence[Value], i: int, n: int, w: int) -> Term:
    terms = []
    for value in operands:
        if not value.axes:
            continue
        axis = value.axes[i]
        if (axis.n, axis.w) == (n, w):
            terms.append(axis)
        elif (axis.n, axis.w) != (1, 1):
            step.refuse(
                f"an operand of sizes {axis.n} -> {axis.w} broadcasts to {n} -> {w} in one of the two programs only",
                "give the axis more than one entry in the narrow network, or write the broadcast out",
            )
    solid = [term for term in terms if not isinstance(resolve(term), Copies)]
    for term in solid[1:]:
        step.unify(solid[0], term, "the operands")
    return solid[0] if solid else copies(n, w)


def _fold(
    step: Step, operands: Sequence[Value], shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> tuple[np.ndarray, np.ndarray] | None:
    contents = [value.content for value in operands]
    if any(content is None for content in contents):
        return None
    dtype = step.narrow.outvars[0].aval.dtype
    fold = _FOLDED.get(step.primitive)
    if fold is None or len(contents) > 3 or np.dtype(dtype).kind not in "iub":
        return None
    with np.errstate(all="ignore"):
        pair = [np.broadcast_to(fold(*(c[k] for c in contents if c)), shapes[k]).astype(dtype) for k in (0, 1)]
    return pair[0], pair[1]
