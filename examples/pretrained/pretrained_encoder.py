"""A pretrained encoder and the tasks it is taught, whatever the inputs are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

Inputs = Any
"""A tree of arrays (examples, ...)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """A pretrained encoder.

    Attributes:
      build: `width -> Linen module`.
      variables: its pretrained variables.
      sample: a batch of inputs, as for `pae.linen`.
      free_axes: axes of the inputs that may change from batch to batch.
      is_kernel: `path -> whether sparse changes may go there`, of paths such as "Block_1/Dense_in/kernel".
      lora: pattern of the layers that low-rank adapters change, by qwix; if it ends in "/kernel", of 1x1 kernels, which
        get adapters of our own.
      width: `number of tasks -> width` with room for new channels for each.
    """

    name: str
    build: Callable[[float], Any]
    variables: dict[str, Any]
    sample: Inputs
    free_axes: Sequence[int]
    is_kernel: Callable[[str], bool]
    lora: str
    width: Callable[[int], float]

    @property
    def size(self) -> int:
        """The number of features."""
        module = self.build(1.0)
        return jax.eval_shape(lambda v: module.apply(v, self.sample, train=False), self.variables).shape[-1]


@dataclasses.dataclass(frozen=True)
class Task:
    """A classification task; each part is `(x, y)` with y int32 (n,).

    Attributes:
      classes: number of classes.
    """

    name: str
    classes: int
    train: tuple[Inputs, np.ndarray]
    val: tuple[Inputs, np.ndarray]
    test: tuple[Inputs, np.ndarray]


def rows(x: Inputs, chosen: Any) -> Inputs:
    """Return some examples of inputs; `chosen` is a slice or an array of numbers."""
    return jax.tree.map(lambda array: array[chosen], x)


def flat(tree: Any) -> Any:
    """Return nested dicts as `{path: leaf}`."""
    return traverse_util.flatten_dict(tree, sep="/")


def nested(tree: Any) -> Any:
    """Undo `flat`."""
    return traverse_util.unflatten_dict(tree, sep="/")
