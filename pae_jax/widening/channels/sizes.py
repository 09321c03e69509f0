"""What of a program depends on the sizes of its inputs, found by comparing programs that differ in these alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pae_jax.widening.programs import Body, Equation, literal

Signature = tuple[tuple[Any, ...], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Varying:
    """What changes with the sizes of the inputs.

    Attributes:
      axes: `{variable: axes}`, those of another size at other inputs, and those along which an operation reads or
        writes another window, such as the rows of a table that a slice of the input's length takes.
      constants: variables of constants, and `(operation, place)` of literals, whose values change.
    """

    axes: Mapping[Any, Sequence[int]]
    constants: frozenset[Any]


def variables_of(body: Body) -> list[Any]:
    """Return all variables of a program, in its order."""
    outs = (var for equation in body.equations for var in equation.outvars)
    return [*body.constvars, *body.invars, *outs]


def signature_of(body: Body) -> Signature:
    """Return what programs that differ in sizes alone have in common: the operations and how they are connected."""
    variables = variables_of(body)
    number = {var: place for place, var in enumerate(variables)}
    rows = [
        (equation.primitive.name, *(-1 if literal(var) is not None else number[var] for var in equation.invars))
        for equation in body.equations
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
    for equation, *same in zip(body.equations, *(other.equations for other in others), strict=True):
        mine, theirs = _windows(equation), [_windows(other) for other in same]
        for axis in (i for i in mine if any(other[i] != mine[i] for other in theirs)):
            for var in (*equation.invars, *equation.outvars):
                if axis < len(var.aval.shape):
                    axes.setdefault(var, set()).add(axis)
        for place, var in enumerate(equation.invars):
            if literal(var) is not None and any(literal(other.invars[place]) != literal(var) for other in same):
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
