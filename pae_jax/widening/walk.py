"""The walk: both programs read in lockstep, operation by operation.

A variable of the narrow program and its counterpart of the wide one share one `Value`; if an operand has different
values in the two programs, their operations are connected differently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from pae_jax.errors import StructureError
from pae_jax.widening import programs
from pae_jax.widening.constants import Place, constant
from pae_jax.widening.registry import RULES
from pae_jax.widening.rules import unknown_primitive
from pae_jax.widening.steps import Step
from pae_jax.widening.values import Reason, Value


@dataclasses.dataclass
class Notes:
    """Findings of a walk.

    Attributes:
      blame: leaves whose new entries would have to be 0 for a refused place to be preserved.
      order: reasons, in the order of the program; the first causes those that follow from it.
    """

    blame: set[str] = dataclasses.field(default_factory=set)
    order: dict[Reason, int] = dataclasses.field(default_factory=dict)

    def met(self, reasons: Set[Reason]) -> None:
        """Record where each reason first occurred."""
        for reason in sorted(reasons - self.order.keys(), key=str) if reasons else ():
            self.order[reason] = len(self.order)


# These never affect the result of an operation.
_IGNORED = frozenset({"out_sharding", "sharding", "name", "weak_type"})


def walk(
    narrow: programs.Body,
    wide: programs.Body,
    arguments: Sequence[Value],
    notes: Notes,
    caller: Step | None = None,
) -> list[Value]:
    """Propagate the facts about the arguments through two programs of the same architecture.

    Args:
      narrow, wide: the two programs.
      arguments: one value per input.
      notes: filled with the findings.
      caller: the operation that contains the two programs; None for the outermost ones.
    Returns: one value per output.
    Raises:
      StructureError: the programs differ.
    """
    scope = caller.scope if caller else ""
    known: tuple[dict[Any, Value], dict[Any, Value]] = ({}, {})
    if len(narrow.constvars) != len(wide.constvars):
        raise StructureError("wide program", scope, f"{len(wide.constvars)} constants", len(narrow.constvars))
    for n_var, w_var, n_const, w_const in zip(
        narrow.constvars, wide.constvars, narrow.consts, wide.consts, strict=True
    ):
        known[0][n_var] = known[1][w_var] = constant(n_const, w_const, Place(scope))
    for n_var, w_var, value in zip(narrow.invars, wide.invars, arguments, strict=True):
        known[0][n_var] = known[1][w_var] = value

    def read(place: Place, n_var: Any, w_var: Any) -> Value:
        n_literal, w_literal = programs.literal(n_var), programs.literal(w_var)
        if n_literal is not None and w_literal is not None:
            return constant(n_literal, w_literal, place)
        if n_literal is None and w_literal is None and known[0][n_var] is known[1][w_var]:
            return known[0][n_var]
        raise StructureError(
            "wide program", place.where, "an operand from another place", "the operand of the narrow program",
            "The two functions must be one architecture at two widths.",
        )  # fmt: skip

    def descend(step: Step, n_body: programs.Body, w_body: programs.Body, values: Sequence[Value]) -> list[Value]:
        return walk(n_body, w_body, values, notes, step)

    for n_eqn, w_eqn in zip(narrow.equations, wide.equations, strict=False):
        place = "/".join(part for part in (scope, programs.layer(n_eqn)) if part)
        source = _source(n_eqn, caller)
        _same_operation(n_eqn, w_eqn, place, source)
        use = Place(place, n_eqn.primitive.name, source)
        operands = [read(use, n, w) for n, w in zip(n_eqn.invars, w_eqn.invars, strict=True)]
        step = Step(n_eqn.primitive.name, n_eqn, w_eqn, place, source, operands, notes.blame, descend)
        for n_var, w_var, value in zip(n_eqn.outvars, w_eqn.outvars, _results(step), strict=True):
            known[0][n_var] = known[1][w_var] = value
            notes.met(value.reasons)
    if len(narrow.equations) != len(wide.equations):
        raise StructureError(
            "wide program", scope, f"{len(wide.equations)} operations", len(narrow.equations),
            "Is it another architecture, or one with more layers?",
        )  # fmt: skip
    return [read(Place(scope), n, w) for n, w in zip(narrow.outvars, wide.outvars, strict=True)]


def _source(equation: programs.Equation, caller: Step | None) -> str:
    """Where the user's code calls the operation.

    The body of a jitted function is traced once and then shared, so its recorded source may be that of another call.
    """
    if caller and caller.primitive in ("jit", "pjit") and caller.source:
        return caller.source
    return programs.source(equation) or (caller.source if caller else "")


def _same_operation(narrow: programs.Equation, wide: programs.Equation, place: str, source: str) -> None:
    found, expected = wide.primitive.name, narrow.primitive.name
    arity = [(len(e.invars), len(e.outvars)) for e in (wide, narrow)]
    if found != expected or arity[0] != arity[1]:
        raise StructureError(
            f"wide program{f' at {source}' if source else ''}", place, f"operation {found}", expected,
            "The two functions must be one architecture at two widths.",
        )  # fmt: skip


def _results(step: Step) -> Sequence[Value]:
    rule = RULES.get(step.primitive)
    if rule is None:
        return unknown_primitive(step, differing(step.narrow.params, step.wide.params))
    for name in differing(step.narrow.params, step.wide.params):
        if not rule.may_differ & {name, "*"}:
            raise step.mismatch(f"{name}={step.wide.params[name]}", f"{name}={step.narrow.params.get(name)}")
    for index in range(len(step.narrow.outvars)):
        narrow, wide = step.narrow.outvars[index].aval, step.wide.outvars[index].aval
        if len(getattr(narrow, "shape", ())) != len(getattr(wide, "shape", ())):
            raise step.mismatch(f"shape {wide.shape}", f"the rank of {narrow.shape}")
        if getattr(narrow, "dtype", None) != getattr(wide, "dtype", None):
            raise step.mismatch(f"dtype {wide.dtype}", narrow.dtype)
    results = rule.fn(step, step.operands)
    # A refusal after the first result was made marks that result too.
    return [dataclasses.replace(r, reasons=r.reasons | step.reasons) if step.reasons else r for r in results]


def differing(narrow: Mapping[str, Any], wide: Mapping[str, Any]) -> list[str]:
    """Names of parameters that are not equal."""
    return [name for name in wide if name not in _IGNORED and not _equal(narrow.get(name), wide[name])]


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if (text := programs.text(a)) is not None:
        return text == programs.text(b)
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and np.array_equal(a, b)
    return bool(a == b) or (a != a and b != b)  # a NaN fill value equals itself
