"""A state from what the checkpoints of the authors hold: kernels, masks of owners, and the variables of each task."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.checks import check_choice, check_name, check_width
from pae_jax.core import Growth, Picking, State, TaskState, freeze, integrity, layout_of, ownership
from pae_jax.errors import ArgumentError, StructureError
from pae_jax.faces.placing import nest
from pae_jax.nets import Net, features_function, heads
from pae_jax.trees import PARAMS, Tree, abstract, describe, flatten, merge
from pae_jax.widening import WidenMaps, widen_maps


@dataclasses.dataclass(frozen=True)
class Member:
    """A task of a checkpoint.

    Attributes:
      name: its name in the state.
      head: as in `pae.pack`.
      width: width of its network.
      sharing: which older weights it sees.
    """

    name: str
    head: Any
    width: float
    sharing: str

    def __post_init__(self) -> None:
        check_name(self.name)
        check_choice("sharing", self.sharing, ("all", "first", "picked"))
        object.__setattr__(self, "head", heads.check_head(self.head))
        object.__setattr__(self, "width", check_width(self.width))


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    """Widths of a network whose tasks grew it, and the order of their channels in the authors' arrays.

    When a network grows, the authors append the new channels of all branches behind the old ones; here each branch
    keeps its channels together. The maps of the expansions say where the old ones are.

    Attributes:
      net: the network.
      widths: distinct, rising.
      growth: one record for each expansion.
    """

    net: Net
    widths: tuple[float, ...]
    growth: tuple[Growth, ...]

    @property
    def width(self) -> float:
        """The last width, of which the arrays of shared weights are."""
        return self.widths[-1]

    def variables(self, width: float) -> dict[str, Any]:
        """Return shape and dtype of the backbone's variables at a width, by path."""
        layout = self.net.layout(width)
        return flatten(merge(layout.shared, layout.local))

    def placed(self, path: str, array: np.ndarray, width: float) -> np.ndarray:
        """Return an array of the authors, of one of the widths, with its channels in our order."""
        orders = [np.arange(size) for size in array.shape]
        for growth in self.growth[: self.widths.index(width)]:
            for axis, places in enumerate(dict(growth.maps.leaves)[path].axes):
                old = places.index[orders[axis][: places.narrow]]
                orders[axis] = np.concatenate([old, np.setdiff1d(np.arange(places.wide), old)])
        out = np.empty_like(array)
        out[np.ix_(*orders)] = array
        return out


def require_order(members: Sequence[Member]) -> None:
    """Raise `ArgumentError` unless there are tasks, whose widths do not fall."""
    if not members:
        raise ArgumentError("name at least one task of the checkpoint, in the order of learning; found none")
    for before, after in itertools.pairwise(members):
        if after.width < before.width:
            raise ArgumentError(
                f"widths may not fall from task to task, found {before.width:g} for {before.name!r} and then "
                f"{after.width:g} for {after.name!r}; give them in the order of learning"
            )


def frame(net: Net, members: Sequence[Member]) -> Frame:
    """Return the widths that the tasks had, and the maps between them.

    Raises:
      ArgumentError: a width that changes no layer.
      StructureError: the network cannot be widened as the authors widen theirs.
    """
    widths = tuple(dict.fromkeys(member.width for member in members))
    growth = tuple(Growth(a, b, _maps(net, a, b)) for a, b in itertools.pairwise(widths))
    return Frame(net, widths, growth)


def _maps(net: Net, narrow: float, wide: float) -> WidenMaps:
    layouts = [net.layout(width) for width in (narrow, wide)]
    variables = [merge(layout.shared, layout.local) for layout in layouts]
    functions = [features_function(net, width) for width in (narrow, wide)]
    maps = widen_maps(functions[0], variables[0], functions[1], variables[1], net.sample)
    if maps.is_identity:
        raise ArgumentError(f"width {wide:g} changes no layer of {net.source} compared with {narrow:g}")
    if not maps.preserved:
        found = f"at width {wide:g} another function of the old weights: {maps.reasons[0]}"
        raise StructureError("network", "", found, f"the function of width {narrow:g}")
    return maps


