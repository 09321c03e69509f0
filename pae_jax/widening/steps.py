"""Step: one operation of both programs, as a rule sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pae_jax.errors import StructureError
from pae_jax.widening import programs
from pae_jax.widening.ranges import UNKNOWN, Range
from pae_jax.widening.terms import Clash, Term, opened, unify
from pae_jax.widening.values import NO_REASONS, Reason, Value

Descend = Callable[["Step", programs.Body, programs.Body, Sequence[Value]], list[Value]]

REORDERED = "both sides must keep the features of the narrow network in one order"
KEEP_SIZE = "keep this axis at a fixed size, or pass widen_maps(overrides=...) where the order can be told"


@dataclasses.dataclass
class Step:
    """The narrow and the wide operation side by side.

    A rule reads `narrow` and `wide`, relates axes by `unify`, calls `refuse` if the function would change, and returns
    one value per result, made by `value`. A refusal marks every result of the operation.
    """

    primitive: str
    narrow: programs.Equation
    wide: programs.Equation
    scope: str
    source: str
    operands: Sequence[Value]
    blame: set[str]
    walk: Descend
    reasons: set[Reason] = dataclasses.field(default_factory=set)
    forgiven: list[Value] = dataclasses.field(default_factory=list)

    @property
    def params(self) -> Mapping[str, Any]:
        """Parameters of the narrow operation (those that may not differ hold for both)."""
        return self.narrow.params

    def shapes(self, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of result `index`, narrow and wide."""
        return tuple(self.narrow.outvars[index].aval.shape), tuple(self.wide.outvars[index].aval.shape)

    @property
    def leaf(self) -> str:
        """Path of the nearest upstream parameter: that of the last operand with one (kernels come last)."""
        return next((value.leaf for value in reversed(self.operands) if value.leaf), "")

    def refuse(self, problem: str, remedy: str, *blame: Range) -> None:
        """Mark the results: the widened network would compute something else here."""
        for range_ in blame:
            self.blame |= range_.leaves
        self.reasons.add(Reason(self.scope, self.primitive, self.leaf, problem, remedy, self.source))

    def unify(self, a: Term, b: Term, what: str) -> None:
        """Require two axes to have the same index map."""
        try:
            unify(a, b)
        except Clash as clash:
            self.refuse(f"{what} disagree about where the old entries sit: {clash}", REORDERED)

    def attempt(self, make: Callable[[], Sequence[Term]], sizes: Iterable[tuple[int, int]], problem: str) -> list[Term]:
        """Terms from `make`; if they clash, refuse and return undecided axes of `sizes`."""
        try:
            return list(make())
        except Clash as clash:
            self.refuse(f"{problem}: {clash}", KEEP_SIZE)
            return [self.open_axis(n, w) for n, w in sizes]

    def open_axis(self, n: int, w: int) -> Term:
        """An undecided axis of a result; results may never shrink."""
        try:
            return opened(n, w)
        except Clash as clash:
            raise self.mismatch(f"size {w}", f"at least {n}", f"Here {clash}: a network can only grow.") from clash

    def forgive(self, *values: Value) -> None:
        """Drop the reasons of these operands: the rule has read their content for both widths."""
        self.forgiven.extend(values)

    def value(
        self, index: int, axes: Sequence[Term], old: Range = UNKNOWN, new: Range = UNKNOWN, **fields: Any
    ) -> Value:
        """Result `index`, checked against the shapes of both programs."""
        narrow, wide = self.shapes(index)
        axes = tuple(axes)
        if tuple(a.n for a in axes) != narrow or tuple(a.w for a in axes) != wide:
            raise AssertionError(f"rule for {self.primitive}: axes {axes} do not fit shapes {narrow} and {wide}")
        reasons = NO_REASONS.union(
            *(value.reasons for value in self.operands if not any(value is f for f in self.forgiven)), self.reasons
        )
        return Value(axes, old, new, reasons=reasons, leaf=fields.pop("leaf", self.leaf), **fields)

    def lost(self, index: int) -> Value:
        """Result `index` when nothing is known about it; only after `refuse`."""
        narrow, wide = self.shapes(index)
        if len(narrow) != len(wide):
            raise self.mismatch(f"{len(wide)} axes", f"{len(narrow)} axes")
        return self.value(index, [self.open_axis(n, w) for n, w in zip(narrow, wide, strict=True)])

    def mismatch(self, found: Any, expected: Any, hint: str = "") -> StructureError:
        """Return the error that the two programs are not the same architecture."""
        place = "/".join(part for part in (self.scope, self.primitive) if part)
        hint = hint or "The narrow and the wide function must run the same operations in the same order."
        return StructureError(
            f"wide program{f' at {self.source}' if self.source else ''}", place, found, expected, hint
        )
