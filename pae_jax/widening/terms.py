"""Axis terms: positions of the coordinates of a narrow axis of size n on its wide counterpart of size w.

A term stands for one injective index map ``[0, n) -> [0, w)``. Most maps are unknown while a program is being read, so
a term is a small expression whose open parts are bound by unification:

- `Same`     n == w, the identity. An axis that does not grow never permutes.
- `Open`     undecided; unification may bind it once. Terms still open at the end become the leading block.
- `Given`    an explicit index map (an override, or an axis whose entries are their own coordinates).
- `Joined`   parts laid end to end, as from concatenation.
- `Product`  factors in row-major order, as from a merging reshape.
- `Copies`   the entries do not depend on the coordinate (a broadcast axis), so any map is right.

Every constructor function returns the normal form: a term with n == w is `Same`, nested joins and products are flat,
empty parts and factors of size 1 are removed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np


class Clash(Exception):
    """Two index maps that must be equal cannot be."""


@dataclasses.dataclass(frozen=True)
class Same:
    """The identity on `n` coordinates."""

    n: int

    @property
    def w(self) -> int:
        return self.n


@dataclasses.dataclass(eq=False)
class Open:
    """A map not decided yet; `bound` is set at most once, by unification."""

    n: int
    w: int
    bound: Term | None = None


@dataclasses.dataclass(frozen=True)
class Given:
    """An explicit map: narrow coordinate i sits at `index[i]` of `w`."""

    w: int
    index: tuple[int, ...]

    @property
    def n(self) -> int:
        return len(self.index)


@dataclasses.dataclass(frozen=True, eq=False)
class Joined:
    """Parts end to end; made by `joined` only."""

    parts: tuple[Term, ...]

    @property
    def n(self) -> int:
        return sum(part.n for part in self.parts)

    @property
    def w(self) -> int:
        return sum(part.w for part in self.parts)


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """Factors in row-major order; made by `product` only."""

    factors: tuple[Term, ...]

    @property
    def n(self) -> int:
        return math.prod(factor.n for factor in self.factors)

    @property
    def w(self) -> int:
        return math.prod(factor.w for factor in self.factors)


@dataclasses.dataclass(frozen=True)
class Copies:
    """A broadcast axis: every coordinate holds the same entries."""

    n: int
    w: int


Term = Same | Open | Given | Joined | Product | Copies


def resolve(term: Term) -> Term:
    """Follow the bindings of open terms to the present term."""
    while isinstance(term, Open) and term.bound is not None:
        term = term.bound
    return term


def grows(term: Term) -> bool:
    """Whether the axis has new coordinates that may hold other entries than the old ones."""
    return term.n != term.w and not isinstance(resolve(term), Copies)


def opened(n: int, w: int) -> Term:
    """A fresh undecided axis."""
    if n > w:
        raise Clash(f"an axis of {n} shrinks to {w}")
    return Same(n) if n == w else Open(n, w)


def copies(n: int, w: int) -> Term:
    """A broadcast axis."""
    return Same(n) if n == w else Copies(n, w)


def given(index: Iterable[int], w: int) -> Term:
    """An axis with an explicit map; one that does not grow must be the identity."""
    index = tuple(int(i) for i in index)
    if len(index) != w:
        return Given(w, index)
    if index != tuple(range(w)):
        raise Clash("an axis that does not grow would be reordered")
    return Same(w)


def joined(parts: Iterable[Term]) -> Term:
    """Parts end to end, in normal form."""
    flat: list[Term] = []
    for part in (p for whole in parts for p in _parts(whole)):
        if part.w == 0:
            continue
        if flat and isinstance(part, Same) and isinstance(flat[-1], Same):
            flat[-1] = Same(flat[-1].n + part.n)
        else:
            flat.append(part)
    if len(flat) == 1:
        return flat[0]
    return Joined(tuple(flat)) if flat else Same(0)


def product(factors: Iterable[Term]) -> Term:
    """Factors in row-major order, in normal form."""
    flat: list[Term] = []
    for factor in (f for whole in factors for f in _factors(whole)):
        if isinstance(factor, Same) and factor.n == 1:
            continue
        if flat and isinstance(factor, Same) and isinstance(flat[-1], Same):
            flat[-1] = Same(flat[-1].n * factor.n)
        else:
            flat.append(factor)
    if len(flat) == 1:
        return flat[0]
    whole = Product(tuple(flat))
    return Same(whole.n) if whole.n == whole.w else whole


def unify(a: Term, b: Term) -> None:
    """Make two terms equal by binding open terms; raise `Clash` if they cannot be equal."""
    a, b = resolve(a), resolve(b)
    if a is b:
        return
    if (a.n, a.w) != (b.n, b.w):
        raise Clash(f"an axis growing {a.n} -> {a.w} meets one growing {b.n} -> {b.w}")
    if a.n == a.w or isinstance(a, Copies) or isinstance(b, Copies):
        return
    # No term contains one of its own total size besides itself (normal form), so binding never makes a cycle.
    if isinstance(a, Open):
        a.bound = b
    elif isinstance(b, Open):
        b.bound = a
    elif isinstance(a, Given) and isinstance(b, Given):
        if a.index != b.index:
            raise Clash("two index maps differ")
    elif isinstance(a, Joined) or isinstance(b, Joined):
        _unify_parts(_parts(a), _parts(b))
    else:
        _unify_factors(_factors(a), _factors(b))


def cut(term: Term, n: int, w: int) -> tuple[Term, Term]:
    """Split a term into its first (n, w) coordinates and the rest."""
    term = resolve(term)
    rest = (term.n - n, term.w - w)
    if not (0 <= n <= w and 0 <= rest[0] <= rest[1]):
        raise Clash(f"a cut at {n} -> {w} does not fit an axis growing {term.n} -> {term.w}")
    if (n, w) == (0, 0):
        return Same(0), term
    if rest == (0, 0):
        return term, Same(0)
    match term:
        case Same():
            return Same(n), Same(rest[0])
        case Copies():
            return copies(n, w), copies(*rest)
        case Open():
            head, tail = opened(n, w), opened(*rest)
            term.bound = joined((head, tail))
            return head, tail
        case Given():
            if any(i >= w for i in term.index[:n]) or any(i < w for i in term.index[n:]):
                raise Clash(f"a cut at {n} -> {w} separates entries that the index map mixes")
            return given(term.index[:n], w), given((i - w for i in term.index[n:]), rest[1])
        case Joined():
            return _cut_parts(term, n, w)
        case Product():
            return _cut_product(term, n, w)


def factor(term: Term, n: int, w: int) -> tuple[Term, Term]:
    """Write a term as ``product((lead, trail))`` with a trailing factor of size (n, w)."""
    term = resolve(term)
    if not _divides((n, w), (term.n, term.w)):
        raise Clash(f"an axis growing {term.n} -> {term.w} has no factor growing {n} -> {w}")
    if term.w == 0:
        raise Clash("an empty axis has no factors")
    lead = (term.n // n, term.w // w)
    if (n, w) == (1, 1):
        return term, Same(1)
    if lead == (1, 1):
        return Same(1), term
    match term:
        case Same():
            return Same(lead[0]), Same(n)
        case Copies():
            return copies(*lead), copies(n, w)
        case Open():
            halves = opened(*lead), opened(n, w)
            term.bound = product(halves)
            return halves
        case Given():
            index = np.asarray(term.index).reshape(lead[0], n)
            outer, inner = index[:, 0] // w, index[0] % w
            if not np.array_equal(outer[:, None] * w + inner[None, :], index):
                raise Clash("an index map does not split into the factors of a reshape")
            return given(outer, lead[1]), given(inner, w)
        case Joined():
            pairs = [factor(part, n, w) for part in _parts(term)]
            for _, trail in pairs[1:]:
                unify(pairs[0][1], trail)
            return joined(head for head, _ in pairs), pairs[0][1]
        case Product():
            *front, last = _factors(term)
            if (last.n, last.w) == (n, w):
                return product(front), last
            if _divides((last.n, last.w), (n, w)):
                head, middle = factor(product(front), n // last.n, w // last.w)
                return head, product((middle, last))
            head, trail = factor(last, n, w)
            return product((*front, head)), trail


def factors(term: Term, sizes: Iterable[tuple[int, int]]) -> list[Term]:
    """Split a term into factors of the given sizes, in row-major order."""
    out: list[Term] = []
    rest = term
    for n, w in reversed(list(sizes)):
        rest, trail = factor(rest, n, w)
        out.append(trail)
    if (rest.n, rest.w) != (1, 1):
        raise Clash("factors do not make up the axis")
    return out[::-1]


def index_map(term: Term) -> np.ndarray:
    """The map as an index array of n entries; undecided terms become the leading block."""
    term = resolve(term)
    match term:
        case Given():
            return np.asarray(term.index, dtype=np.int64)
        case Joined():
            offsets = np.cumsum([0, *(part.w for part in term.parts)])
            return np.concatenate([index_map(part) + offset for part, offset in zip(term.parts, offsets, strict=False)])
        case Product():
            out = np.zeros(1, dtype=np.int64)
            for part in term.factors:
                out = (out[:, None] * part.w + index_map(part)[None, :]).reshape(-1)
            return out
        case _:
            return np.arange(term.n, dtype=np.int64)


def _parts(term: Term) -> list[Term]:
    term = resolve(term)
    if isinstance(term, Joined):  # later bindings may have turned a part into a join
        return [piece for part in term.parts for piece in _parts(part)]
    return [term]


def _factors(term: Term) -> list[Term]:
    term = resolve(term)
    if isinstance(term, Product):
        return [piece for part in term.factors for piece in _factors(part)]
    return [term]


def _divides(small: tuple[int, int], big: tuple[int, int]) -> bool:
    if 0 in small or big[0] % small[0] or big[1] % small[1]:
        return False
    return small[0] <= small[1] and big[0] // small[0] <= big[1] // small[1]


def _fits(p: Term, q: Term) -> bool:
    return p.n <= q.n and p.w <= q.w


def _unify_parts(left: list[Term], right: list[Term]) -> None:
    while left and right:
        p, q = left[0], right[0]
        if not _fits(p, q):
            if not _fits(q, p):
                raise Clash("two concatenations have parts in a different order")
            left, right, p, q = right, left, q, p
        head, tail = cut(q, p.n, p.w)
        unify(p, head)
        left = left[1:]
        right = right[1:] if (tail.n, tail.w) == (0, 0) else [tail, *right[1:]]
    if any(part.w for part in (*left, *right)):
        raise Clash("two concatenations differ in size")


def _unify_factors(left: list[Term], right: list[Term]) -> None:
    while left and right:
        p, q = left[-1], right[-1]
        if not _divides((p.n, p.w), (q.n, q.w)):
            if not _divides((q.n, q.w), (p.n, p.w)):
                raise Clash("a reshape orders the entries of a growing axis in another way")
            left, right, p, q = right, left, q, p
        lead, trail = factor(q, p.n, p.w)
        unify(p, trail)
        left = left[:-1]
        right = right[:-1] if (lead.n, lead.w) == (1, 1) else [*right[:-1], lead]
    if any((part.n, part.w) != (1, 1) for part in (*left, *right)):
        raise Clash("two reshapes differ in size")


def _cut_parts(term: Joined, n: int, w: int) -> tuple[Term, Term]:
    head: list[Term] = []
    tail = _parts(term)
    while tail and tail[0].n <= n and tail[0].w <= w:
        part = tail.pop(0)
        head.append(part)
        n, w = n - part.n, w - part.w
    if (n, w) != (0, 0):
        first, second = cut(tail.pop(0), n, w)
        head.append(first)
        tail.insert(0, second)
    return joined(head), joined(tail)


def _cut_product(term: Product, n: int, w: int) -> tuple[Term, Term]:
    first, *rest = _factors(term)
    inner = product(rest)
    if inner.n == 0:
        raise Clash("an empty axis cannot be cut")
    (rows_n, n), (rows_w, w) = divmod(n, inner.n), divmod(w, inner.w)
    before, after = cut(first, rows_n, rows_w)
    if (n, w) == (0, 0):
        return product((before, inner)), product((after, inner))
    # The cut is inside one row, which must be the same row of both axes.
    _, after = cut(after, 1, 1)
    head, tail = cut(inner, n, w)
    return joined((product((before, inner)), head)), joined((tail, product((after, inner))))
