"""Which entries of the variables can change what a function returns, when some of them are known to be 0.

The program is walked backwards. Every array has a mark per entry: whether a path from the entry to an output exists on
which no factor is known to be 0. Entries without such a path may have any finite values, all at the same time, because
everything they reach has no path to an output either. The analysis never uses the computed values, so it holds for
every input. If an operation has no rule, all its operands are assumed to reach the outputs.

A mark has the rank of its array; an axis of size 1 stands for all entries of a longer axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pae_jax.trees import Tree, flatten
from pae_jax.widening.marks import RULES, Known, Mark, cut_out, every, joined, pointwise, spread
from pae_jax.widening.pointwise import POINTWISE
from pae_jax.widening.programs import Body, Equation, Program, bodies, literal, scan_counts

_INLINED = {"jit", "pjit", "closed_call", "core_call", "call", "checkpoint", "remat", "remat2", "custom_jvp_call"}
_INLINED |= {"custom_vjp_call", "custom_vjp_call_jaxpr", "composite"}
_UNCHANGED = {"optimization_barrier", "sharding_constraint", "mesh_cast", "device_put", "pvary", "reshard"}
_KEEPS_ZERO = {"convert_element_type", "copy", "copy_p", "neg", "stop_gradient", "reduce_precision", "name"}
_SWEEPS = 32  # limit for a loop, after which every carry counts as reaching an output


def find_influence(
    program: Program, variables: Tree, nonzero: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], bool]:
    """Find which entries of the variables, and whether the inputs, can change the outputs of a function.

    Args:
      program: traced pure function of `(variables, inputs)`.
      variables: abstract or concrete tree of arrays, as traced.
      nonzero: `{path of a leaf of the variables: bool array of its shape}`, False where it is 0; other leaves may have
        any values.

    Returns:
      `({path: bool array of the leaf's shape}, whether an input has influence)`.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from pae_jax.widening import find_influence, trace
      >>> variables = {"a": jnp.ones((1, 2)), "b": jnp.ones((2, 1))}
      >>> program = trace(lambda v, x: jnp.tanh(x @ v["a"]) @ v["b"], variables, jnp.ones((1, 1)))
      >>> marks, _ = find_influence(program, variables, {"b": np.asarray([[True], [False]])})
      >>> marks["a"].tolist(), marks["b"].tolist()
      ([[True, False]], [[True], [True]])
    """
    body, paths = program.body, flatten(variables)
    known: list[Known] = [nonzero.get(path) for path in paths]
    known += [None] * (len(body.invars) - len(known))
    ends = [np.ones((1,) * len(var.aval.shape), bool) for var in body.outvars]
    reached = _backwards(body, known, ends)
    marks = {
        path: np.array(np.broadcast_to(mark, np.shape(leaf)))
        for (path, leaf), mark in zip(paths.items(), reached, strict=False)
    }
    return marks, any(mark.any() for mark in reached[len(paths) :])


def _none(var: Any) -> Mark:
    return np.zeros((1,) * len(var.aval.shape), bool)


def _forwards(body: Body, known: Sequence[Known]) -> dict[Any, np.ndarray]:
    """Propagate known zeros through operations that only move entries."""
    found = {var: value for var, value in zip(body.invars, known, strict=True) if value is not None}
    for equation in body.equations:
        values = [None if literal(var) is not None else found.get(var) for var in equation.invars]
        if not any(value is not None for value in values):
            continue
        for var, value in zip(equation.outvars, _moved(equation, values), strict=False):
            if value is not None:
                found[var] = value
    return found


def _moved(equation: Equation, values: list[Known]) -> list[Known]:
    name, params, first = equation.primitive.name, equation.params, values[0]
    shape = equation.outvars[0].aval.shape
    if name in _INLINED:
        inner = called(equation)
        if inner is None:
            return []
        found = _forwards(inner, values)
        return [None if literal(var) is not None else found.get(var) for var in inner.outvars]
    if name == "mul":  # a product is 0 where a factor is 0
        factors = [np.broadcast_to(value, shape) for value in values if value is not None]
        return [np.logical_and.reduce(factors)]
    if first is None:
        return []
    if name in _KEEPS_ZERO:
        return [first]
    if name in ("reshape", "squeeze"):
        return [None if params.get("dimensions") and name == "reshape" else first.reshape(shape)]
    if name == "transpose":
        return [first.transpose(params["permutation"])]
    if name == "broadcast_in_dim":
        return [np.broadcast_to(spread(first, params["broadcast_dimensions"], len(shape)), shape)]
    if name == "slice":
        return [first[cut_out(params)]]
    return []


def _backwards(body: Body, known: Sequence[Known], ends: Sequence[Mark]) -> list[Mark]:
    """Return the marks of the inputs of a program, from those of its outputs."""
    zeros, marks = _forwards(body, known), dict[Any, Mark]()

    def join(var: Any, mark: Mark | None) -> None:
        if mark is not None and literal(var) is None:
            old = marks.get(var)
            marks[var] = mark if old is None else old | mark

    for var, mark in zip(body.outvars, ends, strict=True):
        join(var, mark)
    for equation in reversed(body.equations):
        outs = [marks.get(var, _none(var)) for var in equation.outvars]
        if not any(mark.any() for mark in outs):
            continue
        values = [None if literal(var) is not None else zeros.get(var) for var in equation.invars]
        for var, mark in zip(equation.invars, _reached(equation, values, outs), strict=True):
            join(var, mark)
    return [marks.get(var, _none(var)) for var in body.invars]


def _reached(equation: Equation, known: list[Known], outs: list[Mark]) -> Sequence[Mark | None]:
    """Return the marks of the operands of one operation."""
    name = equation.primitive.name
    inner = called(equation)
    if inner is not None:
        return _backwards(inner, known, outs)
    if name == "scan":
        return _scan(equation, known, outs)
    if name == "split":
        axis, sizes = equation.params["axis"], equation.params["sizes"]
        return [joined(outs, axis, sizes)]
    if name in _UNCHANGED and len(outs) == len(equation.invars):
        return outs
    if name in POINTWISE:
        return pointwise(equation, known, outs[0])
    if name in RULES and len(outs) == 1:
        found = RULES[name](equation, known, outs[0])
        if found is not None:
            return found
    return [every(var) for var in equation.invars]


def called(equation: Equation) -> Body | None:
    """Return the program that an operation calls on its own operands, None for another kind of operation."""
    if equation.primitive.name not in _INLINED:
        return None
    found = [inner for _, inner in bodies(equation.params) if not inner.constvars or inner.consts]
    fitting = [inner for inner in found if len(inner.invars) == len(equation.invars)]
    return fitting[0] if fitting and len(fitting[0].outvars) == len(equation.outvars) else None


def _scan(equation: Equation, known: list[Known], outs: list[Mark]) -> Sequence[Mark]:
    [(_, inner)] = list(bodies(equation.params))
    consts, carry = scan_counts(equation, inner)
    sliced = [None if zeros is None else np.asarray(zeros.any(axis=0)) for zeros in known[consts + carry :]]
    known = [*known[:consts], *[None] * carry, *sliced]
    ends, stacked = outs[:carry], [np.asarray(mark.any(axis=0)) for mark in outs[carry:]]
    found: list[Mark] = []
    for sweep in range(_SWEEPS + 1):
        if sweep == _SWEEPS:
            ends = [every(var) for var in inner.invars[consts : consts + carry]]
        found = _backwards(inner, known, [*ends, *stacked])
        wider = [a | b for a, b in zip(ends, found[consts : consts + carry], strict=True)]
        if all((np.broadcast_to(a, b.shape) == b).all() for a, b in zip(ends, wider, strict=True)):
            break
        ends = wider
    return [*found[:consts], *ends, *(mark[None] for mark in found[consts + carry :])]
