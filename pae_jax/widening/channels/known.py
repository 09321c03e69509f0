"""Known values: entries of a program's arrays that are the same number for every input, given its variables.

A channel whose incoming weights are 0 has a value that depends on its bias and norm alone; after a rectifier it is
often 0. The program is walked forwards on what is known. An operation without a rule has an unknown result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.widening.channels.sizes import Varying
from pae_jax.widening.marks import spread
from pae_jax.widening.pointwise import POINTWISE
from pae_jax.widening.programs import Body, Equation, bind, bodies, is_traced, literal

_FOLDED = 2**20  # results of at most this many entries are computed from operands that are known entirely
_COMPUTED = 2**27  # the same for elementwise operations, which weights pass through
_ROWS = 2**16  # up to this many rows of one operand of a product are told apart


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """What is known about an array; an axis of size 1 stands for all entries of a longer axis.

    Attributes:
      mask: bool, where the value is known.
      value: the values, of the shape of the mask; meaningless where unknown.
    """

    mask: np.ndarray
    value: np.ndarray

    @property
    def zero(self) -> np.ndarray:
        return self.mask & (self.value == 0)


Values = Sequence[Known | None]

_FAST: Mapping[str, Callable[..., np.ndarray]] = {  # the arithmetic of norms, without compiling it for each size
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative,
    "max": np.maximum, "min": np.minimum, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x),
}  # fmt: skip


def find_known(body: Body, inputs: Sequence[Any], varying: Varying) -> dict[Any, Known]:
    """Return what is known about the variables of an inlined program, whatever the sizes of its inputs.

    Args:
      body: the program.
      inputs: per input its array, or None where it may have any values.
      varying: what depends on the sizes. Along these axes only what all entries have in common is known.
    """
    found: dict[Any, Known] = {}
    for var, value in (*zip(body.constvars, body.consts, strict=True), *zip(body.invars, inputs, strict=True)):
        if value is not None and not _opaque(var) and not is_traced(value) and var not in varying.constants:
            found[var] = _common(_whole(np.asarray(value)), varying.axes.get(var, ()))

    def value(equation: Equation, place: int) -> Known | None:
        var = equation.invars[place]
        if (equation, place) in varying.constants:
            return None
        return found.get(var) if literal(var) is None else _whole(constant(var))

    for equation in body.equations:
        values = [value(equation, place) for place in range(len(equation.invars))]
        sized = any(var in varying.axes for var in equation.invars if literal(var) is None)
        result = _result(equation, values, fold=not sized)
        if result is not None and not _opaque(equation.outvars[0]):
            result = _common(result, varying.axes.get(equation.outvars[0], ()))
            if result.mask.any():
                found[equation.outvars[0]] = result
    return found


def _common(known: Known, axes: Sequence[int]) -> Known:
    """Return what all entries along some axes have in common."""
    mask, value = known.mask, known.value
    for axis in axes:
        if mask.shape[axis] > 1:
            first = value.take([0], axis=axis)
            mask = (mask & (value == first)).all(axis=axis, keepdims=True)
            value = first
    return Known(mask, value)


def constant(var: Any) -> np.ndarray:
    """Return the value of a literal operand in the operand's dtype."""
    return np.asarray(literal(var), var.aval.dtype)


def _whole(value: np.ndarray) -> Known:
    return Known(np.ones(value.shape, bool), value)


def _zero(nonzero: np.ndarray, dtype: Any) -> Known:
    return Known(~nonzero, np.zeros(nonzero.shape, dtype))


def _opaque(var: Any) -> bool:
    return jnp.issubdtype(var.aval.dtype, jax.dtypes.extended)


def _result(equation: Equation, values: Values, fold: bool) -> Known | None:
    name, out = equation.primitive.name, equation.outvars[0].aval
    if len(equation.outvars) != 1 or _opaque(equation.outvars[0]) or any(True for _ in bodies(equation.params)):
        return None
    if any(value is not None for value in values):
        if name in POINTWISE:
            return _pointwise(equation, values)
        if name in _RULES:
            return _RULES[name](equation, values)
    if fold and math.prod(out.shape) <= _FOLDED and all(value is not None and value.mask.all() for value in values):
        arrays = [
            np.broadcast_to(value.value, var.aval.shape)
            for value, var in zip(values, equation.invars, strict=True)
            if value is not None
        ]
        return _whole(np.asarray(bind(equation.primitive, equation.params, [jnp.asarray(a) for a in arrays])[0]))
    return None


