"""Links: how an operation connects the coordinates in use of its operands and of its result.

A link makes sure that every entry in use of a result can be computed, to its exact value, from the entries in use of
the operands. Only sums may leave entries out: those with a factor that is known to be 0. What an operation without a
link reads is used whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pae_jax.widening.channels.known import blocks, features
from pae_jax.widening.channels.sets import Sets
from pae_jax.widening.pointwise import POINTWISE
from pae_jax.widening.programs import Equation

Link = Callable[[Equation, Sets], None]


def link(equation: Equation, sets: Sets) -> None:
    """Enlarge the sets of an operation's operands and results until they fit together."""
    if not any(var in sets for var in equation.outvars):
        return
    LINKS.get(equation.primitive.name, _whole)(equation, sets)
    for var in used_operands(equation, sets):
        sets.use(var)
    for var in equation.outvars:
        if var in sets:
            sets.use(var)


def used_operands(equation: Equation, sets: Sets) -> list[Any]:
    """Return the operands that the results in use need: all, but for pieces of a concatenation that are not."""
    if equation.primitive.name != "concatenate":
        return list(equation.invars)
    axis = equation.params["dimension"]
    found = pieces(equation, sets.of(equation.outvars[0])[axis])
    return [var for var, piece in zip(equation.invars, found, strict=True) if piece.any()]


def pieces(equation: Equation, coordinates: np.ndarray) -> list[np.ndarray]:
    """Return which coordinates of each piece of a concatenation are in use, from those of the result."""
    axis = equation.params["dimension"]
    ends = np.cumsum([var.aval.shape[axis] for var in equation.invars])
    return np.split(coordinates, ends[:-1])


def _whole(equation: Equation, sets: Sets) -> None:
    for var in (*equation.invars, *equation.outvars):
        sets.fill(var)


def _alike(equation: Equation, sets: Sets, but: Sequence[int] = ()) -> None:
    """Tie all arrays of one shape, axis by axis; axes in `but` are used whole. Scalars and other shapes stay apart."""
    shape = equation.outvars[0].aval.shape
    arrays = [var for var in (*equation.invars, *equation.outvars) if len(var.aval.shape) == len(shape)]
    for axis in range(len(shape)):
        sizes = {var.aval.shape[axis] for var in arrays}
        if axis in but or len(sizes) > 1:
            for var in arrays:
                sets.fill(var, [axis])
        else:
            sets.tie(*((var, axis) for var in arrays))


def _each(equation: Equation, sets: Sets) -> None:
    for before, after in zip(equation.invars, equation.outvars, strict=True):
        for axis in range(len(before.aval.shape)):
            sets.tie((before, axis), (after, axis))


def _along(parameter: str) -> Link:
    return lambda equation, sets: _alike(equation, sets, [equation.params[parameter]])


def _placed(equation: Equation, sets: Sets, places: Sequence[int]) -> None:
    """Tie axis i of the operand to axis places[i] of the result."""
    [before], [after] = equation.invars, equation.outvars
    for axis, place in enumerate(places):
        if before.aval.shape[axis] == after.aval.shape[place]:
            sets.tie((before, axis), (after, place))
        else:
            sets.fill(before, [axis])


def _broadcast(equation: Equation, sets: Sets) -> None:
    if len(equation.invars) > 1:
        _whole(equation, sets)
    else:
        _placed(equation, sets, equation.params["broadcast_dimensions"])


def _transpose(equation: Equation, sets: Sets) -> None:
    _placed(equation, sets, np.argsort(equation.params["permutation"]).tolist())


def _squeeze(equation: Equation, sets: Sets) -> None:
    lost, [var] = equation.params["dimensions"], equation.invars
    sets.fill(var, lost)
    kept = [axis for axis in range(len(var.aval.shape)) if axis not in lost]
    for place, axis in enumerate(kept):
        sets.tie((var, axis), (equation.outvars[0], place))


def _reshape(equation: Equation, sets: Sets) -> None:
    [before, *others], [after] = equation.invars, equation.outvars
    if others or equation.params.get("dimensions"):
        return _whole(equation, sets)
    shapes = before.aval.shape, after.aval.shape
    for (start, end), (begin, stop) in blocks(*shapes):
        fine = [axis for axis in range(start, end) if shapes[0][axis] != 1]
        coarse = [axis for axis in range(begin, stop) if shapes[1][axis] != 1]
        sets.fill(before, [axis for axis in range(start, end) if axis not in fine])
        sets.fill(after, [axis for axis in range(begin, stop) if axis not in coarse])
        if len(fine) > 1 and len(coarse) > 1:
            sets.fill(before, fine)
            sets.fill(after, coarse)
        elif len(coarse) == 1:
            _merged(sets, before, fine, after, coarse[0])
        elif coarse or fine:
            _merged(sets, after, coarse, before, fine[0])
    return None


