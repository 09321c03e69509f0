"""Facts about one pair of arrays, and reasons why a pair may not agree."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from pae_jax.widening.ranges import UNKNOWN, Range
from pae_jax.widening.terms import Same, Term, grows

NO_REASONS: frozenset[Reason] = frozenset()


@dataclasses.dataclass(frozen=True)
class Reason:
    """One operation where the widened network would not compute the narrow function.

    Attributes:
      where: layer, from the name scopes of the program ("Block_0/LayerNorm_0"); "" outside of any layer.
      primitive: the JAX operation at that place.
      leaf: path of the nearest upstream parameter; "" if none.
      problem: what would change.
      remedy: what to do about it.
      source: "file.py:line" of the call, or "" if it is not known.
    """

    where: str
    primitive: str
    leaf: str
    problem: str
    remedy: str
    source: str

    def __str__(self) -> str:
        place = self.where or "the model"
        leaf = f", fed by '{self.leaf}'" if self.leaf else ""
        source = f" at {self.source}" if self.source else ""
        return f"{place} ({self.primitive}{source}{leaf}): {self.problem}. What to do: {self.remedy}."


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A narrow array N and its wide counterpart W.

    With m the product of the axis maps, W[m(i)] equals N[i] for every i, up to summation order, unless `reasons` is not
    empty. A cell of W is new if a coordinate of it on some growing axis is outside of that axis' map.

    Attributes:
      axes: one term per axis.
      old: range of the entries of N, hence of the old cells of W.
      new: range of the new cells of W; meaningless if no axis grows.
      reasons: why W may disagree.
      leaf: path of the nearest upstream parameter, for messages.
      content: the arrays N and W themselves if they are known, small and integer (indices).
      peak: softmax bookkeeping, see `rules.softmax`.
    """

    axes: tuple[Term, ...]
    old: Range = UNKNOWN
    new: Range = UNKNOWN
    reasons: frozenset[Reason] = NO_REASONS
    leaf: str = ""
    content: tuple[np.ndarray, np.ndarray] | None = None
    peak: Peak | None = None

    @property
    def narrow(self) -> tuple[int, ...]:
        return tuple(axis.n for axis in self.axes)

    @property
    def wide(self) -> tuple[int, ...]:
        return tuple(axis.w for axis in self.axes)

    @property
    def growing(self) -> frozenset[int]:
        """Axes with new coordinates whose entries may differ from the old ones."""
        return frozenset(i for i, axis in enumerate(self.axes) if grows(axis))

    @property
    def unchanged(self) -> bool:
        """Whether both arrays have the same shape, so that they hold the same entries in the same order."""
        return self.narrow == self.wide

    def at(self, fresh: Iterable[int]) -> Range:
        """Range of the cells that are new along the axes `fresh` and old along all others."""
        return self.new if self.growing.intersection(fresh) else self.old


@dataclasses.dataclass(frozen=True, eq=False)
class Peak:
    """A value known relative to its maximum along some axes.

    kind "maximum": the maximum of `of` over `axes` (axes of `of`). kind "level": entries whose largest one along
    `axes` is exactly `level`. kind "masked": new cells are finite, or -inf where the old ones are.
    """

    kind: str
    axes: frozenset[int]
    of: Value | None = None
    level: float = 0.0


def subsets(items: Iterable[int]) -> Iterator[frozenset[int]]:
    """Every subset but the empty one."""
    items = tuple(items)
    for size in range(1, len(items) + 1):
        yield from map(frozenset, itertools.combinations(items, size))


def unchanged(shape: tuple[int, ...], **fields: object) -> Value:
    """A value none of whose axes grows."""
    return Value(tuple(Same(n) for n in shape), **fields)  # type: ignore[arg-type]