def _pointwise(equation: Equation, values: Values) -> Known | None:
    name, out = equation.primitive.name, equation.outvars[0].aval
    rank = len(out.shape)
    operands = [value if value is None else _of_rank(value, rank) for value in values]
    known = [value for value in operands if value is not None]
    if name == "mul" or (name == "div" and operands[0] is not None):
        zeros = [value.zero for value in (known if name == "mul" else known[:1])]
        zero = np.logical_or.reduce(np.broadcast_arrays(*zeros)) if len(zeros) > 1 else zeros[0]
    else:
        zero = np.zeros((1,) * rank, bool)
    if len(known) < len(operands):
        return _zero(~zero, out.dtype)
    shape = np.broadcast_shapes(*(value.mask.shape for value in known))
    if math.prod(shape) > _COMPUTED:
        return None
    mask = np.logical_and.reduce([np.broadcast_to(value.mask, shape) for value in known])
    arrays = [np.broadcast_to(np.where(v.mask, v.value, v.value.dtype.type(1)), shape) for v in known]
    if name in _FAST and out.dtype in (np.float32, np.float64):
        with np.errstate(all="ignore"):
            value = _FAST[name](*arrays)
    else:
        value = np.asarray(bind(equation.primitive, equation.params, [jnp.asarray(array) for array in arrays])[0])
    zero = np.broadcast_to(zero, shape)
    return Known(mask | zero, np.where(zero, np.zeros((), value.dtype), value))


def _of_rank(value: Known, rank: int) -> Known:
    if value.mask.ndim == rank:
        return value
    return Known(value.mask.reshape((1,) * rank), value.value.reshape((1,) * rank))  # a scalar


def _moved(move: Any) -> Any:
    """Make the rule of an operation that only moves entries of its first operand."""

    def rule(equation: Equation, values: Values) -> Known | None:
        first = values[0]
        if first is None:
            return None
        mask, value = move(equation, first.mask), move(equation, first.value)
        return None if mask is None else Known(mask, value)

    return rule


def _broadcast(equation: Equation, array: np.ndarray) -> np.ndarray:
    rank = len(equation.outvars[0].aval.shape)
    return spread(array, equation.params["broadcast_dimensions"], rank)


def _reshape(equation: Equation, array: np.ndarray) -> np.ndarray | None:
    if equation.params.get("dimensions"):
        return None
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    rows, target = [], []
    for (start, end), (begin, stop) in blocks(before, after):
        uniform = all(size == 1 for size in array.shape[start:end])
        rows += array.shape[start:end] if uniform else before[start:end]
        target += [1] * (stop - begin) if uniform else after[begin:stop]
    return np.broadcast_to(array, rows).reshape(target)


def blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return the smallest groups of consecutive axes that a reshape leaves in place: `((from, to), (from, to))`."""
    found = []
    i = j = 0
    while i < len(before) or j < len(after):
        start, begin, a, b = i, j, 1, 1
        while True:
            if i < len(before) and (a <= b or j >= len(after)):
                a, i = a * before[i], i + 1
            elif j < len(after):
                b, j = b * after[j], j + 1
            if a == b and (i > start or j > begin):
                break
        found.append(((start, i), (begin, j)))
    return found


def _slice(equation: Equation, array: np.ndarray) -> np.ndarray:
    params = equation.params
    strides = params["strides"] or (1,) * array.ndim
    cuts = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return array[tuple(slice(None) if n == 1 else slice(*cut) for n, cut in zip(array.shape, cuts, strict=True))]


def _joined(equation: Equation, values: Values) -> Known | None:
    axis = equation.params["dimension"]
    shapes = [[n if i == axis else 1 for i, n in enumerate(var.aval.shape)] for var in equation.invars]
    dtype = equation.outvars[0].aval.dtype
    pieces = [
        Known(np.zeros(shape, bool), np.zeros(shape, dtype)) if value is None else value
        for value, shape in zip(values, shapes, strict=True)
    ]
    rest = np.broadcast_shapes(*([1 if i == axis else n for i, n in enumerate(p.mask.shape)] for p in pieces))
    whole = [[shape[axis] if i == axis else n for i, n in enumerate(rest)] for shape in shapes]

    def join(part: str) -> np.ndarray:
        arrays = [np.broadcast_to(getattr(p, part), shape) for p, shape in zip(pieces, whole, strict=True)]
        return np.concatenate(arrays, axis=axis)

    return Known(join("mask"), join("value"))


def _stack(equation: Equation, values: Values) -> Known | None:
    if any(value is None for value in values):
        return None
    axis, known = equation.params["axis"], [value for value in values if value is not None]
    parts = [np.broadcast_arrays(*(getattr(value, part) for value in known)) for part in ("mask", "value")]
    return Known(np.stack(parts[0], axis), np.stack(parts[1], axis))


def _pad(equation: Equation, values: Values) -> Known | None:
    first, filling = values
    config = equation.params["padding_config"]
    if first is None or filling is None or any(min(sizes) < 0 or sizes[2] for sizes in config):
        return None
    shape, changed = first.mask.shape, [any(sizes) for sizes in config]
    number = filling.value.reshape(())
    if all(n == 1 for n, padded in zip(shape, changed, strict=True) if padded):
        return Known(first.mask & (first.value == number) & filling.mask.all(), first.value)
    sizes = zip(shape, equation.invars[0].aval.shape, changed, strict=True)
    whole = [full if padded else n for n, full, padded in sizes]
    pads = [(low, high) for low, high, _ in config]
    mask = np.pad(np.broadcast_to(first.mask, whole), pads, constant_values=filling.mask.all())
    return Known(mask, np.pad(np.broadcast_to(first.value, whole), pads, constant_values=number))


def _summed(equation: Equation, values: Values) -> Known | None:
    axes = tuple(equation.params["axes"])
    [value] = values
    assert value is not None
    return _zero(np.asarray(~value.zero.all(axis=axes)), equation.outvars[0].aval.dtype)


def _extremum(choose: Any) -> Any:
    def rule(equation: Equation, values: Values) -> Known | None:
        axes = tuple(equation.params["axes"])
        [value] = values
        assert value is not None
        return Known(np.asarray(value.mask.all(axis=axes)), np.asarray(choose(value.value, axis=axes)))

    return rule


def _window(equation: Equation, values: Values) -> Known | None:
    """Windows over entries that are all one value: that value for an extremum, 0 for a sum of zeros."""
    value, params = values[0], equation.params
    if value is None:
        return None
    sizes, pads = params["window_dimensions"], params["padding"]
    shapes = zip(value.mask.shape, equation.invars[0].aval.shape, equation.outvars[0].aval.shape, strict=True)
    moves = [n != 1 and (size != 1 or before != after) for size, (n, before, after) in zip(sizes, shapes, strict=True)]
    if any(moves) or any(step != 1 for step in (*params["window_dilation"], *params["base_dilation"])):
        return None
    if equation.primitive.name == "reduce_window_sum":
        return _zero(~value.zero, value.value.dtype)
    return value if all(max(pad) < size for pad, size in zip(pads, sizes, strict=True)) else None


def _dot_general(equation: Equation, values: Values) -> Known | None:
    """A sum of products is 0 if each of them has a factor that is."""
    contracted, batches = equation.params["dimension_numbers"]
    tables, own = [], []
    for var, value, contract, batch in zip(equation.invars, values, contracted, batches, strict=True):
        rank = len(var.aval.shape)
        nonzero = np.ones((1,) * rank, bool) if value is None else ~value.zero
        free = [i for i in range(rank) if i not in contract and i not in batch]
        if math.prod(nonzero.shape[i] for i in free) > _ROWS:
            nonzero = nonzero.any(axis=tuple(free), keepdims=True)
        whole = [var.aval.shape[i] if i in contract else nonzero.shape[i] for i in range(rank)]
        moved = np.broadcast_to(nonzero, whole).transpose([*batch, *free, *contract])
        own.append([nonzero.shape[i] for i in free])
        tables.append(moved.reshape(*moved.shape[: len(batch)], math.prod(own[-1]), -1).astype(np.float32))
    nonzero = np.matmul(tables[0], tables[1].swapaxes(-1, -2)) > 0
    return _zero(nonzero.reshape(*nonzero.shape[:-2], *own[0], *own[1]), equation.outvars[0].aval.dtype)


def _convolution(equation: Equation, values: Values) -> Known | None:
    params = equation.params
    if params.get("batch_group_count", 1) != 1:
        return None
    spec, groups = params["dimension_numbers"], params["feature_group_count"]
    image, table = features(equation, values)
    outputs, inputs = table.shape
    fed = table.reshape(groups, outputs // groups, inputs) & image.reshape(groups, 1, inputs)
    shape = [1] * len(equation.outvars[0].aval.shape)
    shape[spec.out_spec[1]] = outputs
    return _zero(np.asarray(fed.any(axis=2)).reshape(shape), equation.outvars[0].aval.dtype)


def features(equation: Equation, values: Values) -> tuple[np.ndarray, np.ndarray]:
    """Return which input channels of a convolution may differ from 0, and which (out, in) pairs have a weight."""
    spec = equation.params["dimension_numbers"]
    axes = ((spec.lhs_spec[1],), tuple(spec.rhs_spec[:2]))
    image, table = (along(var, value, kept) for var, value, kept in zip(equation.invars, values, axes, strict=True))
    return image, table if spec.rhs_spec[0] < spec.rhs_spec[1] else table.T


def along(var: Any, value: Known | None, axes: Sequence[int]) -> np.ndarray:
    """Return for coordinates of some axes, in the array's order of axes, whether an entry there may differ from 0."""
    shape = tuple(n for i, n in enumerate(var.aval.shape) if i in axes)
    if value is None:
        return np.ones(shape, bool)
    nonzero = (~value.zero).any(axis=tuple(i for i in range(value.mask.ndim) if i not in axes))
    return np.array(np.broadcast_to(nonzero, shape))


_RULES: Mapping[str, Any] = {
    "broadcast_in_dim": _moved(_broadcast), "reshape": _moved(_reshape), "slice": _moved(_slice),
    "transpose": _moved(lambda equation, array: array.transpose(equation.params["permutation"])),
    "squeeze": _moved(lambda equation, array: array.squeeze(tuple(equation.params["dimensions"]))),
    "concatenate": _joined, "stack": _stack, "pad": _pad, "reduce_sum": _summed,
    "reduce_max": _extremum(np.max), "reduce_min": _extremum(np.min),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _window),
    "dot_general": _dot_general, "conv_general_dilated": _convolution,
}  # fmt: skip
