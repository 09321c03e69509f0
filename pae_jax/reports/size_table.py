"""`Sizes`: a table of bytes with the kind of size, and the bytes of trees of arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from pae_jax.errors import UnknownTaskError
from pae_jax.reports.page import text_table
from pae_jax.trees import Tree

MB = 2**20
"""Bytes of the paper's MB."""

_BESIDES = ("shared", "inference", "whole_masks")


@dataclass(frozen=True)
class Sizes:
    """Bytes of a network; `str(sizes)` is a table that names its kind.

    Attributes:
      kind: "paper", "stored" or "dense".
      what: description of the counted items.
      rows: one dict per part: `part` (a task, or another part in parentheses), `bytes`, and the bytes of its
        components.
      notes: remarks on what is left out or differs.
    """

    kind: Literal["paper", "stored", "dense"]
    what: str
    rows: list[dict[str, Any]]
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Sum of `bytes` over all rows."""
        return sum(row["bytes"] for row in self.rows)

    def __getitem__(self, part: str) -> dict[str, Any]:
        """The row of a part."""
        for row in self.rows:
            if row["part"] == part:
                return row
        raise UnknownTaskError(part, [row["part"] for row in self.rows], "this table")

    def __str__(self) -> str:
        unit, size = ("MiB", MB) if self.total >= MB else ("KiB", 2**10)
        keys = list(dict.fromkeys(key for row in self.rows for key in row if key not in ("part", "bytes")))
        # The components of a row come before its sum, values for comparison after it.
        keys = [key for key in keys if key not in _BESIDES] + ["bytes"] + [key for key in keys if key in _BESIDES]
        rows = [*self.rows, {"part": "total", "bytes": self.total}]
        cells = [["", *(unit if key == "bytes" else key.replace("_", " ") for key in keys)]]
        cells += [[row["part"], *(f"{row[key] / size:,.3f}" if key in row else "" for key in keys)] for row in rows]
        head = f"{self.kind}: {self.what}, in {unit}"
        return "\n".join([head, text_table(cells[0], cells[1:]), *(f"- {note}" for note in self.notes)])


def itemsize(leaf: Any) -> int:
    """Return the bytes of one entry of an array."""
    return np.dtype(leaf.dtype).itemsize


def values(tree: Tree) -> int:
    """Count the entries of all arrays of a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def nbytes(tree: Tree) -> int:
    """Return the bytes of all arrays of a tree, concrete or abstract."""
    return sum(leaf.size * itemsize(leaf) for leaf in jax.tree.leaves(tree))
