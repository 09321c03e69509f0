"""The records of a lifelong network: `State`, `TaskState`, `Growth`, and look-ups in them."""

from __future__ import annotations

import html
import json
from typing import Any

import jax
import numpy as np
from flax import struct

from pae_jax.checks import is_traced
from pae_jax.core.picking import Picking
from pae_jax.core.spread_arrays import over_processes
from pae_jax.errors import ArgumentError, PhaseError, UnknownTaskError, kind_of
from pae_jax.html import ownership as ownership_bars
from pae_jax.trees import Tree, describe, flatten

MAX_TASKS = 127
"""Owner ids are int8; the 128th task is refused, never wrapped."""

SHARING = ("all", "first", "picked")


class TaskState(struct.PyTreeNode):
    """The record of one task: the arrays that only it uses, at the width it was packed at.

    Attributes:
      local: local variables of the backbone, `{collection: nested dict}`.
      head: variables of the task's output layer, `{collection: nested dict}`.
      digests: one row per array the task depends on: uint8 (arrays, 32), its SHA-256, once the task is frozen; bool,
        all False, before. So `freeze` does not change the tree structure, and frozen networks can be stacked.
      pick: tree parallel to the shared weights at the task's width: float32 scores while the task may be trained, bool
        (int8 if ternary) once frozen; None if there is no older weight to pick.
      id: owner id, 1 for the first task.
      width: width of the backbone the task runs at; never changes.
      head_spec: number of classes, or the Flax module, that builds the head; None for none.
      layout: dtype and shape of local variables and head, as they were packed; see `layout_of`.
      sharing: which older weights the task sees: "all", "first" (those of task 1) or "picked".
      picking: how it picks, with sharing "picked"; None otherwise.
      program: fingerprint of what it computes, by which `load` knows another model of the same shapes; "" if unknown.
    """

    local: Tree
    head: Tree
    digests: Any
    pick: Tree | None = None
    id: int = struct.field(pytree_node=False, kw_only=True)
    width: float = struct.field(pytree_node=False, kw_only=True)
    head_spec: Any = struct.field(pytree_node=False, kw_only=True)
    layout: str = struct.field(pytree_node=False, kw_only=True)
    sharing: str = struct.field(pytree_node=False, default="all")
    picking: Picking | None = struct.field(pytree_node=False, default=None)
    program: str = struct.field(pytree_node=False, default="")

    @property
    def frozen(self) -> bool:
        """Whether the task is frozen and can no longer change."""
        return self.digests.dtype == np.uint8

    @property
    def seeing(self) -> str:
        """What its forward pass sees: the sharing rule, or "masked" while picks also choose among its own weights."""
        masked = self.picking is not None and self.picking.own and self.pick is not None and not self.frozen
        return "masked" if masked else self.sharing

    @property
    def phase(self) -> str:
        """`"packed"` (trainable) or `"frozen"`."""
        return "frozen" if self.frozen else "packed"

    def __repr__(self) -> str:
        head = f"head {self.head_spec!r}, sharing {self.sharing!r}"
        return f"TaskState(id {self.id}, {self.phase}, width {self.width:g}, {head})"


class Growth(struct.PyTreeNode):
    """One expansion: positions of the narrow backbone's weights in the wide one.

    Attributes:
      narrow: width before.
      wide: width after.
      maps: the index maps found by the expansion; they are stored and never recomputed.
    """

    narrow: float = struct.field(pytree_node=False)
    wide: float = struct.field(pytree_node=False)
    maps: Any = struct.field(pytree_node=False)


class State(struct.PyTreeNode):
    """A network that holds many tasks; every operation returns a new one.

    Attributes:
      shared: nested dict of the shared weights, one float array per leaf.
      owner: tree parallel to `shared`, int8 arrays of equal shape: 0 is free, k is owned by the task of id k.
      tasks: `{name: TaskState}`; the order of learning is `TaskState.id`, not the order of the dict.
      width: channel factor of `shared` and `owner`.
      growth: one record per expansion, oldest first.
      local: the backbone's own local variables, which `init` drew or `from_variables` was given, at the state's width;
        a new task starts from them. None in a network loaded from a stage without them.
      layout: dtype and shape of the shared weights and the local variables, as the model has them; see `layout_of`.
    """

    shared: Tree
    owner: Tree
    tasks: dict[str, TaskState]
    width: float = struct.field(pytree_node=False)
    growth: tuple[Growth, ...] = struct.field(pytree_node=False, default=())
    local: Tree | None = None
    layout: str = struct.field(pytree_node=False, default="{}")

    def __repr__(self) -> str:
        weights = sum(leaf.size for leaf in jax.tree.leaves(self.shared))
        tasks = ", ".join(f"{name!r} ({self.tasks[name].phase})" for name in names(self)) or "none"
        return f"State({weights:,} shared weights at width {self.width:g}; tasks: {tasks})"

    def _repr_html_(self) -> str:
        order = names(self)
        if over_processes(self.owner):  # one process alone cannot count them
            return f"<div>{html.escape(repr(self))}</div>"
        owners = {path: np.asarray(leaf).ravel() for path, leaf in flatten(self.owner).items()}
        counts = {path: np.bincount(ids, minlength=len(order) + 1) for path, ids in owners.items()}
        return f"<div>{html.escape(repr(self))}</div>{ownership_bars(order, counts)}"


def layout_of(**trees: Tree) -> str:
    """Return dtype and shape of the arrays of named trees, as the JSON of `{path: text}`.

    One string, because JAX compares the static fields of a state at every call of a compiled function.
    """
    return json.dumps({path: describe(leaf) for path, leaf in flatten(trees).items()})


def check_state(state: Any) -> None:
    """Raise unless this is a `State`."""
    if isinstance(state, State):
        return
    if isinstance(getattr(state, "state", None), State):
        hint = "pass its .state"
    elif isinstance(state, tuple) and state and isinstance(state[0], State):
        hint = "fit returns two values: state, history = pae.fit(...)"
    else:
        hint = "pae.init(net, key) makes the first one, and a net is passed before it"
    raise ArgumentError(f"state must be a pae_jax State, found {kind_of(state)}; {hint}")


def check_values(call: str, state: Any) -> None:
    """Raise unless this is a `State` whose arrays have values, as those of a traced function have not."""
    check_state(state)
    if is_traced(state):
        raise ArgumentError(f"{call} looks at values, which a traced function does not have; call it outside jit")


def names(state: State) -> list[str]:
    """Return the task names in order of learning."""
    check_state(state)
    return sorted(state.tasks, key=lambda name: state.tasks[name].id)


def newest(state: State) -> str | None:
    """Return the name of the task learned last, None if there is no task."""
    order = names(state)
    return order[-1] if order else None


def find(state: State, task: str) -> TaskState:
    """Return the record of a task, or raise `UnknownTaskError`."""
    check_state(state)
    if not isinstance(task, str) or task not in state.tasks:
        raise UnknownTaskError(task, names(state))
    return state.tasks[task]


def find_trainable(state: State, task: str, call: str) -> TaskState:
    """Return the record of a task that may still change, or raise `PhaseError`."""
    entry = find(state, task)
    if entry.frozen:
        raise PhaseError(call, task, "frozen", "predict, features, evaluate, masks; drop if it is the newest task")
    return entry
