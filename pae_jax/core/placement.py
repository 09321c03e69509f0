"""Networks whose arrays are spread over several devices: who says where an array lies, and operations that keep it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from pae_jax.core.spread_arrays import is_spread, sharding_of
from pae_jax.core.state import State, TaskState
from pae_jax.errors import ArgumentError
from pae_jax.nets import Net
from pae_jax.trees import PARAMS, Tree, abstract, describe, flatten, path_name
from pae_jax.widening import WidenMaps, starts_at_zero

Placement = Callable[[str, Any], Sharding] | tuple[Mesh, Mapping[str, Any]]
"""Where the arrays of a network lie, as `init`, `load` and `read_bundle` take it.

Either a function `(path, leaf) -> jax.sharding.Sharding`, or `(mesh, specs)`: specs hold a PartitionSpec for each
variable that is split, by path or as a tree like the variables, and all others are whole on every device. Paths are
those of `pae.layout`, such as "params/Dense_0/kernel"; those of heads start with "head/", as "head/params/kernel".
"""


def planned(net: Net, state: State, placement: Placement) -> State:
    """Return a state of abstract arrays that have the shardings of a placement.

    Owners and picks lie as their weights. An axis of another array is whole if the devices do not divide it.

    Args:
      net: the network description.
      state: the network; its arrays may be abstract.
      placement: as described there.

    Raises:
      ArgumentError: it is no placement, names a variable that the network does not have, or the devices do not divide a
        shared weight.
    """
    layout = net.layout(state.width)
    known = {f"{PARAMS}/{path}" for path in flatten(layout.shared)} | flatten(layout.local).keys()
    rule = _rule(placement, known)

    def part(prefix: str, tree: Tree) -> Tree:
        def leaf(path: Any, value: Any) -> Any:
            return _placed(value, fitted(rule(prefix + path_name(path), value), value.shape))

        return jax.tree_util.tree_map_with_path(leaf, tree)

    def task(entry: TaskState) -> TaskState:
        # The picks of a stage that is still to be read are one array of bits.
        whole = entry.pick is None or isinstance(entry.pick, jax.ShapeDtypeStruct)
        pick = entry.pick if whole else part(f"{PARAMS}/", entry.pick)
        return entry.replace(local=part("", entry.local), head=part("head/", entry.head), pick=pick)

    for path, leaf in flatten(state.shared).items():
        _require_divided(f"'{path}' is", leaf, rule(f"{PARAMS}/{path}", leaf))
    shared = part(f"{PARAMS}/", state.shared)
    return state.replace(
        shared=shared,
        owner=jax.tree.map(lambda ids, weight: _placed(ids, weight.sharding), state.owner, shared),
        local=None if state.local is None else part("", state.local),
        tasks={name: task(entry) for name, entry in state.tasks.items()},
    )


def place(net: Net, state: State, placement: Placement | None) -> State:
    """Return the state with its arrays where a placement says; None leaves them where they are."""
    if placement is None:
        return state

    def move(leaf: Any, target: Any) -> Any:
        return jax.device_put(leaf, target.sharding) if isinstance(target, jax.ShapeDtypeStruct) else leaf

    return jax.tree.map(move, state, planned(net, state, placement))


def drawn(net: Net, key: jax.Array, width: float, placement: Placement | None) -> tuple[Tree, Tree]:
    """Return `net.initial(key, width)`; with a placement no device makes the whole network."""
    if placement is None:
        return net.initial(key, width)
    layout = net.layout(width)
    plan = planned(net, State(layout.shared, layout.shared, {}, width, local=layout.local), placement)
    return _drawn(net, key, width, jax.tree.map(lambda leaf: leaf.sharding, (plan.shared, plan.local)))


def drawn_wider(net: Net, key: jax.Array, width: float, state: State) -> tuple[Tree, Tree]:
    """Return `net.initial(key, width)`, spread as the arrays of a narrower state.

    Raises:
      ArgumentError: the devices do not divide a shared weight of this width.
    """
    if not is_spread(state.shared):
        return net.initial(key, width)
    layout = net.layout(width)
    for (path, leaf), wide in zip(flatten(state.shared).items(), jax.tree.leaves(layout.shared), strict=True):
        _require_divided(f"width {width:g} makes '{path}'", wide, sharding_of(leaf))
    local = layout.local if state.local is None else state.local

    def like(tree: Tree, wide: Tree) -> Tree:
        return jax.tree.map(lambda leaf, new: _automatic(fitted(sharding_of(leaf), new.shape)), tree, wide)

    return _drawn(net, key, width, (like(state.shared, layout.shared), like(local, layout.local)))


def _drawn(net: Net, key: jax.Array, width: float, shardings: Any) -> tuple[Tree, Tree]:
    return jax.jit(lambda key: net.initial(key, width), out_shardings=shardings)(key)


def fitted(sharding: Any, shape: tuple[int, ...]) -> Any:
    """Return a sharding for another shape: an axis that the devices do not divide is not split."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    mesh = sharding.mesh
    spec = [e if size % _parts(mesh, e) == 0 else None for e, size in zip(sharding.spec, shape, strict=False)]
    return NamedSharding(mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)


def beside(tree: Tree, state: State) -> Tree:
    """Return new arrays of a task, whole on every device of the mesh on which the network's weights are spread."""
    found = (sharding_of(leaf) for leaf in jax.tree.leaves(state.shared))
    mesh = next((sharding.mesh for sharding in found if isinstance(sharding, NamedSharding)), None)
    if mesh is None:
        return tree
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: jax.device_put(leaf, whole) if sharding_of(leaf) is None else leaf, tree)


