"""`commit`: take trained variables of a task back into the network, if no other weight has changed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.checks import is_traced
from pae_jax.core import integrity, ownership
from pae_jax.core.flax import by_collection
from pae_jax.core.state import State, TaskState, find_trainable
from pae_jax.errors import ForgettingError, StructureError
from pae_jax.nets import Net, plain_variables
from pae_jax.trees import PARAMS, Tree, flatten, merge, require_match

_SOWN = ("intermediates", "Intermediate")
_HOW_TO_GATE = (
    ". Put pae.gate(net, state, task), made after the last pruning, last in the optimizer's chain, or train with "
    "pae.TrainState."
)
_HOW_TO_RESTORE = (
    " by a rounding, as in an average. Restore them: own = pae.gate(net, state, task).init(params).open, "
    "average = jax.tree.map(jnp.where, own, average, params); or average in pae.TrainState. If nothing was averaged, "
    "put pae.gate last in the optimizer's chain."
)
_ROUNDING = 8
"""Changes of at most so many units in the last place are taken for rounding; 1e-6 of a weight in float32."""


def commit(net: Net, state: State, task: str, variables: Any) -> State:
    """Commit trained variables of a task to the network; raise if a weight changed that the task does not own.

    Args:
      net: the network description the state was made with.
      state: the network that the variables were taken from.
      task: the newest task, not frozen.
      variables: those of `task_variables`; those of `as_flax`, where unchanged collections besides "params" may be left
        out; or the NNX module or its state.

    Returns:
      A new state.

    Raises:
      UnknownTaskError, PhaseError: no such task, or it is frozen.
      StructureError: a leaf that is missing, extra, of another shape or dtype, or holds NaN or infinity; names it.
      ForgettingError: a weight that the task does not own has changed; names the leaf.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
      >>> state = pae.prune(state, "a", 0.5)
      >>> variables = pae.task_variables(net, state, "a")
      >>> state = pae.commit(net, state, "a", variables)
      >>> moved = jax.tree.map(lambda leaf: leaf + 1, variables)
      >>> pae.commit(net, state, "a", moved)
      Traceback (most recent call last):
      pae_jax.errors.ForgettingError: task 'a': 32 of 32 weights of 'Dense_0/kernel' that it does not own ...
    """
    entry = find_trainable(state, task, "commit")
    integrity.require_own_net(net, state, [entry])
    given = _by_part(variables, entry)
    return accept(net, state, task, given["backbone"], given["head"])


def accept(
    net: Net,
    state: State,
    task: str,
    backbone: Tree,
    head: Tree,
    *,
    owner: Tree | None = None,
    pick: Tree | None = None,
) -> State:
    """Check trained variables, and replace the task's own by them.

    Args:
      net: the network.
      state: the network's state.
      task: the newest task, not frozen.
      backbone: variables of the backbone; with picks, older weights unmasked by the picks.
      head: variables of the head.
      owner: owner ids after pruning; None if nothing was pruned.
      pick: scores of the picks; None leaves them.
    """
    entry = state.tasks[task]
    handed = ownership.seen_weights(state, entry) if pick is not None else ownership.task_weights(state, entry)
    hint = "It must come back as task_variables gave it."
    require_match(f"backbone of task {task!r}", backbone, merge(handed, entry.local), hint)
    require_match(f"head of task {task!r}", head, entry.head, hint)
    if pick is not None:
        require_match(f"picks of task {task!r}", pick, entry.pick, hint)
    shared, local = net.split(backbone)
    # Without scores, own weights that the task does not pick were handed out as 0 and keep their value.
    shown = state.owner if pick is not None else ownership.shown(state, entry)
    owner = state.owner if owner is None else owner
    if not is_traced((shared, local, head, owner, pick, state)):
        own = (state.shared, entry.local, entry.head, state.owner)
        shared, local, head, owner = jax.tree.map(beside, (shared, local, head, owner), own)
        pick = pick if pick is None else jax.tree.map(beside, pick, entry.pick)
        backbone = merge(shared, local)
        _require_unchanged(task, entry, shared, handed, _closed(owner, shown))
        before = {"backbone": merge(handed, entry.local), "head": entry.head, "pick": entry.pick or {}}
        _require_finite(task, {"backbone": backbone, "head": head, "pick": pick or {}}, before)
        # The trainer may write to its arrays, or donate them.
        local, head, owner, pick = jax.tree.map(_copied, (local, head, owner, pick))
    taken = ownership.taken(state.shared, shown, shared, _closed(owner, shown), ownership.id_array(entry.id))
    entry = entry.replace(local=local, head=head, pick=entry.pick if pick is None else pick)
    return state.replace(shared=taken, owner=owner, tasks={**state.tasks, task: entry})


def beside(new: Any, old: Any) -> Any:
    """Return an array on the devices of the network's own array; a trainer may have moved or sharded it."""
    if not (isinstance(new, jax.Array) and isinstance(old, jax.Array)) or new.sharding == old.sharding:
        return new
    if len(old.sharding.device_set) > 1:
        return jax.device_put(new, old.sharding)
    if new.sharding.device_set == old.sharding.device_set or not new.is_fully_addressable:
        return new
    # What is not bound to a device stays so, because compiled functions compile again for arrays that are.
    return jax.device_put(new, old.sharding) if old.committed else jnp.asarray(np.asarray(new))


