"""Where arrays live while training on many devices: the batch is split, weights may be split as well."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pae_jax.errors import ArgumentError
from pae_jax.trees import Tree


@dataclass(frozen=True)
class Placement:
    """How `fit` lays its arrays out over a mesh.

    Attributes:
      mesh: devices; all its axes together split the batch.
      split_weights: whether weights, owners, picks and optimizer state are split as well, each array along its
        longest axis that the number of devices divides; otherwise every device has all of them.
    """

    mesh: Mesh
    split_weights: bool = False

    def key(self) -> Hashable:
        """Return what distinguishes compiled steps."""
        return (self.mesh, self.split_weights)

    def check_batch(self, size: int) -> None:
        """Raise `ArgumentError` unless the devices divide a batch size."""
        if size % self.mesh.size:
            raise ArgumentError(
                f"the {self.mesh.size} devices of the mesh must divide the batch, found {size} examples"
            )

    def sharding(self, leaf: Any) -> NamedSharding:
        """Return the layout of an array of the training state."""
        axes = [axis for axis, size in enumerate(leaf.shape) if size % self.mesh.size == 0]
        if not self.split_weights or len(leaf.shape) < 2 or not axes:
            return NamedSharding(self.mesh, PartitionSpec())
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(self.mesh, PartitionSpec(*[None] * longest, self.mesh.axis_names))

    def place(self, tree: Tree) -> Tree:
        """Lay the arrays of a training state out."""
        return jax.tree.map(lambda leaf: self._put(leaf, self.sharding(leaf)), tree)

    def batch(self, tree: Tree) -> Tree:
        """Split a batch along its leading axis."""
        split = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
        return jax.tree.map(lambda leaf: self._put(leaf, split), tree)

    def _put(self, leaf: Any, sharding: NamedSharding) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.jit(lambda whole: whole, out_shardings=sharding)(leaf)
        # Every process of a distributed run has the same values and brings the pieces of its own devices.
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = self._put(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def placement_over(mesh: Mesh | None, split_weights: bool, batch_size: int) -> Placement | None:
    """Return the placement that the arguments `mesh` and `split_weights` ask for; None without a mesh.

    Raises:
      ArgumentError: weights to split and no mesh, or a batch that the devices do not divide.
    """
    if mesh is None:
        if split_weights:
            raise ArgumentError("split_weights splits over the devices of a mesh; pass mesh= as well")
        return None
    placement = Placement(mesh, split_weights)
    placement.check_batch(batch_size)
    return placement


def put_back(tree: Tree, before: Tree) -> Tree:
    """Return a tree where the arrays of another one of equal shapes live."""

    def leaf(new: jax.Array, old: jax.Array) -> jax.Array:
        if len(old.sharding.device_set) > 1:
            return jax.device_put(new, old.sharding)
        # An array that is not tied to a device stays so: compiled functions compile again for one that is.
        if not new.is_fully_addressable and not new.is_fully_replicated:
            new = multihost_utils.process_allgather(new, tiled=True)
        return jnp.asarray(np.asarray(new))

    return jax.tree.map(leaf, tree, before)
