"""WidenMaps: the maps between the variables of a narrow network and those of a wider one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from pae_jax.errors import StructureError
from pae_jax.trees import path_name
from pae_jax.widening import serial
from pae_jax.widening.axismaps import ArrayMap
from pae_jax.widening.report import WidenReport
from pae_jax.widening.trees import Skeleton, rebuild
from pae_jax.widening.values import Reason


@dataclasses.dataclass(frozen=True)
class WidenMaps:
    """Positions of all entries of a narrow network's variables in a wider network.

    `put` and `take` work on any tree whose leaf paths were analysed, with any dtype: weights, owners, masks. They are
    static inside `jax.jit`, compare by value and are hashable.

    Attributes:
      leaves: pairs (leaf path, its map), in the order of the variables.
      output_maps: maps of the function's outputs, flattened.
      output_skeleton: outline of its output tree.
      reasons: why the function is not preserved, one per place; empty if it is.
      zero_leaves: leaves whose new entries must be 0, see `WidenReport`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from pae_jax.widening import widen_maps
      >>> apply = lambda v, x: jnp.tanh(x @ v["k"])
      >>> shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
      >>> maps = widen_maps(apply, {"k": shape(3, 2)}, apply, {"k": shape(3, 4)}, shape(1, 3))
      >>> maps
      WidenMaps(1 leaf, 1 grows; 1 distinct map; preserved)
      >>> maps.put({"k": jnp.ones((3, 2))})["k"][0].tolist()
      [1.0, 1.0, 0.0, 0.0]
      >>> maps.outputs.axes[1].index.tolist()
      [0, 1]
    """

    leaves: tuple[tuple[str, ArrayMap], ...]
    output_maps: tuple[ArrayMap, ...]
    output_skeleton: Skeleton
    reasons: tuple[Reason, ...] = ()
    zero_leaves: tuple[str, ...] = ()

    @functools.cached_property
    def _by_path(self) -> Mapping[str, ArrayMap]:
        return dict(self.leaves)

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.leaves, self.output_maps, self.output_skeleton, self.reasons, self.zero_leaves))

    def __getitem__(self, path: str) -> ArrayMap:
        """The map of one leaf, by its path."""
        if path not in self._by_path:
            raise StructureError("widening maps", path, "no such leaf", f"one of {', '.join(self._by_path)}")
        return self._by_path[path]

    @property
    def preserved(self) -> bool:
        """Whether the wide function with the narrow weights computes the narrow function."""
        return not self.reasons

    @functools.cached_property
    def report(self) -> WidenReport:
        """The full report as text: `print(maps.report)`."""
        return WidenReport(self.leaves, self.reasons, self.zero_leaves)

    @property
    def is_identity(self) -> bool:
        """Whether no axis grows."""
        return all(leaf.is_identity for _, leaf in self.leaves)

    @property
    def outputs(self) -> Any:
        """Maps of the function's outputs, as a tree of `ArrayMap` like the output itself."""
        return rebuild(self.output_skeleton, self.output_maps)

    def put(self, tree: Any, into: Any = None) -> Any:
        """Place a narrow tree into the wide shapes.

        Args:
          tree: pytree of narrow arrays, leaf paths among the analysed ones.
          into: wide tree of the same structure whose entries fill the new positions; None fills them with 0.
        Returns: wide tree of the structure of `tree`.
        Raises:
          StructureError: an unknown leaf, or one of another shape or dtype.
        """
        if into is None:
            return jax.tree_util.tree_map_with_path(lambda path, x: self._move(path, x, "narrow").put(x), tree)
        if jax.tree.structure(tree) != jax.tree.structure(into):
            raise StructureError("into", "", jax.tree.structure(into), jax.tree.structure(tree))

        def put(path: Any, x: Any, base: Any) -> Any:
            leaf = self._move(path, x, "narrow")
            self._move(path, base, "wide")
            if x.dtype != base.dtype:
                raise StructureError("into", path_name(path), base.dtype, x.dtype)
            return leaf.put(x, base)

        return jax.tree_util.tree_map_with_path(put, tree, into)

    def take(self, tree: Any) -> Any:
        """Gather the narrow entries of a wide tree; the inverse of `put`, bit for bit.

        Args:
          tree: pytree of wide arrays, leaf paths among the analysed ones.
        Returns: narrow tree of the structure of `tree`.
        Raises:
          StructureError: an unknown leaf, or one of another shape.
        """
        return jax.tree_util.tree_map_with_path(lambda path, x: self._move(path, x, "wide").take(x), tree)

    def then(self, other: WidenMaps) -> WidenMaps:
        """First these maps, then `other`: narrow -> middle -> wide.

        Raises:
          StructureError: `other` does not start where these maps end.
        """
        for path in dict.fromkeys((*self._by_path, *other._by_path)):
            mine, theirs = self._by_path.get(path), other._by_path.get(path)
            if mine is None or theirs is None or mine.wide != theirs.narrow:
                raise StructureError("maps to follow", path, theirs and theirs.narrow, mine and mine.wide)
        if self.output_skeleton != other.output_skeleton:
            raise StructureError("maps to follow", "outputs", other.output_skeleton, self.output_skeleton)
        return WidenMaps(
            leaves=tuple((path, leaf.then(other._by_path[path])) for path, leaf in self.leaves),
            output_maps=tuple(a.then(b) for a, b in zip(self.output_maps, other.output_maps, strict=True)),
            output_skeleton=self.output_skeleton,
            reasons=tuple(dict.fromkeys((*self.reasons, *other.reasons))),
            zero_leaves=tuple(sorted({*self.zero_leaves, *other.zero_leaves})),
        )

    def to_json(self) -> dict[str, Any]:
        """The maps as a JSON-able dict: runs in a table of distinct maps, leaves as indices into it."""
        return serial.encode(self.leaves, self.output_maps, self.output_skeleton, self.reasons, self.zero_leaves)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> WidenMaps:
        """Maps read from the result of `to_json`, without a new analysis."""
        return cls(**serial.decode(data))

    def __repr__(self) -> str:
        return f"WidenMaps({self.report.headline})"

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> Any:
        # Without cached values: hashes of strings differ between processes.
        return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def _move(self, path: Any, leaf: Any, side: str) -> ArrayMap:
        """The map of a leaf whose shape has been checked."""
        name = path_name(path)
        if name not in self._by_path:
            hint = f"Known leaves start with '{next(iter(self._by_path), '')}'."
            raise StructureError(f"{side} tree", name, "an unknown leaf", "a leaf of the analysed variables", hint)
        found, expected = tuple(np.shape(leaf)), getattr(self._by_path[name], side)
        if found != expected:
            raise StructureError(f"{side} tree", name, f"shape {found}", f"shape {expected}")
        return self._by_path[name]
