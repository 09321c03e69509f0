"""How operations carry marks from their result back to their operands; see `influence`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pae_jax.widening.programs import Equation

Mark = np.ndarray
"""A bool per entry of an array, with an axis of size 1 for all entries of a longer axis alike."""
Known = np.ndarray | None
"""Where a value may differ from 0, in full shape; None where nothing is known."""
Rule = Callable[[Equation, list[Known], Mark], Sequence[Mark | None] | None]
"""Marks of the operands by those of the result; None where nothing can be said."""


def _any(mark: Mark, axes: Sequence[int]) -> Mark:
    """Reduce the mark to one entry along some axes, by any."""
    return np.any(mark, axis=tuple(axes), keepdims=True)


def every(var: Any) -> Mark:
    return np.ones((1,) * len(var.aval.shape), bool)


def _narrowed(out: Mark, shape: Sequence[int], whole: Sequence[int]) -> Mark:
    """Return the mark of an operand that was broadcast from a shape."""
    if len(shape) != len(whole):
        return np.full((1,) * len(shape), out.any())
    axes = tuple(i for i, (n, w) in enumerate(zip(shape, whole, strict=True)) if n != w)
    return _any(out, axes)


def spread(mark: np.ndarray, places: Sequence[int], rank: int) -> np.ndarray:
    shape = [1] * rank
    for axis, place in enumerate(places):
        shape[place] = mark.shape[axis]
    return mark.reshape(shape)


def cut_out(params: Mapping[str, Any]) -> tuple[slice, ...]:
    strides = params["strides"] or (1,) * len(params["start_indices"])
    return tuple(map(slice, params["start_indices"], params["limit_indices"], strides))


def joined(outs: Sequence[Mark], axis: int, sizes: Sequence[int]) -> Mark:
    """Return the mark of an array from those of the pieces it was split into."""
    rest = np.broadcast_shapes(*([1 if i == axis else n for i, n in enumerate(mark.shape)] for mark in outs))
    whole = [[size if i == axis else n for i, n in enumerate(rest)] for size in sizes]
    return np.concatenate([np.broadcast_to(mark, shape) for mark, shape in zip(outs, whole, strict=True)], axis=axis)


def pointwise(equation: Equation, known: list[Known], out: Mark) -> Sequence[Mark | None]:
    marks: list[Mark | None] = [
        _narrowed(out, var.aval.shape, equation.outvars[0].aval.shape) for var in equation.invars
    ]
    if equation.primitive.name == "mul" and (known[0] is None) != (known[1] is None):
        generic, zero = (0, 1) if known[0] is None else (1, 0)
        factor = known[zero]
        assert factor is not None
        shape = equation.outvars[0].aval.shape
        passed = out & (factor if factor.ndim == len(shape) else factor.reshape((1,) * len(shape)))
        marks[generic] = _narrowed(passed, equation.invars[generic].aval.shape, shape)
    return marks


def _transpose(equation: Equation, known: list[Known], out: Mark) -> Sequence[Mark | None]:
    return [out.transpose(np.argsort(equation.params["permutation"]))]


def _broadcast(equation: Equation, known: list[Known], out: Mark) -> Sequence[Mark | None]:
    places = equation.params["broadcast_dimensions"]
    shape, whole = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    lost = [i for i in range(len(whole)) if i not in places]
    lost += [place for axis, place in enumerate(places) if shape[axis] != whole[place]]
    kept = _any(out, lost)
    order = [*places, *(i for i in range(len(whole)) if i not in places)]
    mark = kept.transpose(order).reshape([kept.shape[place] for place in places])
    return [mark, *(every(var) for var in equation.invars[1:])]


def _reshape(equation: Equation, known: list[Known], out: Mark) -> Sequence[Mark | None] | None:
    if equation.params.get("dimensions"):
        return None
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    target, rows = [], []  # for each group of axes: the mark's own sizes before, and its full sizes after
    i = j = 0
    while i < len(before) or j < len(after):
        start, begin = i, j
        a = b = 1
        while True:
            if i < len(before) and (a <= b or j >= len(after)):
                a, i = a * before[i], i + 1
            elif j < len(after):
                b, j = b * after[j], j + 1
            if a == b and (i > start or j > begin):
                break
        whole = all(size == 1 for size in out.shape[begin:j])
        same = before[start:i] == after[begin:j]
        rows += out.shape[begin:j] if whole or same else after[begin:j]
        target += [1] * (i - start) if whole else (out.shape[begin:j] if same else before[start:i])
    return [np.broadcast_to(out, rows).reshape(target)]


def _squeeze(equation: Equation, known: list[Known], out: Mark) -> Sequence[Mark | None]:
    return [np.expand_dims(out, tuple(equation.params["dimensions"]))]


def _reduce(equation: Equation, known: list[Known], out: Mark) -> Sequence[Mark | None]:
    axes = equation.params["axes"]
    return [np.expand_dims(out, tuple(axes))]


def _along(equation: Equation, known: list[Known], out: Mark) -> Sequence[Mark | None]:
    """Cumulative operations: every entry of an axis reaches every other entry of it."""
    return [_any(out, [equation.params["axis"]])]


def _window(equation: Equation, known: list[Known], out: Mark) -> Sequence[Mark | None]:
    axes = tuple(i for i, size in enumerate(equation.params["window_dimensions"]) if size != 1)
    strides = equation.params.get("window_strides") or ()
    axes += tuple(i for i, stride in enumerate(strides) if stride != 1)
    mark = _any(out, list(set(axes)))
    shape, whole = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    odd = tuple(i for i, (n, w) in enumerate(zip(shape, whole, strict=True)) if n != w)
    return [_any(mark, odd), *(every(var) for var in equation.invars[1:])]


def _concatenate(equation: Equation, known: list[Known], out: Mark) -> Sequence[Mark | None]:
    axis, marks, start = equation.params["dimension"], [], 0
    for var in equation.invars:
        size = var.aval.shape[axis]
        marks.append(out if out.shape[axis] == 1 else out.take(range(start, start + size), axis=axis))
        start += size
    return marks


def _slice(equation: Equation, known: list[Known], out: Mark) -> Sequence[Mark | None]:
    shape, whole = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    cut = [n != w for n, w in zip(shape, whole, strict=True)]
    sizes = [n if changed else m for n, changed, m in zip(shape, cut, out.shape, strict=True)]
    mark = np.zeros(sizes, bool)
    places = tuple(
        place if changed else slice(None) for place, changed in zip(cut_out(equation.params), cut, strict=True)
    )
    mark[places] = out
    return [mark]


def _dynamic_slice(equation: Equation, known: list[Known], out: Mark) -> Sequence[Mark | None]:
    shape, whole = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return [_narrowed(out, shape, whole), *(every(var) for var in equation.invars[1:])]


def _pad(equation: Equation, known: list[Known], out: Mark) -> Sequence[Mark | None]:
    places, axes = [], []
    for axis, (low, high, inside) in enumerate(equation.params["padding_config"]):
        plain = low >= 0 and high >= 0 and not inside and out.shape[axis] != 1
        places.append(slice(low, low + equation.invars[0].aval.shape[axis]) if plain else slice(None))
        if not plain:
            axes.append(axis)
    return [_any(out, axes)[tuple(places)], np.asarray(out.any())]


def _reverse(equation: Equation, known: list[Known], out: Mark) -> Sequence[Mark | None]:
    return [np.flip(out, equation.params["dimensions"])]


def _gather(equation: Equation, known: list[Known], out: Mark) -> Sequence[Mark | None]:
    """Operand axes that are read as a whole keep their marks."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    operand, indices = equation.invars
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    windows = [i for i in range(len(sizes)) if i not in numbers.collapsed_slice_dims and i not in batching]
    mark = every(operand)
    whole = {axis: place for axis, place in zip(windows, numbers.offset_dims, strict=True)}
    whole = {axis: place for axis, place in whole.items() if sizes[axis] == operand.aval.shape[axis]}
    shape = [1] * mark.ndim
    lost = tuple(i for i in range(out.ndim) if i not in whole.values())
    kept = np.asarray(out.any(axis=lost))  # the offset axes are in increasing order, as are the windows
    for size, axis in zip(kept.shape, whole, strict=True):
        shape[axis] = size
    return [kept.reshape(shape), every(indices)]


