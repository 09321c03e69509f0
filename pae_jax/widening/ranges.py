"""Ranges: intervals that contain a set of entries.

The walk needs to know of entries at new coordinates whether they are exactly 0 and whether they are finite (0 times
infinity is not 0). An interval gives both and can be propagated through arithmetic, e.g. the 1 / sqrt(variance +
epsilon) of a norm. Bounds of -inf and inf mean "unknown but finite" while `finite` holds. Overflow of finite arithmetic
is not modelled.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

NO_LEAVES: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Range:
    """Entries lie in [lo, hi] and, if `finite`, none is infinite or NaN.

    `leaves` are the parameters whose freely initialised new entries this range depends on; if these entries were 0, the
    range might be narrower.
    """

    lo: float
    hi: float
    finite: bool = True
    leaves: frozenset[str] = NO_LEAVES

    @property
    def exact(self) -> bool:
        return self.finite and self.lo == self.hi

    @property
    def zero(self) -> bool:
        return self.finite and self.lo == 0 == self.hi

    @property
    def positive(self) -> bool:
        return self.finite and self.lo > 0


ZERO = Range(0.0, 0.0)
NOT_NEGATIVE = Range(0.0, math.inf)
UNKNOWN = Range(-math.inf, math.inf)
ANYTHING = Range(-math.inf, math.inf, finite=False)


def exactly(value: float) -> Range:
    """The range of one known value."""
    if math.isnan(value):
        return ANYTHING
    return Range(float(value), float(value), math.isfinite(value))


def span(lo: float, hi: float, *sources: Range) -> Range:
    """An interval computed from `sources`; NaN bounds mean that nothing is known."""
    finite = all(source.finite for source in sources)
    leaves = NO_LEAVES.union(*(source.leaves for source in sources))
    if math.isnan(lo) or math.isnan(hi):
        return Range(-math.inf, math.inf, finite, leaves)
    return Range(float(lo), float(hi), finite, leaves)


def hull(ranges: Iterable[Range]) -> Range:
    """The smallest range that contains all of the given ones."""
    ranges = tuple(ranges)
    return span(min(r.lo for r in ranges), max(r.hi for r in ranges), *ranges)


def unknown(*sources: Range) -> Range:
    """Nothing known, finite if every source is."""
    return span(-math.inf, math.inf, *sources)


def anything(*sources: Range) -> Range:
    """Nothing known; values may be infinite or NaN."""
    return dataclasses.replace(unknown(*sources), finite=False)


def add(a: Range, b: Range) -> Range:
    """Sum."""
    return span(a.lo + b.lo, a.hi + b.hi, a, b)


def negative(a: Range) -> Range:
    """Negation."""
    return span(-a.hi, -a.lo, a)


def multiply(a: Range, b: Range) -> Range:
    """Product; 0 times anything finite is 0, regardless of what the other factor depends on."""
    for one, other in ((a, b), (b, a)):
        if one.zero and other.finite:
            return one
    corners = [0.0 if 0.0 in (x, y) else x * y for x in (a.lo, a.hi) for y in (b.lo, b.hi)]
    return span(min(corners), max(corners), a, b)


def divide(a: Range, b: Range) -> Range:
    """Quotient; a divisor that may be 0 leaves nothing known."""
    if b.lo <= 0 <= b.hi or not b.finite:
        return anything(a, b)
    return multiply(a, span(1 / b.hi, 1 / b.lo, b))


def total(a: Range, count: int) -> Range:
    """Sum of `count` entries."""
    if a.zero or count == 1:
        return a
    return multiply(a, exactly(count)) if count else ZERO


def outward(a: Range, tiny: float) -> Range:
    """Round bounds between 0 and `tiny` to 0, because hardware may flush such numbers to 0."""
    lo = 0.0 if 0 < a.lo < tiny else a.lo
    hi = 0.0 if -tiny < a.hi < 0 else a.hi
    return a if (lo, hi) == (a.lo, a.hi) else dataclasses.replace(a, lo=lo, hi=hi)
