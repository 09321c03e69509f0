"""What of a program depends on the sizes of its inputs, found by comparing programs that differ in these alone."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pae_jax.widening.pointwise import POINTWISE
from pae_jax.widening.programs import Body, Equation, literal

Signature = tuple[tuple[Any, ...], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Varying:
    """What changes with the sizes of the inputs.

    Attributes:
      axes: `{variable: axes}`, those of another size at other inputs, and those along which an operation reads or
        writes another window, such as the rows of a table that a slice of the input's length takes.
      constants: variables of constants, and `(operation, place)` of numbers, whose values change.
    """

    axes: Mapping[Any, Sequence[int]]
    constants: frozenset[Any]


def numbers_of(body: Body) -> dict[Any, str]:
    """Return the variables that are one number whatever the inputs hold, each with a name of how it is computed.

    Where a size is a symbol, such a variable takes the place of a literal. Two of one name have one value.
    """
    found: dict[Any, str] = {}
    for equation in body.equations:
        outs, name = equation.outvars, equation.primitive.name
        if len(outs) != 1 or outs[0].aval.shape or (name != "dim_as_value" and name not in POINTWISE):
            continue
        operands = [_number(var, found) for var in equation.invars]
        if all(operand is not None for operand in operands):
            params = sorted((key, str(value)) for key, value in equation.params.items())
            found[outs[0]] = hashlib.sha256(repr((name, params, operands)).encode()).hexdigest()
    return found


def _number(var: Any, numbers: Mapping[Any, str]) -> str | None:
    """Return a name of the number that an operand is; None if it may depend on the inputs."""
    value = literal(var)
    if value is None:
        return numbers.get(var)
    return f"{var.aval.dtype} {value.shape} {value.tobytes().hex()}"


def variables_of(body: Body) -> list[Any]:
    """Return all variables of a program, in its order, without those that are one number."""
    numbers = numbers_of(body)
    outs = (var for equation in body.equations for var in equation.outvars)
    return [var for var in (*body.constvars, *body.invars, *outs) if var not in numbers]


def _operations(body: Body, numbers: Mapping[Any, str]) -> list[Equation]:
    return [equation for equation in body.equations if not any(var in numbers for var in equation.outvars)]


def signature_of(body: Body) -> Signature:
    """Return what programs that differ in sizes alone have in common: the operations and how they are connected."""
    variables, numbers = variables_of(body), numbers_of(body)
    number = {var: place for place, var in enumerate(variables)}
    rows = [
        (
            equation.primitive.name,
            *(-1 if _number(var, numbers) is not None else number[var] for var in equation.invars),
        )
        for equation in _operations(body, numbers)
    ]
    return (*rows, tuple(len(var.aval.shape) for var in variables))


def varying(body: Body, others: Sequence[Body]) -> Varying:
    """Return what of a program is different in others of its signature."""
    axes: dict[Any, set[int]] = {}
    for var, *same in zip(variables_of(body), *map(variables_of, others), strict=True):
        found = {i for i, size in enumerate(var.aval.shape) if any(other.aval.shape[i] != size for other in same)}
        if found:
            axes[var] = found
    constants = {
        var
        for var, value, *same in zip(body.constvars, body.consts, *(other.consts for other in others), strict=True)
        if not all(_equal(value, other) for other in same)
    }
    numbers, theirs_numbers = numbers_of(body), [numbers_of(other) for other in others]
    operations = [_operations(other, names) for other, names in zip(others, theirs_numbers, strict=True)]
    for equation, *same in zip(_operations(body, numbers), *operations, strict=True):
        mine, theirs = _windows(equation), [_windows(other) for other in same]
        for axis in (i for i in mine if any(other[i] != mine[i] for other in theirs)):
            for var in (*equation.invars, *equation.outvars):
                if axis < len(var.aval.shape):
                    axes.setdefault(var, set()).add(axis)
        for place, var in enumerate(equation.invars):
            name = _number(var, numbers)
            found = (_number(other.invars[place], names) for other, names in zip(same, theirs_numbers, strict=True))
            if name is not None and any(other != name for other in found):
                constants.add((equation, place))
    return Varying({var: sorted(found) for var, found in axes.items()}, frozenset(constants))


def _windows(equation: Equation) -> dict[int, Any]:
    """Return per axis which part of an array an operation reads or writes, where that is one of its parameters."""
    name, params = equation.primitive.name, equation.params
    if name == "slice":
        bounds = zip(params["start_indices"], params["limit_indices"], strict=True)
        return {i: (*ends, params["strides"] and params["strides"][i]) for i, ends in enumerate(bounds)}
    if name == "pad":
        return dict(enumerate(params["padding_config"]))
    if name == "split":
        return {params["axis"]: params["sizes"]}
    if name == "concatenate":
        axis = params["dimension"]
        return {axis: [var.aval.shape[axis] for var in equation.invars]}
    return {}


def _equal(a: Any, b: Any) -> bool:
    return a is b or (np.shape(a) == np.shape(b) and np.array_equal(np.asarray(a), np.asarray(b)))
