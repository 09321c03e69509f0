"""Operations that move entries without cutting or computing: reshape, transpose, broadcast, squeeze, reverse, iota."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pae_jax.widening.constants import SMALL
from pae_jax.widening.ranges import Range, hull
from pae_jax.widening.registry import rule
from pae_jax.widening.rules import softmax
from pae_jax.widening.steps import Step
from pae_jax.widening.terms import Copies, Same, Term, copies, factors, given, product, resolve
from pae_jax.widening.values import Value

Sizes = list[tuple[int, int]]


@rule("reshape", may_differ=("new_sizes",))
def reshape(step: Step, operands: Sequence[Value]) -> list[Value]:
    """Runs of axes that multiply to the same sizes in both programs are merged and split again."""
    (value,) = operands
    if step.params.get("dimensions") is not None:
        step.refuse("reshape permutes its operand", "transpose first, then reshape")
    narrow, wide = step.shapes(0)
    outs = list(zip(narrow, wide, strict=True))
    axes: list[Term] = [Same(1)] * len(outs)
    spread = False
    for sources, targets in _groups([(a.n, a.w) for a in value.axes], outs):
        sizes = [outs[j] for j in targets]
        if len(sources) == len(targets) == 1:
            terms = [value.axes[sources[0]]]
        else:
            merged = [value.axes[i] for i in sources]
            spread |= any(isinstance(resolve(term), Copies) for term in merged)
            terms = step.attempt(
                lambda merged=merged, sizes=sizes: factors(product(_spread(step, merged)), sizes),
                sizes,
                "the reshape mixes a growing axis with others",
            )
        for j, term in zip(targets, terms, strict=True):
            axes[j] = term
    new = hull((value.new, value.old)) if spread else value.new
    content = None
    if value.content is not None:
        content = (value.content[0].reshape(narrow), value.content[1].reshape(wide))
    result = step.value(0, axes, value.old, new, content=content)
    kept = tuple(j for j, (n, w) in enumerate(outs) if (n, w) != (1, 1))
    if len(kept) == len(value.axes):
        result = softmax.after_broadcast(value, kept, result)
    return [result]


def _spread(step: Step, terms: Sequence[Term]) -> list[Term]:
    """A broadcast axis that is merged with others becomes an undecided axis whose new entries equal old ones."""
    return [step.open_axis(t.n, t.w) if isinstance(resolve(t), Copies) else t for t in terms]


def _groups(ins: Sizes, outs: Sizes) -> list[tuple[list[int], list[int]]]:
    """Shortest runs of input and output axes with equal products in both programs; axes of size 1 are left out."""
    left = [i for i, size in enumerate(ins) if size != (1, 1)]
    right = [j for j, size in enumerate(outs) if size != (1, 1)]
    groups = []
    while left and right:
        sources, targets = [left.pop(0)], [right.pop(0)]
        while (a := _product(ins, sources)) != (b := _product(outs, targets)):
            if left and (a < b or not right):
                sources.append(left.pop(0))
            elif right:
                targets.append(right.pop(0))
            else:
                raise AssertionError(f"reshape of {ins} to {outs}")
        groups.append((sources, targets))
    for group in groups[-1:]:  # axes remain here only if one has size 0
        group[0].extend(left)
        group[1].extend(right)
    return groups


def _product(sizes: Sizes, which: list[int]) -> tuple[int, int]:
    return math.prod(sizes[i][0] for i in which), math.prod(sizes[i][1] for i in which)


@rule("transpose")
def transpose(step: Step, operands: Sequence[Value]) -> list[Value]:
    """Axes are permuted."""
    (value,) = operands
    order = step.params["permutation"]
    content = value.content and tuple(part.transpose(order) for part in value.content)
    return [step.value(0, [value.axes[i] for i in order], value.old, value.new, content=content)]


@rule("squeeze")
def squeeze(step: Step, operands: Sequence[Value]) -> list[Value]:
    """Axes of size 1 are removed."""
    (value,) = operands
    gone = {d % len(value.axes) for d in step.params["dimensions"]}
    axes = [axis for i, axis in enumerate(value.axes) if i not in gone]
    content = value.content and tuple(part.squeeze(tuple(gone)) for part in value.content)
    return [step.value(0, axes, value.old, value.new, content=content)]


@rule("broadcast_in_dim", may_differ=("shape",))
def broadcast_in_dim(step: Step, operands: Sequence[Value]) -> list[Value]:
    """Old axes keep their maps; the others hold copies."""
    value = operands[0]
    narrow, wide = step.shapes(0)
    dims = tuple(step.params["broadcast_dimensions"])
    axes = [copies(n, w) if n <= w else step.open_axis(n, w) for n, w in zip(narrow, wide, strict=True)]
    for i, axis in zip(dims, value.axes, strict=True):
        if (axis.n, axis.w) == (narrow[i], wide[i]):
            axes[i] = axis
        elif (axis.n, axis.w) != (1, 1):
            step.refuse(
                f"an axis of sizes {axis.n} -> {axis.w} is broadcast in one of the two programs only",
                "give the axis more than one entry in the narrow network",
            )
    content = None
    if value.content is not None and max(math.prod(narrow), math.prod(wide)) <= SMALL:
        content = tuple(
            np.broadcast_to(np.expand_dims(part, [i for i in range(len(shape)) if i not in dims]), shape)
            for part, shape in zip(value.content, (narrow, wide), strict=True)
        )
    result = step.value(0, axes, value.old, value.new, content=content)
    return [softmax.after_broadcast(value, dims, result)]


@rule("rev")
def rev(step: Step, operands: Sequence[Value]) -> list[Value]:
    """Reversing a growing axis would put new entries first, which its map does not allow."""
    (value,) = operands
    for i in step.params["dimensions"]:
        if value.axes[i].n != value.axes[i].w:
            step.refuse(
                f"axis {i} is reversed while it grows {value.axes[i].n} -> {value.axes[i].w}",
                "reverse axes of fixed size only",
            )
    content = value.content and tuple(np.flip(part, step.params["dimensions"]) for part in value.content)
    return [step.value(0, value.axes, value.old, value.new, content=content)]


@rule("iota", may_differ=("shape",))
def iota(step: Step, operands: Sequence[Value]) -> list[Value]:
    """Entries are coordinates, so along the counted axis old entries must stay the leading block."""
    narrow, wide = step.shapes(0)
    counted = step.params["dimension"]
    axes = []
    for i, (n, w) in enumerate(zip(narrow, wide, strict=True)):
        axis = step.open_axis(n, w)
        axes.append(axis if n == w else given(range(n), w) if i == counted else copies(n, w))
    n, w = narrow[counted], wide[counted]
    content = None
    if max(math.prod(narrow), math.prod(wide)) <= SMALL:
        content = tuple(
            np.broadcast_to(
                np.arange(shape[counted]).reshape([-1 if i == counted else 1 for i in range(len(shape))]), shape
            ).astype(step.narrow.outvars[0].aval.dtype)
            for shape in (narrow, wide)
        )
    return [step.value(0, axes, Range(0.0, max(n - 1.0, 0.0)), Range(float(n), max(w - 1.0, n)), content=content)]
