"""A network cut down to some of its tasks: they answer with the same bits, and nothing of the others is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.checks import check_names
from pae_jax.core import Picking, State, TaskState, find, integrity, layout_of, names, ownership
from pae_jax.errors import ArgumentError, PhaseError, StructureError
from pae_jax.trees import PARAMS, Tree, flatten


def chosen(state: State, tasks: Any, after: str | None) -> tuple[list[str], int]:
    """Return the tasks of a bundle in order of learning, and how many of them its reader has already.

    Args:
      state: the network.
      tasks: names, or None for all tasks.
      after: the last task that the reader has, or None. `tasks` may then name later tasks alone, for a reader that
        has all older ones, or also the older ones that the reader has.
    """
    order = names(state)
    wanted = order if tasks is None else check_names("tasks", tasks)
    for name in wanted if after is None else (*wanted, after):
        find(state, name)
    if after is not None:
        older = order[: order.index(after) + 1]
        if not any(name in older for name in wanted):
            wanted = [*older, *wanted]
        elif after not in wanted:
            raise ArgumentError(f"tasks names older tasks than after={after!r}, but not {after!r} itself; add it")
    listed = [name for name in order if name in wanted]
    have = 0 if after is None else listed.index(after) + 1
    if have == len(listed):
        found = f"no task after {after!r}" if have else "no task"
        raise ArgumentError(f"a bundle needs at least one task, found {found}; the state has {order or 'no tasks'}")
    for name in listed:
        if not state.tasks[name].frozen:
            raise PhaseError("write_bundle", name, "not frozen", "pae.freeze, then write_bundle; or leave it out")
    return listed, have


def restricted(state: State, tasks: Sequence[str]) -> State:
    """Return the state of some tasks alone, at the width of the last, ids closed up, other weights free.

    A weight that a chosen task uses but does not own goes to the first chosen task that uses it. If a later task would
    then see what it did not see before, it picks what it saw. Tasks that come out as they were keep their digests.

    Args:
      state: the network; its digests have been verified.
      tasks: names of frozen tasks, in order of learning.

    Raises:
      StructureError: a task would compute with other weights; checked bit for bit, but for the sign of zeros.
    """
    cut = _at_last_width(state, tasks)
    if list(tasks) != names(state)[: len(tasks)]:
        return _merged(state, cut)
    if len(tasks) == len(state.tasks):
        return cut
    return cut.replace(owner=ownership.select(_upto(cut.owner, len(tasks)), cut.owner))


def cleaned(state: State) -> State:
    """Return the state with every weight that no task owns 0."""
    return state.replace(shared=ownership.select(_upto(state.owner, len(state.tasks)), state.shared))


def _at_last_width(state: State, tasks: Sequence[str]) -> State:
    """Return the state with only some of its tasks, their records unchanged, at the width of the last of them."""
    entries = {name: state.tasks[name] for name in tasks}
    first, last = entries[tasks[0]].width, entries[tasks[-1]].width
    shared, owner = (ownership.at_width(state, tree, last) for tree in (state.shared, state.owner))
    growth = tuple(g for g in state.growth if first <= g.narrow and g.wide <= last)
    return State(shared=shared, owner=owner, tasks=entries, width=last, growth=growth, layout=layout_of(shared=shared))


def _upto(owner: Tree, last: int) -> Tree:
    return jax.tree.map(lambda o: (o > 0) & (o <= last), owner)


class _Leaf(NamedTuple):
    """The weights of one leaf under their new owners.

    Attributes:
      values: the weights, turned where their first user turns them.
      owner: new ids.
      seen: int8 (tasks, ...): the sign with which each task sees each weight, 0 where it does not.
    """

    values: np.ndarray
    owner: np.ndarray
    seen: np.ndarray


def _merged(state: State, cut: State) -> State:
    """Give every weight that a task of `cut` uses to the first that does."""
    order = names(cut)
    seen = [_signs(cut, cut.tasks[name]) for name in order]
    picking = [cut.tasks[name].pick is not None for name in order]
    shared, owner = flatten(cut.shared), flatten(cut.owner)
    leaves = {path: _leaf(np.asarray(shared[path]), np.stack([s[path] for s in seen]), picking) for path in owner}
    tree = jax.tree.structure(cut.owner)

    def joined(part: Sequence[Any]) -> Tree:
        return jax.tree.unflatten(tree, [jnp.asarray(leaf) for leaf in part])

    new = cut.replace(
        shared=joined([leaf.values for leaf in leaves.values()]), owner=joined([leaf.owner for leaf in leaves.values()])
    )
    tasks = {}
    for number, name in enumerate(order, 1):
        entry = _rule(cut.tasks[name], number, list(leaves.values()))
        if entry.pick is not None:
            entry = entry.replace(pick=ownership.at_width(new, joined(entry.pick), entry.width))
        tasks[name] = entry
    new = new.replace(tasks=tasks)
    tasks = {n: e.replace(digests=integrity.as_rows(integrity.task_digests(new, e))) for n, e in tasks.items()}
    for name, entry in tasks.items():
        _require_same(name, ownership.task_weights(state, state.tasks[name]), ownership.task_weights(new, entry))
    return new.replace(tasks=tasks)


def _signs(state: State, entry: TaskState) -> dict[str, np.ndarray]:
    """Return with which sign a task sees each weight: int8, 0 where it does not."""
    owner = ownership.at_width(state, state.owner, entry.width)
    signs = ownership.signs(entry)
    task_id = ownership.id_array(entry.id)
    seen = jax.tree.map(lambda m: m.astype(jnp.int8), ownership.visible(owner, task_id, entry.sharing, signs))
    if signs is not None:
        turned = jax.tree.map(lambda o, s: jnp.where((s < 0) & (o != task_id), -1, 1), owner, signs)
        seen = jax.tree.map(lambda m, t: m * t.astype(jnp.int8), seen, turned)
    return {path: np.asarray(leaf) for path, leaf in flatten(_at_state_width(state, seen, entry.width)).items()}


def _at_state_width(state: State, tree: Tree, width: float) -> Tree:
    for growth in state.growth:
        if growth.narrow >= width:
            tree = growth.maps.put({PARAMS: tree})[PARAMS]
    return tree


def _leaf(weights: np.ndarray, seen: np.ndarray, picking: Sequence[bool]) -> _Leaf:
    values, owner = np.zeros_like(weights), np.zeros(weights.shape, np.int8)
    first = np.ones(weights.shape, np.int8)
    raw = np.zeros(weights.shape, bool)  # tasks without picks read -0.0 as 0.0
    for number, signs in enumerate(seen, 1):
        fresh = (signs != 0) & (owner == 0)
        owner[fresh], first[fresh] = number, signs[fresh]
        raw |= (signs != 0) & picking[number - 1]
    used = owner > 0
    values[used] = np.where(first[used] < 0, -weights[used], weights[used])
    values[used & ~raw & (weights == 0)] = 0
    return _Leaf(values, owner, seen * first)


def _rule(entry: TaskState, number: int, leaves: Sequence[_Leaf]) -> TaskState:
    """Return a task under its new id, with picks at the width of the leaves where sharing alone does not say it all."""
    olds = [(leaf.owner > 0) & (leaf.owner < number) for leaf in leaves]
    seen = [np.where(old, leaf.seen[number - 1], 0) for old, leaf in zip(olds, leaves, strict=True)]
    rules = {
        "all": all((sign == old).all() for sign, old in zip(seen, olds, strict=True)),
        "first": all(
            (sign == (old & (leaf.owner == 1))).all() for sign, old, leaf in zip(seen, olds, leaves, strict=True)
        ),
    }
    if entry.pick is None and entry.picking is not None:
        return entry.replace(id=number)  # the very first task, which had nothing to pick from
    kept = [rule for rule in (entry.sharing, "all", "first") if rules.get(rule)]
    if entry.pick is None and kept:
        return entry.replace(id=number, sharing=kept[0])
    rule = entry.picking or Picking()
    if any((sign < 0).any() for sign in seen) and not rule.ternary:
        rule = Picking(rule.threshold, rule.initial, ternary=True)
    kind = np.int8 if rule.ternary else np.bool_
    return entry.replace(id=number, sharing="picked", picking=rule, pick=[sign.astype(kind) for sign in seen])


def _require_same(task: str, before: Tree, after: Tree) -> None:
    for (path, old), new in zip(flatten(before).items(), flatten(after).values(), strict=True):
        # A product with a sign of 0 leaves a -0.0 where there is nothing now.
        if integrity.array_digest(jnp.where(old == 0, 0, old)) != integrity.array_digest(jnp.where(new == 0, 0, new)):
            hint = "Bundle all tasks, or those up to this one."
            raise StructureError(f"weights of task {task!r} alone", path, "other bits", "those it has", hint)