def _merged(sets: Sets, apart: Any, axes: Sequence[int], joint: Any, axis: int) -> None:
    """Link axes of one array to the one axis of another that they are together, row by row."""
    sizes = [apart.aval.shape[i] for i in axes]
    table = sets.of(joint)[axis].reshape(sizes)
    for place, i in enumerate(axes):
        sets.add(apart, i, np.asarray(table.any(axis=tuple(k for k in range(len(axes)) if k != place))))
    product = np.ones(1, bool)
    for i in axes:
        product = (product[:, None] & sets.of(apart)[i]).reshape(-1)
    sets.add(joint, axis, product)


def _concatenate(equation: Equation, sets: Sets) -> None:
    axis, out = equation.params["dimension"], equation.outvars[0]
    needed = list(zip(equation.invars, pieces(equation, sets.of(out)[axis]), strict=True))
    for var, piece in needed:
        if piece.any():
            sets.add(var, axis, piece)
    sets.add(out, axis, np.concatenate([sets.of(var)[axis] if piece.any() else piece for var, piece in needed]))
    arrays = [var for var, piece in needed if piece.any()]
    for other in range(len(out.aval.shape)):
        if other != axis:
            sets.tie((out, other), *((var, other) for var in arrays))


def _stack(equation: Equation, sets: Sets) -> None:
    place, out = equation.params["axis"], equation.outvars[0]
    sets.fill(out, [place])
    for axis in range(len(out.aval.shape) - 1):
        sets.tie((out, axis + (axis >= place)), *((var, axis) for var in equation.invars))


def _window_of(sets: Sets, large: Any, small: Any, axis: int, start: int) -> None:
    """Link an axis of an array to a run of the same axis of another."""
    end = start + small.aval.shape[axis]
    run = np.zeros(large.aval.shape[axis], bool)
    run[start:end] = sets.of(small)[axis]
    sets.add(large, axis, run)
    sets.add(small, axis, sets.of(large)[axis][start:end])


def _slice(equation: Equation, sets: Sets) -> None:
    [before], [after], params = equation.invars, equation.outvars, equation.params
    for axis, start in enumerate(params["start_indices"]):
        if params["strides"] and params["strides"][axis] != 1:
            sets.fill(before, [axis])
            sets.fill(after, [axis])
        else:
            _window_of(sets, before, after, axis, start)


def _split(equation: Equation, sets: Sets) -> None:
    [before], axis, start = equation.invars, equation.params["axis"], 0
    for after in equation.outvars:
        if after in sets:
            for other in range(len(before.aval.shape)):
                if other == axis:
                    _window_of(sets, before, after, axis, start)
                else:
                    sets.tie((before, other), (after, other))
        start += after.aval.shape[axis]


def _pad(equation: Equation, sets: Sets) -> None:
    (before, _), [after] = equation.invars, equation.outvars
    for axis, (low, high, inside) in enumerate(equation.params["padding_config"]):
        if low < 0 or high < 0 or inside:
            sets.fill(before, [axis])
            sets.fill(after, [axis])
        else:
            _window_of(sets, after, before, axis, low)


def _reverse(equation: Equation, sets: Sets) -> None:
    [before], [after] = equation.invars, equation.outvars
    for axis in range(len(before.aval.shape)):
        if axis in equation.params["dimensions"]:
            sets.add(before, axis, sets.of(after)[axis][::-1])
            sets.add(after, axis, sets.of(before)[axis][::-1])
        else:
            sets.tie((before, axis), (after, axis))


def _reduce(equation: Equation, sets: Sets) -> None:
    [before], [after], axes = equation.invars, equation.outvars, equation.params["axes"]
    kept = [axis for axis in range(len(before.aval.shape)) if axis not in axes]
    for place, axis in enumerate(kept):
        sets.tie((before, axis), (after, place))
    for axis in axes:
        if equation.primitive.name == "reduce_sum":
            sets.add(before, axis, sets.nonzero(before, axis, kept))
        else:
            sets.fill(before, [axis])


def _window(equation: Equation, sets: Sets) -> None:
    params = equation.params
    steps = zip(
        params["window_dimensions"], params["window_strides"], params["padding"], params["base_dilation"], strict=True
    )
    _alike(
        equation,
        sets,
        [i for i, (size, step, pads, base) in enumerate(steps) if size != 1 or step != 1 or any(pads) or base != 1],
    )


def _iota(equation: Equation, sets: Sets) -> None:
    sets.fill(equation.outvars[0], [equation.params["dimension"]])