def _dot_general(equation: Equation, known: list[Known], out: Mark) -> Sequence[Mark | None]:
    (left, right), (left_batch, right_batch) = equation.params["dimension_numbers"]
    ranks = [len(var.aval.shape) for var in equation.invars]
    batch = len(left_batch)
    free = [
        [i for i in range(rank) if i not in used]
        for rank, used in zip(ranks, ((*left, *left_batch), (*right, *right_batch)), strict=True)
    ]
    shape = out.shape
    out = out.reshape(*shape[:batch], math.prod(shape[batch : batch + len(free[0])]), -1)
    own = [shape[batch : batch + len(free[0])], shape[batch + len(free[0]) :]]
    one = (known[0] is None) != (known[1] is None)
    marks: list[Mark | None] = []
    for side, contracted, batched in ((0, left, left_batch), (1, right, right_batch)):
        seen, other = out if side == 0 else out.swapaxes(-1, -2), known[1 - side]
        other_axes = (right, right_batch) if side == 0 else (left, left_batch)
        sizes: list[int]
        if one and other is not None:
            moved = other.transpose([*other_axes[1], *free[1 - side], *other_axes[0]])
            kept = moved.shape[batch + len(free[1 - side]) :]
            table = moved.reshape(*moved.shape[:batch], -1, math.prod(kept))
            if seen.shape[-1] != table.shape[-2]:
                seen = _columns(seen, own[1 - side], moved, batch, len(free[1 - side]))
            mark = np.matmul(seen.astype(np.float32), table.astype(np.float32)) > 0
            sizes = list(kept)
        else:
            mark, sizes = _any(seen, [-1]), [1] * len(contracted)
        mark = mark.reshape(*mark.shape[:batch], *own[side], *sizes)
        order = [*batched, *free[side], *contracted]
        marks.append(mark.transpose(np.argsort(order)))
    return marks


