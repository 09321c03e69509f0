"""Gather and scatter: indexed axes keep their size, axes read as a whole keep their map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pae_jax.widening.ranges import anything, hull, unknown
from pae_jax.widening.registry import rule
from pae_jax.widening.rules.cutting import cut_out
from pae_jax.widening.steps import KEEP_SIZE, Step
from pae_jax.widening.terms import Copies, Term, copies, resolve
from pae_jax.widening.values import Value


@rule("gather", may_differ=("slice_sizes",))
def gather(step: Step, operands: Sequence[Value]) -> list[Value]:
    """Result axes come from the indices (batch) and from operand axes that are not collapsed (offset)."""
    value, indices = operands
    numbers = step.params["dimension_numbers"]
    sizes = [p["slice_sizes"] for p in (step.narrow.params, step.wide.params)]
    rank = len(step.shapes(0)[0])
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    offset_axes: list[Term] = []
    batch_axes = list(indices.axes[:-1])
    batching = dict(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True))
    for d, axis in enumerate(value.axes):
        size = (sizes[0][d], sizes[1][d])
        if d in batching:
            step.unify(axis, batch_axes[batching[d]], "the array and its indices")
            if isinstance(resolve(batch_axes[batching[d]]), Copies):
                batch_axes[batching[d]] = axis
        elif d not in numbers.start_index_map:
            term = axis if size == (axis.n, axis.w) else cut_out(step, axis, (0, 0), size)
            offset_axes.extend([] if d in gone else [term])
        elif axis.n == axis.w and size[0] == size[1]:
            offset_axes.extend([] if d in gone else [step.open_axis(*size)])
        elif size == (axis.n, axis.w):  # the start can only be 0
            offset_axes.extend([] if d in gone else [axis])
        else:
            term = _one_known_start(step, axis, indices, numbers, d, size)
            offset_axes.extend([] if d in gone else [term])
    offsets, batches = iter(offset_axes), iter(batch_axes)
    axes = [next(offsets) if i in numbers.offset_dims else next(batches) for i in range(rank)]
    # New index cells may point anywhere in the array, or outside of it.
    astray = any(axis.n != axis.w for axis in batch_axes)
    new = anything(value.old, value.new) if astray else value.new
    if astray and indices.new.lo >= 0 and all(indices.new.hi < value.narrow[d] for d in numbers.start_index_map):
        new = hull((value.old, value.new))
    return [step.value(0, axes, value.old, new)]


def _one_known_start(step: Step, axis: Term, indices: Value, numbers: object, d: int, size: tuple[int, int]) -> Term:
    """Reading a growing axis at one position known for both widths is a cut."""
    column = tuple(numbers.start_index_map).index(d)  # type: ignore[attr-defined]
    if indices.content is not None:
        starts = [np.unique(part[..., column]) for part in indices.content]
        limits = (axis.n - size[0], axis.w - size[1])
        if all(len(s) == 1 and 0 <= s[0] <= limit for s, limit in zip(starts, limits, strict=True)):
            step.forgive(indices)
            return cut_out(step, axis, (int(starts[0][0]), int(starts[1][0])), size)
    step.refuse(f"an axis growing {axis.n} -> {axis.w} is read at computed positions", KEEP_SIZE)
    return step.open_axis(*size)


@rule(
    "scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max", "scatter_add", "scatter_mul"
)
def scatter(step: Step, operands: Sequence[Value]) -> list[Value]:
    """Updates of whole axes keep their map; indexed axes, and those of a batch of scatters, keep their size."""
    value, indices, updates = operands
    numbers = step.params["dimension_numbers"]
    if any(axis.n != axis.w for axis in indices.axes):
        step.refuse("it writes at a growing set of positions", KEEP_SIZE)
        return [step.lost(0)]
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    written = [d for d in range(len(value.axes)) if d not in gone]
    partner = dict(zip(written, numbers.update_window_dims, strict=True))
    axes: list[Term] = []
    for d, axis in enumerate(value.axes):
        part = updates.axes[partner[d]] if d in partner else None
        if axis.n == axis.w and (part is None or part.n == part.w):
            axes.append(axis)
        elif part and (part.n, part.w) == (axis.n, axis.w) and d not in numbers.scatter_dims_to_operand_dims:
            solid = [t for t in (axis, part) if not isinstance(resolve(t), Copies)]
            for term in solid[1:]:
                step.unify(solid[0], term, "the array and what is written into it")
            axes.append(solid[0] if solid else copies(axis.n, axis.w))
        else:
            step.refuse(f"it writes into parts of an axis growing {axis.n} -> {axis.w}", KEEP_SIZE)
            axes.append(step.open_axis(axis.n, axis.w))
    held = [v.new for v in (value, updates)] + [v.old for v in (value, updates) if any(_is_copies(a) for a in v.axes)]
    new = hull(held)
    return [step.value(0, axes, unknown(), new if step.primitive == "scatter" or new.zero else unknown(new))]


def _is_copies(axis: Term) -> bool:
    return isinstance(resolve(axis), Copies)