def gathered(equation: Equation) -> dict[int, int]:
    """Return the axes of a gather's operand that are read whole, and their places in the result."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    shape = equation.invars[0].aval.shape
    apart = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    windows = [axis for axis in range(len(shape)) if axis not in apart]
    places = zip(windows, numbers.offset_dims, strict=True)
    return {a: place for a, place in places if sizes[a] == shape[a] and a not in numbers.start_index_map}


def _gather(equation: Equation, sets: Sets) -> None:
    (operand, indices), [out], whole = equation.invars, equation.outvars, gathered(equation)
    sets.fill(indices)
    sets.fill(operand, [axis for axis in range(len(operand.aval.shape)) if axis not in whole])
    sets.fill(out, [axis for axis in range(len(out.aval.shape)) if axis not in whole.values()])
    for axis, place in whole.items():
        sets.tie((operand, axis), (out, place))


def _dynamic_slice(equation: Equation, sets: Sets) -> None:
    (before, *_), [after] = equation.invars, equation.outvars
    for axis in range(len(before.aval.shape)):
        if before.aval.shape[axis] == after.aval.shape[axis]:
            sets.tie((before, axis), (after, axis))
        else:
            sets.fill(before, [axis])
            sets.fill(after, [axis])


def _dynamic_update_slice(equation: Equation, sets: Sets) -> None:
    (before, part, *_), [after] = equation.invars, equation.outvars
    arrays = (before, part, after)
    for axis in range(len(after.aval.shape)):
        if part.aval.shape[axis] == after.aval.shape[axis]:
            sets.tie(*((var, axis) for var in arrays))
        else:
            for var in arrays:
                sets.fill(var, [axis])


def _dot_general(equation: Equation, sets: Sets) -> None:
    contracted, batches = equation.params["dimension_numbers"]
    [out], count = equation.outvars, len(batches[0])
    for place, axes in enumerate(zip(*batches, strict=True)):
        sets.tie((out, place), *zip(equation.invars, axes, strict=True))
    place = count
    for var, contract, batch in zip(equation.invars, contracted, batches, strict=True):
        for axis in range(len(var.aval.shape)):
            if axis not in contract and axis not in batch:
                sets.tie((var, axis), (out, place))
                place += 1
    free = [
        [i for i in range(len(v.aval.shape)) if i not in axes]
        for v, axes in zip(equation.invars, contracted, strict=True)
    ]
    for pair in zip(*contracted, strict=True):
        (left, i), (right, k) = sides = list(zip(equation.invars, pair, strict=True))
        sets.add(left, i, sets.nonzero(left, i, free[0]) & sets.nonzero(right, k, free[1]))
        sets.tie(*sides)


def _convolution(equation: Equation, sets: Sets) -> None:
    (image, kernel), [out], params = equation.invars, equation.outvars, equation.params
    spec, groups = params["dimension_numbers"], params["feature_group_count"]
    if params.get("batch_group_count", 1) != 1:
        return _whole(equation, sets)
    for var, axes in ((image, spec.lhs_spec[2:]), (kernel, spec.rhs_spec[2:]), (out, spec.out_spec[2:])):
        sets.fill(var, axes)
    sets.tie((image, spec.lhs_spec[0]), (out, spec.out_spec[0]))
    outputs, inputs = (out, spec.out_spec[1]), (image, spec.lhs_spec[1])
    if groups > 1:
        return _grouped(sets, groups, inputs, (kernel, spec.rhs_spec[0]), (kernel, spec.rhs_spec[1]), outputs)
    sets.tie((kernel, spec.rhs_spec[0]), outputs)
    nonzero, table = features(equation, [sets.known.get(image), sets.known.get(kernel)])
    needed = nonzero & table[sets.of(kernel)[spec.rhs_spec[0]]].any(axis=0)
    sets.add(*inputs, needed)
    sets.tie(inputs, (kernel, spec.rhs_spec[1]))
    return None


def _grouped(sets: Sets, groups: int, inputs: Any, filters: Any, within: Any, outputs: Any) -> None:
    """Link the channels of a grouped convolution: a group is in use whole or not at all."""
    sets.fill(within[0], [within[1]])
    places = (inputs, filters, outputs)
    used = np.logical_or.reduce([sets.of(var)[axis].reshape(groups, -1).any(axis=1) for var, axis in places])
    for var, axis in places:
        sets.add(var, axis, used.repeat(var.aval.shape[axis] // groups))


LINKS: Mapping[str, Link] = {
    **dict.fromkeys(POINTWISE, _alike),
    **dict.fromkeys(("optimization_barrier", "sharding_constraint", "mesh_cast", "pvary", "reshard"), _each),
    "clamp": _alike, "broadcast_in_dim": _broadcast, "transpose": _transpose, "squeeze": _squeeze, "reshape": _reshape,
    "concatenate": _concatenate, "stack": _stack, "slice": _slice, "split": _split, "pad": _pad, "rev": _reverse,
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"), _reduce),
    **dict.fromkeys(("argmax", "argmin"), _reduce),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along("axis")),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _window),
    "sort": _along("dimension"), "iota": _iota, "gather": _gather, "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice, "dot_general": _dot_general, "conv_general_dilated": _convolution,
}  # fmt: skip
