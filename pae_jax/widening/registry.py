"""The table of rules: how each JAX primitive propagates facts about its operands to its results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from pae_jax.widening.values import Value

if TYPE_CHECKING:
    from pae_jax.widening.steps import Step

RuleFn = Callable[["Step", Sequence[Value]], Sequence[Value]]
F = TypeVar("F", bound=RuleFn)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule and the parameters that may differ between the narrow and the wide operation ("*": all of them).

    Every other parameter must be equal in both, otherwise the two programs are not the same architecture.
    """

    fn: RuleFn
    may_differ: frozenset[str]


RULES: dict[str, Rule] = {}


def rule(*primitives: str, may_differ: Sequence[str] = ()) -> Callable[[F], F]:
    """Register a rule for primitives of these names."""

    def register(fn: F) -> F:
        for primitive in primitives:
            if primitive in RULES:
                raise ValueError(f"primitive {primitive!r} already has a rule")
            RULES[primitive] = Rule(fn, frozenset(may_differ))
        return fn

    return register