def assemble(
    frame: Frame,
    members: Sequence[Member],
    shared: Mapping[str, np.ndarray],
    owner: Mapping[str, np.ndarray],
    local: Sequence[Mapping[str, np.ndarray]],
    head: Sequence[Tree],
    pick: Sequence[Tree | None],
) -> State:
    """Return a state with frozen tasks.

    Args:
      frame: widths and maps.
      members: the tasks in order of learning.
      shared: weights by path "params/...", in our order.
      owner: ids of the owners, by the same paths.
      local: local variables of each task by path, at its width.
      head: variables of each task's head.
      pick: scores of each task's picks at its width, parallel to the shared weights; None if it does not pick.

    Raises:
      StructureError: a mask with an id that no task has, or a task that owns weights outside of its width.
    """
    ids = {path: _ids(path, array, members) for path, array in owner.items()}
    trees = {name: nest(flat)[PARAMS] for name, flat in (("shared", shared), ("owner", ids))}
    weights, owners = (jax.tree.map(jnp.asarray, trees[name]) for name in ("shared", "owner"))
    fresh = nest({path: _fresh(path, leaf) for path, leaf in flatten(frame.net.layout(frame.width).local).items()})
    state = State(
        shared=weights,
        owner=owners,
        tasks={},
        width=frame.width,
        growth=frame.growth,
        local=fresh,
        layout=layout_of(shared=weights, local=fresh),
    )
    for number, member in enumerate(members, start=1):
        variables = jax.tree.map(jnp.asarray, nest(local[number - 1]))
        own, scores = head[number - 1], pick[number - 1]
        entry = TaskState(
            local=variables,
            head=own,
            digests=integrity.no_digests(weights, variables, own, scores),
            pick=scores,
            id=number,
            width=member.width,
            head_spec=member.head,
            layout=layout_of(local=variables, head=own),
            sharing=member.sharing,
            picking=Picking() if member.sharing == "picked" else None,
        )
        _require_inside(state, member, entry)
        state = freeze(state.replace(tasks={**state.tasks, member.name: entry}), member.name)
    integrity.check(state, frame.net)
    return state


def without_free(weights: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return weights with 0 where a mask names no owner; of another shape, as they are: `converted` refuses them."""
    return np.where(mask != 0, weights, np.zeros((), weights.dtype)) if weights.shape == mask.shape else weights


def head_variables(net: Net, member: Member, arrays: Tree, source: str) -> Tree:
    """Return the variables of a head, which must be those of the head that was asked for."""
    wanted, _ = heads.layout(net, member.head, member.width)
    found = jax.tree.map(jnp.asarray, arrays)
    if abstract(found) != abstract(wanted):
        hint = "Give each task in heads the number of classes of its head, or None to leave it out."
        raise StructureError(source, f"head of task {member.name!r}", _sketch(found), _sketch(wanted), hint)
    return found


def _sketch(tree: Tree) -> str:
    return ", ".join(f"{path} {describe(leaf)}" for path, leaf in flatten(tree).items()) or "nothing"


def _ids(path: str, array: np.ndarray, members: Sequence[Member]) -> np.ndarray:
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low < 0 or high > len(members):
        hint = "Name every task of the checkpoint, in the order of learning."
        raise StructureError("mask", path, f"ids {low}..{high}", f"ids in 0..{len(members)}", hint)
    return array.astype(np.int8)


def _fresh(path: str, leaf: Any) -> jax.Array:
    """Return what a new task's local variable starts from: scales and variances 1, all else 0, as in PAE."""
    return jnp.asarray(np.full(leaf.shape, path.rpartition("/")[2] in ("scale", "var"), leaf.dtype))


def _require_inside(state: State, member: Member, entry: TaskState) -> None:
    """Raise unless all weights of a task lie at its own width."""
    inside = flatten(ownership.at_width(state, state.owner, entry.width))
    for path, ids in flatten(state.owner).items():
        outside = np.count_nonzero(np.asarray(ids) == entry.id) - np.count_nonzero(np.asarray(inside[path]) == entry.id)
        if outside:
            found, expected = f"{outside} weights of task {member.name!r}", f"none outside of its width {entry.width:g}"
            raise StructureError("mask", path, found, expected, "Are these the widths that the tasks were trained at?")
