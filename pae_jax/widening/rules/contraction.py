"""Sums of products: dot_general and convolution, plain, grouped and depthwise.

Contracted axes are unified. Along new coordinates of a contracted axis every product must be exactly 0: one side is 0
(new kernel entries are) and the other is finite. Otherwise old results would change.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from pae_jax.widening.ranges import ZERO, Range, hull, multiply, total, unknown
from pae_jax.widening.registry import rule
from pae_jax.widening.rules.unknown import unknown_primitive
from pae_jax.widening.steps import Step
from pae_jax.widening.terms import Copies, Same, Term, copies, factors, grows, product, resolve
from pae_jax.widening.values import Value, subsets


@dataclasses.dataclass(frozen=True)
class Factor:
    """One side of a contraction: its axes by label, and the ranges of its cells."""

    axes: dict[int, Term]
    value: Value

    def at(self, fresh: frozenset[int]) -> Range:
        """Range of the cells that are new along the labels `fresh`."""
        new = any(label in fresh and grows(term) for label, term in self.axes.items())
        return self.value.new if new else self.value.old


@rule("dot_general")
def dot_general(step: Step, operands: Sequence[Value]) -> list[Value]:
    """Batch axes first, then the free ones of the left and of the right side."""
    left, right = operands
    (left_sum, right_sum), (left_batch, right_batch) = step.params["dimension_numbers"]
    pairs = {**dict(zip(right_sum, left_sum, strict=True)), **dict(zip(right_batch, left_batch, strict=True))}
    # Labels: left axes keep their numbers, right axes share their partner's or follow after.
    rank = len(left.axes)
    labels = [pairs.get(i, rank + i) for i in range(len(right.axes))]
    sides = (
        Factor(dict(enumerate(left.axes)), left),
        Factor(dict(zip(labels, right.axes, strict=True)), right),
    )
    free = [i for i in range(rank) if i not in (*left_sum, *left_batch)]
    results = [*left_batch, *free, *(label for label in labels if label >= rank)]
    axes, old, new = contract(step, sides, tuple(left_sum), results, 1)
    return [step.value(0, axes, old, new)]


@rule("conv_general_dilated", may_differ=("feature_group_count", "padding"))
def conv_general_dilated(step: Step, operands: Sequence[Value]) -> list[Value]:
    """Features are (groups, features of a group); both sides share the groups and contract over the rest."""
    left, kernel = operands
    if step.params["batch_group_count"] != 1:
        return unknown_primitive(step, ())
    spec = step.params["dimension_numbers"]
    (batch, feature, *space), (out, inner, *window) = spec.lhs_spec, spec.rhs_spec
    narrow, wide = step.shapes(0)
    for i in window:
        if kernel.axes[i].n != kernel.axes[i].w:
            sizes = [tuple(shape[i] for i in window) for shape in (kernel.wide, kernel.narrow)]
            hint = "Kernel sizes may not change with the width."
            raise step.mismatch(f"a kernel window of {sizes[0]}", sizes[1], hint)
    if step.narrow.params["padding"] != step.wide.params["padding"]:  # after the window, which often determines it
        raise step.mismatch(f"padding={step.wide.params['padding']}", f"padding={step.narrow.params['padding']}")
    if any(left.axes[i].n != left.axes[i].w for i in space):
        step.refuse("the convolution runs over a growing axis", "convolve over axes of fixed size (space, time) only")
    groups = [p["feature_group_count"] for p in (step.narrow.params, step.wide.params)]
    in_axes = _grouped(step, left.axes[feature], (groups[0], groups[1]))
    out_axes = _grouped(step, kernel.axes[out], (groups[0], groups[1]))
    sides = (
        Factor({0: left.axes[batch], 1: in_axes[0], 2: in_axes[1]}, left),
        Factor({1: out_axes[0], 3: out_axes[1], 2: kernel.axes[inner]}, kernel),
    )
    taps = math.prod(kernel.axes[i].n for i in window)
    (batch_axis, *parts), old, new = contract(step, sides, (2,), [0, 1, 3], taps, padded=True)
    solid = [step.open_axis(t.n, t.w) if isinstance(resolve(t), Copies) else t for t in parts]
    if solid != parts:  # a broadcast kernel: its new outputs repeat old ones
        new = hull((new, old))
    axes: list[Term] = [Same(1)] * len(narrow)
    out_batch, out_feature, *out_space = spec.out_spec
    axes[out_batch] = batch_axis
    axes[out_feature] = product(solid)
    for i in out_space:
        axes[i] = step.open_axis(narrow[i], wide[i])
    return [step.value(0, axes, old, new)]


def _grouped(step: Step, axis: Term, groups: tuple[int, int]) -> list[Term]:
    n, w = groups
    sizes = [(n, w), (axis.n // n, axis.w // w)]
    if groups == (1, 1):
        return [Same(1), axis]
    if any(a > b for a, b in sizes):
        found, least = f"{w} groups of {sizes[1][1]}", f"at least {n} groups of {sizes[1][0]}"
        raise step.mismatch(found, least, "A network can only grow.")
    problem = "the groups of the convolution do not follow the order of the features"
    return step.attempt(lambda: factors(axis, sizes), sizes, problem)


def contract(
    step: Step,
    sides: tuple[Factor, Factor],
    summed: Sequence[int],
    results: Sequence[int],
    taps: int,
    padded: bool = False,
) -> tuple[list[Term], Range, Range]:
    """Axes and ranges of a sum of products.

    Args:
      sides: the two factors; a label that both have is one axis.
      summed: labels that are summed over.
      results: labels of the result, in its order.
      taps: further summed cells of fixed size (a convolution's window).
      padded: whether some of them may be padding zeros instead.
    """
    left, right = sides
    for label, axis in left.axes.items():
        if label in right.axes:
            step.unify(axis, right.axes[label], "the two sides of the product")

    def term(label: int) -> Term:
        terms = [side.axes[label] for side in sides if label in side.axes]
        return next((t for t in terms if not isinstance(resolve(t), Copies)), terms[0])

    def cell(fresh: frozenset[int]) -> Range:
        return multiply(left.at(fresh), right.at(fresh))

    for fresh in subsets(label for label in summed if term(label).n != term(label).w):
        changed = cell(fresh)
        if not changed.zero:
            _refuse_sum(step, [side.at(fresh) for side in sides], changed)
            break
    growing = [label for label in results if grows(term(label))]
    inside = [frozenset(), *subsets(label for label in summed if grows(term(label)))]
    count = math.prod(term(label).w for label in summed) * taps
    old = unknown(*(side.value.old for side in sides))
    old = dataclasses.replace(old, finite=True) if all(side.value.old.finite for side in sides) else old
    new = old
    if growing:
        cells = hull(cell(fresh | more) for fresh in subsets(growing) for more in inside)
        new = total(hull((cells, ZERO)) if padded and not cells.zero else cells, count)
    return [_axis(term(label)) for label in results], old, new


def _axis(term: Term) -> Term:
    return copies(term.n, term.w) if isinstance(resolve(term), Copies) else term


def _refuse_sum(step: Step, ranges: Sequence[Range], changed: Range) -> None:
    if not any(r.zero for r in ranges):
        step.refuse(
            "it sums over new entries that need not be 0 on either side, which would change old results",
            "contract every growing axis with a kernel (a parameter of 2 or more axes), or keep its size",
            *ranges,
        )
    else:
        step.refuse(
            "new entries may be infinite or not a number here, and 0 times that is not 0",
            "keep them finite: a variance needs an epsilon, a mask a large finite number instead of -inf",
            *ranges,
        )
