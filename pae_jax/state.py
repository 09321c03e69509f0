"""The records of a lifelong network: `State`, `TaskState`, `Growth`, and look-ups in them."""

from __future__ import annotations

from typing import Any

from flax import struct

from pae_jax.errors import PhaseError, UnknownTaskError
from pae_jax.picking import Picking
from pae_jax.trees import Tree

MAX_TASKS = 127
"""Owner ids are int8; the 128th task is refused, never wrapped."""

SHARING = ("all", "first", "picked")


class TaskState(struct.PyTreeNode):
    """What belongs to one task alone, at the width the task was packed at.

    Attributes:
      local: local variables of the backbone, `{collection: nested dict}`.
      head: variables of the task's output layer, `{collection: nested dict}`.
      id: owner id, 1 for the first task.
      width: width of the backbone the task runs at, for ever.
      head_spec: number of classes, or the Flax module, that builds the head.
      sharing: which older weights the task sees: "all", "first" (those of task 1) or "picked".
      picking: how it picks, with sharing "picked"; None otherwise.
      pick: tree parallel to the shared weights at the task's width: float32 scores while the task may be trained, bool
        (int8 if ternary) once frozen; None where there is nothing to pick from.
      digests: after `freeze`, one `(path, SHA-256)` per array the task depends on; None before.
    """

    local: Tree
    head: Tree
    id: int = struct.field(pytree_node=False)
    width: float = struct.field(pytree_node=False)
    head_spec: Any = struct.field(pytree_node=False)
    sharing: str = struct.field(pytree_node=False, default="all")
    picking: Picking | None = struct.field(pytree_node=False, default=None)
    pick: Tree | None = None
    digests: tuple[tuple[str, str], ...] | None = struct.field(pytree_node=False, default=None)

    @property
    def frozen(self) -> bool:
        """Whether nothing of this task can change any more."""
        return self.digests is not None

    @property
    def phase(self) -> str:
        """`"packed"` (trainable) or `"frozen"`."""
        return "frozen" if self.frozen else "packed"


class Growth(struct.PyTreeNode):
    """One expansion: where the weights of the narrow backbone went in the wide one.

    Attributes:
      narrow: width before.
      wide: width after.
      maps: the index maps, as found on the day of the expansion; they are never derived again.
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
      local: local variables that came with pretrained weights and go to the first task; None otherwise.
    """

    shared: Tree
    owner: Tree
    tasks: dict[str, TaskState]
    width: float = struct.field(pytree_node=False)
    growth: tuple[Growth, ...] = struct.field(pytree_node=False, default=())
    local: Tree | None = None


def names(state: State) -> list[str]:
    """Return the task names in order of learning."""
    return sorted(state.tasks, key=lambda name: state.tasks[name].id)


def newest(state: State) -> str | None:
    """Return the name of the task learned last, None if there is no task."""
    order = names(state)
    return order[-1] if order else None


def find(state: State, task: str) -> TaskState:
    """Return the record of a task, or raise `UnknownTaskError`."""
    if not isinstance(task, str) or task not in state.tasks:
        raise UnknownTaskError(task, names(state))
    return state.tasks[task]


def find_trainable(state: State, task: str, call: str) -> TaskState:
    """Return the record of a task that may still change, or raise `PhaseError`."""
    entry = find(state, task)
    if entry.frozen:
        raise PhaseError(call, task, "frozen", "predict, features, evaluate, masks; drop if it is the newest task")
    return entry