def _closed(owner: Tree, shown: Tree) -> Tree:
    """Return the owners, with 0 where a weight is not shown."""
    if owner is shown:
        return owner
    return jax.tree.map(lambda o, s: jnp.where(s == ownership.FREE, jnp.zeros((), o.dtype), o), owner, shown)


def _copied(leaf: Any) -> jax.Array:
    """Return a copy with the same sharding."""
    copy = jnp.copy(leaf)
    same = not isinstance(leaf, jax.Array) or copy.sharding == leaf.sharding
    return copy if same else jax.device_put(copy, leaf.sharding)


def _require_unchanged(task: str, entry: TaskState, shared: Tree, handed: Tree, owner: Tree) -> None:
    task_id = ownership.id_array(entry.id)
    changed = flatten(ownership.changed(shared, handed, owner, task_id))
    for path, (count, foreign) in {path: np.asarray(pair) for path, pair in changed.items()}.items():
        if count:
            rounded = bool(_largest_change(shared, handed, owner, task_id) <= _ROUNDING)
            raise ForgettingError(
                f"task {task!r}: {count} of {foreign} weights of '{path}' that it does not own have changed"
                f"{_HOW_TO_RESTORE if rounded else _HOW_TO_GATE}"
            )


@jax.jit
def _largest_change(shared: Tree, handed: Tree, owner: Tree, task_id: jax.Array) -> jax.Array:
    """Return the largest change of a weight of others, in units of its size times the spacing of its dtype at 1."""

    def leaf(w: jax.Array, before: jax.Array, o: jax.Array) -> jax.Array:
        expected = jnp.where(o == ownership.FREE, jnp.zeros((), w.dtype), before)
        change = jnp.abs(w - expected) / jnp.abs(expected) / jnp.finfo(w.dtype).eps
        return jnp.max(jnp.where((o != task_id) & (w != expected), change, 0).astype(jnp.float32), initial=0)

    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(leaf, shared, handed, owner))))


def _require_finite(task: str, found: Tree, before: Tree) -> None:
    known = flatten(before)
    finite = jax.device_get(_finite({path: (leaf, known[path]) for path, leaf in flatten(found).items()}))
    for path, good in finite.items():
        if not good:
            hint = "Training diverged; nothing was taken. A smaller learning rate or clipping may help."
            raise StructureError(f"task {task!r}", path, "NaN or infinity", "finite values", hint)


@jax.jit
def _finite(pairs: dict[str, tuple[jax.Array, jax.Array]]) -> dict[str, jax.Array]:
    """Return for each pair whether the first array is finite, or the second was not."""
    return {path: jnp.isfinite(new).all() | ~jnp.isfinite(old).all() for path, (new, old) in pairs.items()}


def _by_part(variables: Any, entry: TaskState) -> dict[str, dict[str, Tree]]:
    plain = plain_variables(variables)
    if not plain.keys() <= {"backbone", "head"}:
        plain = by_collection({name: tree for name, tree in plain.items() if name not in _SOWN})
        known = {"backbone": entry.local, "head": entry.head}
        for part, collections in known.items():
            left_out = {name: tree for name, tree in collections.items() if name != PARAMS}
            plain[part] = {**left_out, **plain.get(part, {})}
    found = {part: plain.get(part, {}) for part in ("backbone", "head")}
    return {part: {name: tree for name, tree in trees.items() if name not in _SOWN} for part, trees in found.items()}
