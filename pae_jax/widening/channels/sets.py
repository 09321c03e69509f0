"""Sets: which coordinates of which axes of a program's arrays are in use. They only grow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pae_jax.widening.channels.known import Known, along
from pae_jax.widening.programs import literal


class Sets:
    """The coordinates in use, one bool vector per axis of each variable; kept entries are their product.

    Attributes:
      known: what is known about the values of variables.
      grew: whether a set has grown, or a variable has come into use, since this was last set to False.
    """

    def __init__(self, known: Mapping[Any, Known], whole: Mapping[Any, Sequence[int]]):
        """Start with nothing in use; `whole` lists axes that are in use whole or not at all."""
        self.known, self.grew = known, False
        self._whole, self._used = whole, set[Any]()
        self._table: dict[Any, list[np.ndarray]] = {}

    def __contains__(self, var: Any) -> bool:
        """Return whether the variable is in use."""
        return var in self._used

    def of(self, var: Any) -> list[np.ndarray]:
        """Return the sets of a variable, one bool vector per axis."""
        if var not in self._table:
            self._table[var] = [np.zeros(size, bool) for size in var.aval.shape]
        return self._table[var]

    def add(self, var: Any, axis: int, coordinates: np.ndarray) -> None:
        """Enlarge the set of an axis."""
        old = self.of(var)[axis]
        new = old | coordinates
        if (new != old).any():
            self._table[var][axis], self.grew = new, True

    def tie(self, *places: tuple[Any, int]) -> None:
        """Make the sets of axes of equal size one set."""
        union = np.logical_or.reduce([self.of(var)[axis] for var, axis in places])
        for var, axis in places:
            self.add(var, axis, union)

    def fill(self, var: Any, axes: Iterable[int] | None = None) -> None:
        """Use axes whole; all of them by default."""
        for axis in range(len(var.aval.shape)) if axes is None else axes:
            self.add(var, axis, np.ones(var.aval.shape[axis], bool))

    def use(self, var: Any) -> None:
        """Bring a variable into use; an axis of which no coordinate is in use keeps the first."""
        if literal(var) is not None:
            return
        if var not in self._used:
            self._used.add(var)
            self.grew = True
        self.fill(var, self._whole.get(var, ()))
        for axis, coordinates in enumerate(self.of(var)):
            if coordinates.size and not coordinates.any():
                self.add(var, axis, np.arange(coordinates.size) == 0)

    def nonzero(self, var: Any, axis: int, within: Sequence[int]) -> np.ndarray:
        """Return for each coordinate of an axis whether an entry there may differ from 0.

        Of the axes in `within` only coordinates in use count.
        """
        value = self.known.get(var)
        if value is None:
            return along(var, None, [axis])
        zero = value.zero
        for other in within:
            if zero.shape[other] != 1:
                zero = zero.compress(self.of(var)[other], axis=other)
        return along(var, Known(zero, np.zeros(zero.shape)), [axis])
