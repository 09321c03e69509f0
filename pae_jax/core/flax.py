"""A task as plain Flax, for any trainer: `as_flax`, `task_variables`, `gate`, `commit`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx, traverse_util

from pae_jax.checks import is_traced
from pae_jax.core import integrity, ownership
from pae_jax.core.state import State, TaskState, find, find_trainable
from pae_jax.errors import ArgumentError, ForgettingError, StructureError
from pae_jax.nets import Net, check_net, merged, mode_arguments, plain_variables
from pae_jax.trees import PARAMS, Tree, flatten, merge, require_match

_SOWN = ("intermediates", "Intermediate")


def task_variables(net: Net, state: State, task: str) -> dict[str, dict[str, Tree]]:
    """Return the variables that a task computes with, as plain Flax variables at the task's own width.

    Shared weights that the task does not see are 0. Every array is a copy.

    Args:
      net: the network description the state was made with.
      state: the network.
      task: name of a task, in any phase.

    Returns:
      `{"backbone": {collection: nested dict}, "head": {collection: nested dict}}`.

    Raises:
      UnknownTaskError: no task of this name.
      StructureError: the state belongs to another model.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
      >>> variables = pae.task_variables(net, state, "a")
      >>> variables["head"]["params"]["kernel"].shape
      (16, 2)
    """
    entry = find(state, task)
    integrity.require_own_net(net, state, [entry])
    backbone = merge(ownership.task_weights(state, entry), entry.local)
    return jax.tree.map(jnp.copy, {"backbone": backbone, "head": entry.head})


def as_flax(net: Net, state: State, task: str) -> tuple[Any, Any]:
    """Return a task as one Flax module, backbone and head, and its values.

    Args:
      net: the network description the state was made with.
      state: the network.
      task: name of a task, in any phase.

    Returns:
      Linen: `(module, variables)` for `module.apply(variables, x, train=False)`; the parameters are
      `variables["params"]["backbone"]` and `["head"]`. NNX: `(module, its nnx.state)`; the module holds the values, is
      called as `module(x)`, and takes its mode by `.train()` and `.eval()`.

    Raises:
      UnknownTaskError: no task of this name.
      ArgumentError: backbone and head are of different kinds, one Linen and one NNX.
      StructureError: the state belongs to another model.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
      >>> module, variables = pae.as_flax(net, state, "a")
      >>> x = jnp.ones((3, 4))
      >>> bool((module.apply(variables, x, train=False) == pae.predict(net, state, "a", x)).all())
      True
    """
    check_net(net)
    entry = find(state, task)
    variables = _by_collection(task_variables(net, state, task))
    program, head = net.program(entry.width), entry.head_spec
    wanted = nn.Module if net.kind == "linen" else nnx.Module
    if head is not None and not isinstance(head, (int, wanted)):
        raise ArgumentError(f"as_flax makes one module of a {net.kind} backbone and its head; the head is {head!r}")
    if net.kind == "linen":
        output: Any = nn.Dense(head) if isinstance(head, int) else head
        return LinenTask(program.module, output, program.call), {PARAMS: {}, **variables}

    def make() -> NnxTask:
        features = net.layout(entry.width).features
        output: Any = nnx.Linear(features.shape[-1], head, rngs=nnx.Rngs(0)) if isinstance(head, int) else head
        return NnxTask(program.module, output, program.call)

    graph, values = nnx.split(nnx.eval_shape(make))
    module = merged(graph, list(nnx.to_flat_state(values)), variables, jax.random.key(0))
    module.eval()
    return module, nnx.state(module)


class LinenTask(nn.Module):
    """Backbone and head of a task as one Linen module."""

    backbone: nn.Module
    head: nn.Module | None
    call: Any = None

    @nn.compact
    def __call__(self, x: Tree, train: bool = False) -> Tree:
        """Return the task's output."""
        if self.call is not None:
            features = self.call(self.backbone, x, train)
        else:
            after, named = mode_arguments(self.backbone, train)
            features = self.backbone(x, *after, **named)
        if self.head is None:
            return features
        after, named = mode_arguments(self.head, train)
        return self.head(features, *after, **named)


class NnxTask(nnx.Module):
    """Backbone and head of a task as one NNX module; `.train()` and `.eval()` set its mode."""

    def __init__(self, backbone: nnx.Module, head: nnx.Module | None, call: Any):
        self.backbone, self.head, self.call, self.deterministic = backbone, head, call, True

    def __call__(self, x: Tree, train: bool | None = None) -> Tree:
        """Return the task's output; `train` overrides the mode for modules that take it as an argument."""
        train = not self.deterministic if train is None else train
        backbone: Any = self.backbone
        if self.call is not None:
            features = self.call(backbone, x, train)
        else:
            after, named = mode_arguments(backbone, train)
            features = backbone(x, *after, **named)
        if self.head is None:
            return features
        head: Any = self.head
        after, named = mode_arguments(head, train)
        return head(features, *after, **named)


class GateState(NamedTuple):
    """Which entries of each parameter the task owns: bool arrays, or a plain True if it owns the whole parameter."""

    open: Any


