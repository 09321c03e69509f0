"""Run a program on the coordinates in use alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from pae_jax.widening.channels.known import constant
from pae_jax.widening.channels.links import gathered, pieces
from pae_jax.widening.programs import Body, Equation, bind, is_traced, literal

Kept = tuple[np.ndarray | None, ...]
"""Per axis of an array, which coordinates are in use: a bool vector, or None for all of them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What is in use of each variable of a program; a missing variable is not in use."""

    kept: Mapping[Any, Kept]

    def shape(self, var: Any) -> tuple[Any, ...]:
        """Return the shape of what is in use of a variable."""
        return tuple(
            size if used is None else int(used.sum()) for size, used in zip(var.aval.shape, self.kept[var], strict=True)
        )


def cut(array: Any, kept: Kept) -> Any:
    """Return the entries of an array that are in use."""
    host = not is_traced(array) and any(used is not None for used in kept)
    found = np.asarray(array) if host else array
    for axis, used in enumerate(kept):
        if used is not None:
            places = np.flatnonzero(used)
            found = found.take(places, axis=axis) if host else jnp.take(found, places, axis=axis, mode="clip")
    return jnp.asarray(found) if host else found


def run(body: Body, plan: Plan, operands: Sequence[Any]) -> list[Any]:
    """Evaluate a program.

    Args:
      body: an inlined program.
      plan: what is in use.
      operands: its inputs, where they are in use cut to that.

    Returns:
      Its outputs, cut to what is in use.
    """
    env: dict[Any, Any] = dict(zip(body.invars, operands, strict=True))
    for var, value in zip(body.constvars, body.consts, strict=True):
        if var in plan.kept:
            env[var] = cut(value, plan.kept[var])

    def read(var: Any) -> Any:
        return constant(var) if literal(var) is not None else env.get(var)

    for equation in body.equations:
        if any(var in plan.kept for var in equation.outvars):
            special = _SPECIAL.get(equation.primitive.name, _bound)
            env.update(
                zip(equation.outvars, special(equation, plan, [read(var) for var in equation.invars]), strict=True)
            )
    return [read(var) for var in body.outvars]


def _bound(equation: Equation, plan: Plan, operands: list[Any]) -> list[Any]:
    change = _CHANGES.get(equation.primitive.name)
    changed = {} if change is None else change(equation, plan)
    return bind(equation.primitive, {**equation.params, **changed}, operands)


def _concatenate(equation: Equation, plan: Plan, operands: list[Any]) -> list[Any]:
    axis = equation.params["dimension"]
    used = plan.kept[equation.outvars[0]][axis]
    if used is not None:
        parts = pieces(equation, used)
        operands = [operand for operand, piece in zip(operands, parts, strict=True) if piece.any()]
    return [lax.concatenate([operand for operand in operands if operand is not None], axis)]  # None: an empty piece


def _split(equation: Equation, plan: Plan, operands: list[Any]) -> list[Any]:
    axis, [array], start, found = equation.params["axis"], operands, 0, []
    used = plan.kept[equation.invars[0]][axis]
    for var, size in zip(equation.outvars, equation.params["sizes"], strict=True):
        ends = start, start + size
        if used is not None:
            ends = _before(used, ends[0]), _before(used, ends[1])
        found.append(lax.slice_in_dim(array, *ends, axis=axis) if var in plan.kept else None)
        start += size
    return found


def _before(used: np.ndarray, place: int) -> int:
    """Return how many coordinates in use come before a place."""
    return int(used[:place].sum())


def _slice(equation: Equation, plan: Plan) -> dict[str, Any]:
    kept = plan.kept[equation.invars[0]]

    def places(name: str) -> tuple[Any, ...]:
        given = zip(equation.params[name], kept, strict=True)
        return tuple(place if used is None else _before(used, place) for place, used in given)

    return {name: places(name) for name in ("start_indices", "limit_indices")}


def _pad(equation: Equation, plan: Plan) -> dict[str, Any]:
    [after], config = equation.outvars, []
    for sizes, used in zip(equation.params["padding_config"], plan.kept[after], strict=True):
        if used is not None:
            low, high, _ = sizes
            sizes = _before(used, low), int(used[used.size - high :].sum()), 0
        config.append(sizes)
    return {"padding_config": tuple(config)}


def _convolution(equation: Equation, plan: Plan) -> dict[str, Any]:
    image, groups = equation.invars[0], equation.params["feature_group_count"]
    axis = equation.params["dimension_numbers"].lhs_spec[1]
    used = plan.kept[image][axis]
    if groups == 1 or used is None:
        return {}
    return {"feature_group_count": int(used.sum()) * groups // used.size}


def _gather(equation: Equation, plan: Plan) -> dict[str, Any]:
    sizes, shape = list(equation.params["slice_sizes"]), plan.shape(equation.invars[0])
    for axis in gathered(equation):
        sizes[axis] = shape[axis]
    return {"slice_sizes": tuple(sizes)}


def _dynamic_slice(equation: Equation, plan: Plan) -> dict[str, Any]:
    return {"slice_sizes": plan.shape(equation.outvars[0])}


def _shaped(name: str) -> Callable[[Equation, Plan], dict[str, Any]]:
    return lambda equation, plan: {name: plan.shape(equation.outvars[0])}


_CHANGES: Mapping[str, Callable[[Equation, Plan], dict[str, Any]]] = {
    "broadcast_in_dim": _shaped("shape"), "iota": _shaped("shape"), "reshape": _shaped("new_sizes"),
    "slice": _slice, "pad": _pad, "conv_general_dilated": _convolution, "gather": _gather,
    "dynamic_slice": _dynamic_slice,
}  # fmt: skip
_SPECIAL: Mapping[str, Callable[[Equation, Plan, list[Any]], list[Any]]] = {
    "concatenate": _concatenate,
    "split": _split,
}