def _columns(seen: Mark, own: Sequence[int], moved: np.ndarray, batch: int, count: int) -> Mark:
    """Expand the marks of a side's free axes to full size, to match the entries of its other operand."""
    rows = seen.reshape(*seen.shape[:-1], *own)
    whole = np.broadcast_to(rows, (*seen.shape[:-1], *moved.shape[batch : batch + count]))
    return whole.reshape(*seen.shape[:-1], -1)


def _convolution(equation: Equation, known: list[Known], out: Mark) -> Sequence[Mark | None] | None:
    params = equation.params
    if params.get("batch_group_count", 1) != 1:
        return None
    spec, groups = params["dimension_numbers"], params["feature_group_count"]
    kernel = equation.invars[1].aval.shape
    channels, inputs = kernel[spec.rhs_spec[0]], kernel[spec.rhs_spec[1]]
    seen = np.broadcast_to(out.any(axis=tuple(i for i in range(out.ndim) if i != spec.out_spec[1])), (channels,))
    weight = known[1] if known[0] is None else None
    if weight is None:
        weight = np.ones(kernel, bool)
    table = weight.any(axis=tuple(spec.rhs_spec[2:]))
    table = table if spec.rhs_spec[0] < spec.rhs_spec[1] else table.T
    passed = (table & seen[:, None]).reshape(groups, channels // groups, inputs).any(axis=1).reshape(-1)
    image, filters = [1] * out.ndim, [1] * out.ndim
    image[spec.lhs_spec[1]], filters[spec.rhs_spec[0]] = groups * inputs, channels
    return [passed.reshape(image), seen.reshape(filters)]


RULES: dict[str, Rule] = {
    "transpose": _transpose, "broadcast_in_dim": _broadcast, "reshape": _reshape, "squeeze": _squeeze,
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"), _reduce),
    **dict.fromkeys(("argmax", "argmin"), _reduce),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _window),
    "concatenate": _concatenate, "slice": _slice, "dynamic_slice": _dynamic_slice, "pad": _pad, "rev": _reverse,
    "gather": _gather, "dot_general": _dot_general, "conv_general_dilated": _convolution,
}  # fmt: skip