def automatic(tree: Tree) -> Tree:
    """Return spread arrays on meshes of automatic axes, so that the partitioner places what is computed from them.

    Nothing is copied. With explicit axes, as `jax.make_mesh` makes them, each operation would have to place its result.
    """
    return jax.tree.map(lambda leaf: _put(leaf, _automatic(sharding_of(leaf))), tree)


def widened(maps: WidenMaps, tree: Tree, into: Tree | None = None) -> Tree:
    """Return `maps.put(tree, into)`; spread arrays stay split along the same axes where the devices divide them."""
    if not is_spread(tree):
        return maps.put(tree, into)
    targets = _targets(tree, jax.eval_shape(maps.put, abstract(tree), abstract(into)))
    return _back(_widened(maps, tuple(map(_automatic, targets)), automatic(tree), automatic(into)), targets)


def local_widened(maps: WidenMaps, local: Tree, fresh: Tree) -> Tree:
    """Return local variables in the wide network; new entries are fresh, or 0 where the analysis assumes 0."""

    def leaf(path: Any, value: jax.Array) -> jax.Array:
        name = path_name(path)
        return jnp.zeros_like(value) if name in maps.zero_leaves or starts_at_zero(name, value) else value

    return widened(maps, local, jax.tree_util.tree_map_with_path(leaf, fresh))


def gathered(maps: tuple[WidenMaps, ...], tree: Tree) -> Tree:
    """Return what a chain of maps takes from a tree; spread arrays stay split, as in `widened`.

    The layout depends on that of the whole arrays alone. So a task runs the same compiled program whatever was done to
    the network since.
    """
    if not maps or not is_spread(tree):
        return _chain(maps, tree)
    targets = _targets(tree, jax.eval_shape(partial(_chain, maps), abstract(tree)))
    return _back(_gathered(maps, tuple(map(_automatic, targets)), automatic(tree)), targets)


def _chain(maps: tuple[WidenMaps, ...], tree: Tree) -> Tree:
    for one in maps:
        tree = one.take(tree)
    return tree


@partial(jax.jit, static_argnames=("maps", "targets"))
def _widened(maps: WidenMaps, targets: tuple[Any, ...], tree: Tree, into: Tree | None) -> Tree:
    return _constrained(maps.put(tree, into), targets)


@partial(jax.jit, static_argnames=("maps", "targets"))
def _gathered(maps: tuple[WidenMaps, ...], targets: tuple[Any, ...], tree: Tree) -> Tree:
    return _constrained(_chain(maps, tree), targets)


def _constrained(tree: Tree, targets: tuple[Any, ...]) -> Tree:
    leaves, structure = jax.tree.flatten(tree)
    pairs = zip(leaves, targets, strict=True)
    return structure.unflatten([x if t is None else lax.with_sharding_constraint(x, t) for x, t in pairs])


def _targets(tree: Tree, shapes: Tree) -> tuple[Any, ...]:
    """Return how the counterparts of other shapes are spread; None for what is not."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shapes), strict=True)
    return tuple(fitted(sharding_of(leaf), other.shape) for leaf, other in pairs)


def _back(tree: Tree, targets: tuple[Any, ...]) -> Tree:
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(map(_put, leaves, targets))


def _put(leaf: Any, sharding: Any) -> Any:
    return leaf if sharding is None else jax.device_put(leaf, sharding)


def _automatic(sharding: Any) -> Any:
    if not isinstance(sharding, NamedSharding):
        return sharding
    assert isinstance(sharding.mesh, Mesh)
    mesh = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)
    return NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)


def _placed(leaf: Any, sharding: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_automatic(sharding))


def _parts(mesh: Mesh | AbstractMesh, entry: Any) -> int:
    """Return into how many parts an axis with this entry in a PartitionSpec is split."""
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return math.prod(mesh.shape[name] for name in names)


def _require_divided(what: str, leaf: Any, sharding: Any) -> None:
    if fitted(sharding, leaf.shape) != sharding:
        raise ArgumentError(
            f"{what} {describe(leaf)}, which {sharding.spec} on a mesh of {dict(sharding.mesh.shape)} does not divide. "
            "Split another axis, or take a width whose channels are a multiple of the devices along it."
        )


def _rule(placement: Any, known: Collection[str]) -> Callable[[str, Any], Any]:
    """Return a placement as a function of path and leaf, checked."""
    if callable(placement) and not isinstance(placement, Mesh):
        return lambda path, leaf: _checked(path, placement(path, leaf))
    if not (isinstance(placement, tuple) and len(placement) == 2 and isinstance(placement[0], Mesh)):
        raise ArgumentError(
            f"sharding must be a function (path, leaf) -> jax.sharding.Sharding, or (mesh, specs), found {placement!r}"
        )
    mesh, tree = placement
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None or isinstance(x, PartitionSpec))
    specs = {path_name(path): PartitionSpec() if spec is None else spec for path, spec in leaves}
    for path, spec in specs.items():
        if not isinstance(spec, PartitionSpec):
            raise ArgumentError(f"the spec of '{path}' must be a jax.sharding.PartitionSpec, found {spec!r}")
        if path not in known and not path.startswith("head/"):
            raise ArgumentError(f"specs names '{path}', which the network does not have; see print(pae.layout(net))")
        try:
            NamedSharding(mesh, spec)
        except ValueError as error:
            raise ArgumentError(f"the spec of '{path}' does not fit the mesh: {error}") from error
    return lambda path, leaf: NamedSharding(mesh, specs.get(path, PartitionSpec()))


def _checked(path: str, sharding: Any) -> Any:
    if not isinstance(sharding, Sharding) or isinstance(getattr(sharding, "mesh", None), AbstractMesh):
        raise ArgumentError(
            f"sharding({path!r}, leaf) must return a jax.sharding.Sharding on devices, found {sharding!r}"
        )
    return sharding
