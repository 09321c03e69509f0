"""Type names for the arrays that the core takes and returns; the tests check them at run time.

Two trees of one call annotated with the same structure name must have the same structure: `PyTree[Float[...], "T"]` and
`PyTree[Int8[...], "T"]`.
"""

from __future__ import annotations

import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Float32, Int8, Int32, PyTree

AnyArray = Array | np.ndarray
FloatArray = Float[Array, "..."]
BoolArray = Bool[Array, "..."]

Weights = PyTree[Float[AnyArray, "..."], "T"]
"""Shared weights, a tree of float arrays."""

Owners = PyTree[Int8[AnyArray, "..."], "T"]
"""Owner ids, parallel to the weights: 0 is free, k is owned by task k."""

Masks = PyTree[Bool[AnyArray, "..."], "T"]
"""One bool for each weight."""

Scores = PyTree[Float32[AnyArray, "..."], "T"]
"""A real number for each weight that a task may pick."""

Signs = PyTree[Bool[AnyArray, "..."] | Int8[AnyArray, "..."], "T"]
"""Whether each older weight takes part; -1 where it does so with its sign turned."""

TaskId = Int8[Array, ""]
"""The id of a task as a traced operand."""

Counts = Int32[Array, " leaves"]
"""One number for each leaf of the weights, in the order of `jax.tree.leaves`."""

Pairs = PyTree[Int32[Array, "2"], "T"]
"""Two numbers for each leaf of the weights."""
