"""Inlining: a program as one list of operations, with the functions that it calls in place of the calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pae_jax.widening.influence import called
from pae_jax.widening.programs import Aval, Body, Equation, literal


@dataclasses.dataclass(frozen=True, eq=False)
class Variable:
    """A variable of an inlined program; each call of a function has its own."""

    aval: Aval


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """An operation over variables of an inlined program; an `Equation`."""

    primitive: Any
    params: Mapping[str, Any]
    invars: list[Any]
    outvars: list[Any]
    source_info: Any


def inlined(body: Body) -> Body:
    """Return a program without calls of functions; loops and branches stay."""
    names: dict[Any, Any] = {var: Variable(var.aval) for var in (*body.constvars, *body.invars)}
    constants = list(zip((names[var] for var in body.constvars), body.consts, strict=True))
    operations: list[Equation] = []
    _collect(body, names, constants, operations)
    return Body(
        tuple(var for var, _ in constants),
        tuple(value for _, value in constants),
        tuple(names[var] for var in body.invars),
        tuple(_named(var, names) for var in body.outvars),
        tuple(operations),
    )


def _named(var: Any, names: Mapping[Any, Any]) -> Any:
    return var if literal(var) is not None else names[var]


def _operand(var: Any, names: Mapping[Any, Any], constants: list[tuple[Variable, Any]]) -> Any:
    """Return an operand under its new name; a literal that is not a scalar becomes a constant."""
    value = literal(var)
    if value is None or value.ndim == 0:
        return _named(var, names)
    constants.append((Variable(var.aval), value))
    return constants[-1][0]


def _collect(
    body: Body, names: dict[Any, Any], constants: list[tuple[Variable, Any]], operations: list[Equation]
) -> None:
    for equation in body.equations:
        operands = [_operand(var, names, constants) for var in equation.invars]
        inner = called(equation)
        if inner is None:
            outs = [Variable(var.aval) for var in equation.outvars]
            operations.append(Operation(equation.primitive, equation.params, operands, outs, equation.source_info))
        else:
            scope: dict[Any, Any] = dict(zip(inner.invars, operands, strict=True))
            for var, value in zip(inner.constvars, inner.consts, strict=True):
                scope[var] = Variable(var.aval)
                constants.append((scope[var], value))
            _collect(inner, scope, constants, operations)
            outs = [_named(var, scope) for var in inner.outvars]
        names.update(zip(equation.outvars, outs, strict=True))
