"""Operations without a rule: equal operands give equal results; anything else is refused by name."""

from __future__ import annotations

from collections.abc import Sequence

from pae_jax.widening.steps import Step
from pae_jax.widening.values import Value


def unknown_primitive(step: Step, differing: Sequence[str]) -> list[Value]:
    """Results of a primitive that the engine does not know."""
    grown = [value for value in step.operands if not value.unchanged]
    if grown:
        shapes = ", ".join(f"{value.narrow} -> {value.wide}" for value in grown)
        step.refuse(
            f"the engine has no rule for {step.primitive} on a growing operand ({shapes})",
            "keep what enters it at a fixed size, or write it with operations that have a rule",
        )
    elif differing:
        step.refuse(
            f"{step.primitive} has another {differing[0]} in the wide program",
            "make its settings independent of the width",
        )
    return [step.lost(index) for index in range(len(step.narrow.outvars))]
