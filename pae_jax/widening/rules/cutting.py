"""Operations that cut and join along axes: concatenate, slice, split, pad, dynamic slices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pae_jax.widening.ranges import Range, hull
from pae_jax.widening.registry import rule
from pae_jax.widening.steps import KEEP_SIZE, Step
from pae_jax.widening.terms import Copies, Same, Term, copies, cut, joined, product, resolve
from pae_jax.widening.values import Value

_CUT = "the cut does not separate old entries as it does in the narrow network"


@rule("concatenate")
def concatenate(step: Step, operands: Sequence[Value]) -> list[Value]:
    """Parts end to end along one axis; the other axes are unified."""
    along = step.params["dimension"]
    narrow, wide = step.shapes(0)
    axes: list[Term] = []
    for i in range(len(narrow)):
        terms = [value.axes[i] for value in operands]
        if i == along:
            # Copies along the joined axis are ordered like any other part; their new entries equal old ones.
            axes.append(joined(step.open_axis(t.n, t.w) if isinstance(resolve(t), Copies) else t for t in terms))
            continue
        solid = [t for t in terms if not isinstance(resolve(t), Copies)]
        for term in solid[1:]:
            step.unify(solid[0], term, "the joined arrays")
        axes.append(solid[0] if solid else copies(narrow[i], wide[i]))
    content = None
    if all(value.content is not None for value in operands):
        content = tuple(np.concatenate([v.content[k] for v in operands if v.content], along) for k in (0, 1))
    old = hull(value.old for value in operands)
    return [step.value(0, axes, old, _new_cells(operands) or old, content=content)]


def _new_cells(operands: Sequence[Value]) -> Range | None:
    """Range of the new cells when operands are concatenated; None if there are no new cells.

    They are new cells of an operand, or, where it is broadcast along a growing axis, old ones.
    """
    held = [value.new for value in operands if value.growing] + [value.old for value in operands if _copied(value)]
    return hull(held) if held else None


@rule("stack")
def stack(step: Step, operands: Sequence[Value]) -> list[Value]:
    """Arrays of one shape along a new axis."""
    along = step.params["axis"] % (len(operands[0].axes) + 1)
    axes: list[Term] = []
    for i in range(len(operands[0].axes)):
        solid = [v.axes[i] for v in operands if not isinstance(resolve(v.axes[i]), Copies)]
        for term in solid[1:]:
            step.unify(solid[0], term, "the stacked arrays")
        axes.append(solid[0] if solid else operands[0].axes[i])
    axes.insert(along, Same(len(operands)))
    old = hull(value.old for value in operands)
    content = None
    if all(value.content is not None for value in operands):
        content = tuple(np.stack([v.content[k] for v in operands if v.content], along) for k in (0, 1))
    return [step.value(0, axes, old, _new_cells(operands) or old, content=content)]


@rule("unstack")
def unstack(step: Step, operands: Sequence[Value]) -> list[Value]:
    """The slices of an array along one axis, each a result."""
    (value,) = operands
    along = step.params["axis"] % len(value.axes)
    rest = [axis for i, axis in enumerate(value.axes) if i != along]
    return [step.value(index, rest, value.old, value.new) for index in range(len(step.narrow.outvars))]


@rule("tile", may_differ=("reps",))
def tile(step: Step, operands: Sequence[Value]) -> list[Value]:
    """Repeats of a whole axis: the product of the axis with the repeats."""
    (value,) = operands
    axes: list[Term] = []
    old = value.old
    held = [value.new] if value.growing else []
    for axis, n, w in zip(value.axes, step.narrow.params["reps"], step.wide.params["reps"], strict=True):
        uniform = isinstance(resolve(axis), Copies) or (axis.n, axis.w) == (1, 1)
        if n > w:
            raise step.mismatch(f"{w} repeats", f"at least {n}", "A network can only grow.")
        if (n, w) == (1, 1):
            axes.append(axis)
        elif uniform:
            axes.append(copies(axis.n * n, axis.w * w))
        else:
            axes.append(product((step.open_axis(n, w), axis)))
            held += [old] if n != w else []
    return [step.value(0, axes, old, hull(held) if held else old)]


@rule("slice", may_differ=("start_indices", "limit_indices", "strides"))
def slice_(step: Step, operands: Sequence[Value]) -> list[Value]:
    """A growing axis is cut at the pair of narrow and wide cut points."""
    (value,) = operands
    rank = len(value.axes)
    bounds = [
        [params["start_indices"], params["limit_indices"], params["strides"] or (1,) * rank]
        for params in (step.narrow.params, step.wide.params)
    ]
    axes = [_slice_axis(step, value.axes[i], *([part[i] for part in bound] for bound in bounds)) for i in range(rank)]
    content = value.content and tuple(
        part[tuple(slice(*s) for s in zip(*bound, strict=True))]
        for part, bound in zip(value.content, bounds, strict=True)
    )
    return [step.value(0, axes, value.old, value.new, content=content)]


def _slice_axis(step: Step, axis: Term, narrow: Sequence[int], wide: Sequence[int]) -> Term:
    """The axis that [start:limit:stride] of each program leaves."""
    n, w = len(range(*narrow)), len(range(*wide))
    if axis.n == axis.w:
        if list(narrow) != list(wide):
            step.refuse(
                f"[{_text(narrow)}] of an axis of fixed size becomes [{_text(wide)}]",
                "derive the cut from sizes that grow with the axis",
            )
        return step.open_axis(n, w)
    if isinstance(resolve(axis), Copies):
        return copies(n, w) if n <= w else step.open_axis(n, w)
    if narrow[2] != 1 or wide[2] != 1:
        step.refuse("a growing axis is read with a stride", KEEP_SIZE)
        return step.open_axis(n, w)
    return cut_out(step, axis, (narrow[0], wide[0]), (n, w))


def cut_out(step: Step, axis: Term, start: tuple[int, int], size: tuple[int, int]) -> Term:
    """The coordinates [start, start + size) of an axis."""

    def make() -> list[Term]:
        _, rest = cut(axis, *start)
        return [cut(rest, *size)[0]]

    return step.attempt(make, [size], _CUT)[0]


def _text(bounds: Sequence[int]) -> str:
    return ":".join(str(int(b)) for b in bounds)


@rule("split", may_differ=("sizes",))
def split(step: Step, operands: Sequence[Value]) -> list[Value]:
    """Consecutive slices along one axis."""
    (value,) = operands
    along = step.params["axis"]
    starts = [[int(s) for s in np.cumsum([0, *p["sizes"]])] for p in (step.narrow.params, step.wide.params)]
    results = []
    for index in range(len(step.narrow.outvars)):
        cuts = [[bounds[index], bounds[index + 1], 1] for bounds in starts]
        axes = [*value.axes]
        axes[along] = _slice_axis(step, value.axes[along], *cuts)
        results.append(step.value(index, axes, value.old, value.new))
    return results


@rule("pad", may_differ=("padding_config",))
def pad(step: Step, operands: Sequence[Value]) -> list[Value]:
    """Padding joins constant entries to an axis; amounts that grow make new entries of the padding value."""
    value, filler = operands
    axes: list[Term] = []
    padded = False
    narrow, wide = step.shapes(0)
    configs = zip(step.narrow.params["padding_config"], step.wide.params["padding_config"], strict=True)
    for i, ((lo_n, hi_n, in_n), (lo_w, hi_w, in_w)) in enumerate(configs):
        axis = value.axes[i]
        same = (lo_n, hi_n, in_n) == (lo_w, hi_w, in_w)
        padded |= (lo_n, hi_n, in_n) != (0, 0, 0) or not same
        if (lo_n, hi_n, in_n) == (0, 0, 0) == (lo_w, hi_w, in_w):
            axes.append(axis)
        elif axis.n == axis.w and same:
            axes.append(Same(narrow[i]))
        elif in_n == 0 == in_w and 0 <= lo_n <= lo_w and 0 <= hi_n <= hi_w:
            solid = step.open_axis(axis.n, axis.w) if isinstance(resolve(axis), Copies) else axis
            axes.append(joined((step.open_axis(lo_n, lo_w), solid, step.open_axis(hi_n, hi_w))))
        else:
            step.refuse("a growing axis is padded inside, cropped, or padded less when wide", KEEP_SIZE)
            axes.append(step.open_axis(narrow[i], wide[i]))
    if not padded:
        return [step.value(0, axes, value.old, value.new)]
    old = hull((value.old, filler.old))
    held = _new_cells((value,))
    return [step.value(0, axes, old, hull((held, filler.old)) if held else filler.old)]


def _copied(value: Value) -> bool:
    return any(isinstance(resolve(axis), Copies) for axis in value.axes)


@rule("dynamic_slice", may_differ=("slice_sizes",))
def dynamic_slice(step: Step, operands: Sequence[Value]) -> list[Value]:
    """Like `slice` where the start is known; at an unknown start only axes of fixed size or whole axes can be read."""
    value, starts = operands[0], operands[1:]
    narrow, wide = step.shapes(0)
    axes = []
    for i, axis in enumerate(value.axes):
        size = (narrow[i], wide[i])
        known = starts[i].content
        if size == (axis.n, axis.w):  # the start clamps to 0
            step.forgive(starts[i])
            axes.append(axis)
        elif axis.n == axis.w and narrow[i] == wide[i]:
            axes.append(step.open_axis(*size))
        elif known is not None:
            step.forgive(starts[i])
            limits = (axis.n - size[0], axis.w - size[1])
            start = [int(np.clip(k, 0, limit)) for k, limit in zip(known, limits, strict=True)]
            axes.append(_slice_axis(step, axis, *([s, s + z, 1] for s, z in zip(start, size, strict=True))))
        else:
            step.refuse("a part of a growing axis is read at a computed position", KEEP_SIZE)
            axes.append(step.open_axis(*size))
    return [step.value(0, axes, value.old, value.new)]


@rule("dynamic_update_slice")
def dynamic_update_slice(step: Step, operands: Sequence[Value]) -> list[Value]:
    """Growing axes must be written whole."""
    value, update, *starts = operands
    axes: list[Term] = []
    for i, (axis, part) in enumerate(zip(value.axes, update.axes, strict=True)):
        if (part.n, part.w) == (axis.n, axis.w):
            step.forgive(starts[i])
            solid = [t for t in (axis, part) if not isinstance(resolve(t), Copies)]
            for term in solid[1:]:
                step.unify(solid[0], term, "the array and what is written into it")
            axes.append(solid[0] if solid else axis)
        elif axis.n == axis.w and part.n == part.w:
            axes.append(axis)
        else:
            step.refuse("a part of a growing axis is overwritten", KEEP_SIZE)
            axes.append(step.open_axis(axis.n, axis.w))
    old = hull((value.old, update.old))
    return [step.value(0, axes, old, _new_cells((value, update)) or old)]
