"""Placement of arrays for training on several devices: the batch is split, and optionally the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pae_jax.checks import check_count
from pae_jax.core import spread_arrays
from pae_jax.errors import ArgumentError, DataError
from pae_jax.trees import Tree


@dataclass(frozen=True)
class Devices:
    """How `fit` and `learn` use the devices.

    Attributes:
      mesh: devices that share the work, as `jax.make_mesh` makes them; all axes together split the batch. The result
        equals that of one device up to the order of summation, and is placed on the devices of the state's arrays.
        None: one device.
      split_weights: with a mesh, whether weights, owners, picks and optimizer state are split over the devices as well,
        each array along its longest axis that the number of devices divides; otherwise every device has a full copy.
      steps_per_call: train steps in one call to the device, for data in arrays, which then stay on the device. None
        takes 1 on a CPU, where loops inside a program are slow, and up to 50 elsewhere.

    Raises:
      ArgumentError: weights to split and no mesh, or a number of steps below 1.

    Example:
      >>> import jax, pae_jax as pae
      >>> pae.Devices(jax.make_mesh((1,), ("data",))).mesh.size
      1
    """

    mesh: Mesh | None = None
    split_weights: bool = False
    steps_per_call: int | None = None

    def __post_init__(self) -> None:
        if self.mesh is None and self.split_weights:
            raise ArgumentError("split_weights splits over the devices of a mesh; pass mesh= as well")
        if self.mesh is not None and not isinstance(self.mesh, Mesh):
            raise ArgumentError(f"mesh must be a jax.sharding.Mesh, found {type(self.mesh).__name__}")
        if self.mesh is not None:
            # The partitioner places intermediate arrays; with a mesh of explicit axes the model would have to.
            object.__setattr__(self, "mesh", Mesh(self.mesh.devices, self.mesh.axis_names))
        if self.steps_per_call is not None:
            check_count("steps_per_call", self.steps_per_call, 1)
        if self.mesh is not None and (self.steps_per_call or 1) > 1:
            raise ArgumentError("steps_per_call above 1 needs data in arrays and no mesh")

    def check_batch(self, size: int) -> None:
        """Raise `ArgumentError` unless the devices divide a batch size."""
        if self.mesh is not None and size % self.mesh.size:
            raise ArgumentError(
                f"the {self.mesh.size} devices of the mesh must divide the batch, found {size} examples"
            )

    def sharding(self, leaf: Any) -> NamedSharding:
        """Return the layout of an array of the training state."""
        assert self.mesh is not None
        axes = [axis for axis, size in enumerate(leaf.shape) if size % self.mesh.size == 0]
        if not self.split_weights or len(leaf.shape) < 2 or not axes:
            return NamedSharding(self.mesh, PartitionSpec())
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(self.mesh, PartitionSpec(*[None] * longest, self.mesh.axis_names))

    def place(self, tree: Tree) -> Tree:
        """Place the arrays of a training state on the devices."""
        if self.mesh is None:
            return tree
        return jax.tree.map(lambda leaf: self._put(leaf, self.sharding(leaf)), tree)

    def batch(self, tree: Tree) -> Tree:
        """Split a batch along its leading axis."""
        if self.mesh is None:
            return tree
        split = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
        for leaf in jax.tree.leaves(tree):
            if len(leaf) % self.mesh.size:
                raise DataError(
                    f"a batch of {len(leaf)} examples, which the {self.mesh.size} devices of the mesh do not divide. "
                    "Leave a smaller last batch out (drop_remainder=True), or choose another batch size."
                )
        return jax.tree.map(lambda leaf: self._put(leaf, split), tree)

    def _put(self, leaf: Any, sharding: NamedSharding) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.jit(lambda whole: whole, out_shardings=sharding)(leaf)
        # Every process of a distributed run has the same values and provides the shards of its own devices.
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = self._put(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    def put_back(self, tree: Tree, before: Tree) -> Tree:
        """Return a tree placed on the devices of the arrays of another tree with equal shapes.

        Without a mesh only arrays that are spread over devices are placed: their layout is kept.
        """

        def leaf(new: jax.Array, old: jax.Array) -> jax.Array:
            if isinstance(old, jax.Array) and len(old.sharding.device_set) > 1:
                return jax.device_put(new, old.sharding)
            if self.mesh is None:
                return new
            # An array not committed to a device stays uncommitted, because compiled functions compile again for
            # committed ones.
            return jnp.asarray(spread_arrays.whole(new))

        return jax.tree.map(leaf, tree, before)


def devices_of(devices: Devices | Mesh | None) -> Devices:
    """Convert an argument `devices` (None, a mesh or `Devices`) to `Devices`."""
    if devices is None or isinstance(devices, Mesh):
        return Devices(devices)
    if not isinstance(devices, Devices):
        raise ArgumentError(f"devices must be a jax.sharding.Mesh or pae.Devices, found {devices!r}")
    return devices