def gate(net: Net, state: State, task: str) -> optax.GradientTransformation:
    """Block updates of weights that a task does not own; the last part of an optax chain.

    `u <- u where owner == k, else -0.0`: adding -0.0 changes no bit of any number, -0.0 included.

    Args:
      net: the network description the state was made with.
      state: the network; the owners are read at this call, so create the optimizer again after `prune`.
      task: the newest task, not frozen.

    Returns:
      An optax transformation for the parameters of `task_variables` or `as_flax`: `{"backbone": params, "head":
      params}`, the NNX module's own, or a part of them. Parameters are found by their names.

    Raises:
      UnknownTaskError, PhaseError: no such task, or it is frozen.
      StructureError: on `init`, a parameter that the task does not have, or one of another shape.

    Example:
      >>> import jax, jax.numpy as jnp, optax, pae_jax as pae
      >>> from flax.training.train_state import TrainState
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
      >>> module, variables = pae.as_flax(net, state, "a")
      >>> tx = optax.chain(optax.adamw(1e-3), pae.gate(net, state, "a"))
      >>> trainer = TrainState.create(apply_fn=module.apply, params=variables["params"], tx=tx)
      >>> trainer = trainer.apply_gradients(grads=jax.tree.map(jnp.ones_like, trainer.params))
      >>> state = pae.commit(net, state, "a", {"params": trainer.params})
    """
    entry = find_trainable(state, task, "gate")
    integrity.require_own_net(net, state, [entry])
    # Own weights that the task does not pick take part in no forward pass.
    own = flatten(ownership.owned(_open(state, entry), ownership.id_array(entry.id)))
    backbone = {**dict.fromkeys(flatten(entry.local.get(PARAMS, {}))), **own}

    def init(params: Any) -> GateState:
        found = jax.tree_util.tree_leaves_with_path(params)
        names = [_names(path) for path, _ in found]
        whole = any("backbone" in name for name in names)
        masks = [_mask(_place(name, whole), leaf, backbone, task) for name, (_, leaf) in zip(names, found, strict=True)]
        return GateState(jax.tree.unflatten(jax.tree.structure(params), masks))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda m, u: jnp.where(m, u, jnp.asarray(-0.0, u.dtype)), state.open, updates), state

    return optax.GradientTransformation(init, update)


def _names(path: Any) -> list[str]:
    """Return a key path as names, without the key of NNX between a variable and its value, and without "params"."""
    last = path[-1:] and path[-1]
    if isinstance(last, jax.tree_util.GetAttrKey) and last.name in ("value", "raw_value"):
        path = path[:-1]
    names = [jax.tree_util.keystr((part,), simple=True) for part in path]
    return names[1:] if names[:1] == [PARAMS] else names


def _place(names: list[str], whole: bool) -> tuple[str, str]:
    """Return `(part, path in it)` of a parameter; in a tree without a "backbone" all belong to it."""
    for position, name in enumerate(names):
        if name == "backbone" or (name == "head" and whole):
            inner = names[position + 1 :]
            return name, "/".join(inner[1:] if inner[:1] == [PARAMS] else inner)
    return "backbone", "/".join(names)


def _mask(place: tuple[str, str], leaf: Any, backbone: Mapping[str, Any], task: str) -> jax.Array:
    part, path = place
    if part == "head" or (path.startswith("head/") and path not in backbone):
        return jnp.asarray(True)
    if path not in backbone:
        hint = "gate is for the params of task_variables or as_flax."
        raise StructureError(f"parameters of task {task!r}", path, "nothing", "a parameter of the backbone", hint)
    mask = backbone[path]
    if mask is None:
        return jnp.asarray(True)
    if mask.shape != np.shape(leaf):
        raise StructureError(f"parameters of task {task!r}", path, f"shape {np.shape(leaf)}", f"shape {mask.shape}")
    placed = isinstance(leaf, jax.Array) and not is_traced(leaf)
    return jax.device_put(mask, leaf.sharding) if placed and len(leaf.sharding.device_set) > 1 else mask


def commit(net: Net, state: State, task: str, variables: Any) -> State:
    """Commit trained variables of a task to the network; raise if a weight changed that the task does not own.

    Args:
      net: the network description the state was made with.
      state: the network that the variables were taken from.
      task: the newest task, not frozen.
      variables: those of `task_variables`; those of `as_flax`, where unchanged collections may be left out; or the NNX
        module or its state.

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
    shown = state.owner if pick is not None else _open(state, entry)
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


def _open(state: State, entry: TaskState) -> Tree:
    """Return the owners, with 0 where the task owns a weight that it does not pick."""
    hidden = ownership.hidden(state, entry)
    if hidden is None:
        return state.owner
    return jax.tree.map(lambda o, h: jnp.where(h, jnp.zeros((), o.dtype), o), state.owner, hidden)


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
    changed = flatten(ownership.changed(shared, handed, owner, ownership.id_array(entry.id)))
    for path, (count, foreign) in {path: np.asarray(pair) for path, pair in changed.items()}.items():
        if count:
            raise ForgettingError(
                f"task {task!r}: {count} of {foreign} weights of '{path}' that it does not own have changed. Put "
                "pae.gate(net, state, task) last in the optimizer's chain, or train with pae.TrainState."
            )


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


def _by_collection(parts: dict[str, dict[str, Tree]]) -> dict[str, dict[str, Tree]]:
    """Turn `{part: {collection: tree}}` into `{collection: {part: tree}}`, and back."""
    flat = {(path[1], path[0], *path[2:]): leaf for path, leaf in traverse_util.flatten_dict(parts).items()}
    return traverse_util.unflatten_dict(flat)


def _by_part(variables: Any, entry: TaskState) -> dict[str, dict[str, Tree]]:
    plain = plain_variables(variables)
    if not plain.keys() <= {"backbone", "head"}:
        plain = _by_collection({name: tree for name, tree in plain.items() if name not in _SOWN})
        known = {"backbone": entry.local, "head": entry.head}
        for part, collections in known.items():
            left_out = {name: tree for name, tree in collections.items() if name != PARAMS}
            plain[part] = {**left_out, **plain.get(part, {})}
    found = {part: plain.get(part, {}) for part in ("backbone", "head")}
    return {part: {name: tree for name, tree in trees.items() if name not in _SOWN} for part, trees in found.items()}
