"""The library's laws as functions: digests of the arrays that a frozen task depends on, `verify` and `check`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.core import ownership
from pae_jax.core.spread_arrays import is_spread, pieces
from pae_jax.core.state import MAX_TASKS, SHARING, State, TaskState, check_values, layout_of, names
from pae_jax.errors import ForgettingError, StructureError
from pae_jax.large_arrays import in_threads, packed_mask, selected
from pae_jax.nets import Net, check_net, heads
from pae_jax.trees import Tree, describe, flatten, require_match


def require_owner(state: State) -> None:
    """Raise `StructureError` unless the weights are floats and the owners int8 arrays parallel to them."""
    shared, owner = flatten(state.shared), flatten(state.owner)
    for path in sorted(shared.keys() | owner.keys()):
        if path not in owner:
            raise StructureError("owner", path, "nothing", f"int8 of shape {shared[path].shape}")
        if path not in shared:
            raise StructureError("shared", path, "nothing", f"weights of shape {owner[path].shape}")
        weight, ids = shared[path], owner[path]
        if not jnp.issubdtype(weight.dtype, jnp.floating):
            raise StructureError("shared", path, describe(weight), "a float array")
        if ids.dtype != jnp.int8 or ids.shape != weight.shape:
            raise StructureError("owner", path, describe(ids), f"int8 of shape {weight.shape}")
    if jax.tree.structure(state.shared) != jax.tree.structure(state.owner):
        raise StructureError("owner", "", jax.tree.structure(state.owner), jax.tree.structure(state.shared))


def array_digest(*arrays: Any) -> str:
    """Return the SHA-256 of dtype, shape and bytes of arrays, hexadecimal."""
    digest = hashlib.sha256()
    for array in arrays:
        host = array if is_spread(array) else np.asarray(array, order="C")
        digest.update(f"{host.dtype}{host.shape}".encode())
        for (piece,) in pieces(host):
            digest.update(piece.view(np.uint8).data)
    return digest.hexdigest()


def task_digests(state: State, entry: TaskState) -> dict[str, bytes]:
    """Return `{path: SHA-256}` of every array that belongs to a task, at the task's own width.

    For a shared weight the digest covers the positions that the task owns and their values. The older weights that the
    task sees are covered by the digests of their tasks, so each weight is hashed once, regardless of the number of
    tasks.
    """
    shared = flatten(ownership.at_width(state, state.shared, entry.width))
    owner = flatten(ownership.at_width(state, state.owner, entry.width))
    found = {"settings": _settings_digest(entry)}

    def owned(path: str) -> str:
        if is_spread(leaves := (owner[path], shared[path])):
            return _owned_digest(owner[path], shared[path], entry.id)
        ids, weights = (np.asarray(leaf).reshape(-1) for leaf in leaves)

        def mine(block: slice) -> np.ndarray:
            return ids[block] == entry.id

        return array_digest(packed_mask(ids.size, mine), selected(weights, mine))

    work = [lambda path=path: owned(path) for path in shared]
    # Of spread arrays one at a time is brought to the host.
    digests = (
        [one() for one in work] if is_spread(shared) else in_threads(work, [leaf.size for leaf in shared.values()])
    )
    found |= {f"shared/{path}": digest for path, digest in zip(shared, digests, strict=True)}
    for part, tree in (("local", entry.local), ("head", entry.head), ("pick", entry.pick or {})):
        found.update({f"{part}/{path}": array_digest(leaf) for path, leaf in flatten(tree).items()})
    return {path: bytes.fromhex(text) for path, text in found.items()}


def _owned_digest(owner: jax.Array, weights: jax.Array, task_id: int) -> str:
    """Return the `array_digest` of the positions and values that a task owns; one block of rows at a time is here."""
    digest, owned, rest = hashlib.sha256(), 0, np.zeros(0, np.bool_)
    digest.update(f"uint8{(-(-owner.size // 8),)}".encode())
    for (ids,) in pieces(owner):
        bits = np.concatenate([rest, ids == task_id])
        packed = np.packbits(bits[: bits.size // 8 * 8])
        digest.update(packed.data)
        owned, rest = owned + int(bits.sum()) - int(rest.sum()), bits[8 * packed.size :]
    digest.update(np.packbits(rest).data)
    digest.update(f"{weights.dtype}{(owned,)}".encode())
    for ids, values in pieces(owner, weights):
        digest.update(values[ids == task_id].view(np.uint8).data)
    return digest.hexdigest()


def no_digests(shared: Tree, local: Tree, head: Tree, pick: Tree | None) -> jax.Array:
    """Return the placeholder for the digests of a task that is not frozen."""
    return jnp.zeros((1 + sum(len(jax.tree.leaves(tree)) for tree in (shared, local, head, pick)), 32), jnp.bool_)


def as_rows(digests: dict[str, bytes]) -> jax.Array:
    """Return digests as the leaf of a `TaskState`, uint8 (arrays, 32)."""
    return jnp.asarray(np.frombuffer(b"".join(digests.values()), np.uint8).reshape(-1, 32))


def recorded(state: State, entry: TaskState) -> dict[str, bytes]:
    """Return `{path: SHA-256}` as they were recorded when a task was frozen."""
    trees = [state.shared, entry.local, entry.head, entry.pick or {}]
    parts = zip(("shared", "local", "head", "pick"), trees, strict=True)
    paths = ["settings", *(f"{part}/{path}" for part, tree in parts for path in flatten(tree))]
    rows = np.asarray(entry.digests)
    if rows.shape != (len(paths), 32) or rows.dtype not in (np.uint8, np.bool_):
        expected = f"uint8[{len(paths)},32], or bool before the task is frozen"
        raise StructureError(f"digests of task {entry.id}", "", describe(rows), expected)
    return {path: row.tobytes() for path, row in zip(paths, rows, strict=True)}


def _packed_paths(state: State, entry: TaskState) -> set[str]:
    """Return the paths of the digests that a task had when it was packed."""
    shared = {f"shared/{path}" for path in flatten(state.shared)}
    picked = {path.replace("shared/", "pick/", 1) for path in shared if entry.sharing == "picked" and entry.id > 1}
    return {"settings"} | shared | picked | set(json.loads(entry.layout))


def _settings_digest(entry: TaskState) -> str:
    settings: list[Any] = [entry.id, entry.width, entry.sharing, heads.describe(entry.head_spec)]
    if entry.picking is not None:
        rule = asdict(entry.picking)
        for name, default in (("top", None), ("own", False)):
            if rule[name] == default:
                del rule[name]  # tasks frozen before this setting existed have a digest without it
        settings.append(rule)
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def verify(state: State) -> None:
    """Recompute the digest of every frozen task and compare.

    A task's digest is SHA-256 over the positions and values of its own weights at its own width, its picks, its local
    variables, its head and its settings, as they were when `freeze` was called. Of an array that is spread over
    devices, one block of rows at a time is in the memory of the host.

    Args:
      state: the network.

    Raises:
      ForgettingError: an array of a frozen task differs; names the task and the path.
      ArgumentError: not a State, or one without values, inside `jit`.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
      >>> state = pae.freeze(state, "a")
      >>> pae.verify(state)
      >>> damaged = state.replace(shared=jax.tree.map(lambda w: -w, state.shared))
      >>> pae.verify(damaged)
      Traceback (most recent call last):
      pae_jax.errors.ForgettingError: task 'a' is frozen, but 'shared/Dense_0/kernel' is no longer ...
    """
    check_values("verify", state)
    for name in names(state):
        entry = state.tasks[name]
        if not entry.frozen:
            continue
        found = task_digests(state, entry)
        if len(found) == len(entry.digests):
            wanted = recorded(state, entry)
            differing = sorted(path for path in found if wanted[path] != found[path])
        else:
            differing = sorted(_packed_paths(state, entry) ^ found.keys()) or ["digests"]
        if differing:
            raise ForgettingError(
                f"task {name!r} is frozen, but '{differing[0]}' is no longer what it was when the task was frozen "
                f"({len(differing)} arrays differ). Go back to the last saved stage; nothing in pae_jax changes a "
                "frozen task, so look for code that writes into the state's arrays."
            )


def check(state: State, net: Net | None = None) -> None:
    """Check the structural laws of a state.

    `shared` and `owner` have one structure and equal leaf shapes; owners are int8 in 0..number of tasks; ids are
    1..n without a gap; at most the newest task is not frozen; widths never shrink; weights, local variables and heads
    have the shapes and dtypes that the model gave them.

    Args:
      state: the network.
      net: if given, also check, as `load` does, that every array has the structure, shape and dtype that the net
        builds.

    Raises:
      StructureError: names the tree and the leaf, what was found and what was expected.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.init(net, jax.random.key(0))
      >>> pae.check(state, net)
      >>> pae.check(state.replace(owner=jax.tree.map(lambda o: o + 1, state.owner)))
      Traceback (most recent call last):
      pae_jax.errors.StructureError: owner, leaf 'Dense_0/kernel': found ids 1..1, expected ids in 0..0. ...
    """
    check_values("check", state)
    _check_trees(state)
    _check_tasks(state)
    _check_layout(state)
    if net is not None:
        require_own_net(net, state, state.tasks.values())


def require_own_net(net: Net, state: State, entries: Iterable[TaskState]) -> None:
    """Raise `StructureError` unless state and tasks have the trees of this network."""
    check_net(net)
    hint = "Was the state made with this net?"
    layout = net.layout(state.width)
    require_match("state.shared", state.shared, layout.shared, hint)
    if state.local is not None:
        require_match("state.local", state.local, layout.local, hint)
    for entry in entries:
        label = f"of task {entry.id}"
        require_match(f"local variables {label}", entry.local, net.layout(entry.width).local, hint)
        require_match(f"head {label}", entry.head, heads.layout(net, entry.head_spec, entry.width)[0], hint)
    require_owner(state)


def _check_layout(state: State) -> None:
    """Compare arrays with the layout recorded when they were made; arrays that differ would not load."""
    local = {} if state.local is None else state.local
    wanted = json.loads(state.layout)
    if state.local is None:
        wanted = {path: text for path, text in wanted.items() if not path.startswith("local/")}
    _require_layout("state", json.loads(layout_of(shared=state.shared, local=local)), wanted)
    for name in names(state):
        entry = state.tasks[name]
        found = json.loads(layout_of(local=entry.local, head=entry.head))
        _require_layout(f"task {name!r}", found, json.loads(entry.layout))
        recorded(state, entry)


def _require_layout(label: str, found: dict[str, str], wanted: dict[str, str]) -> None:
    for path in sorted(found.keys() | wanted.keys()) if wanted else ():  # a state made by hand has no record
        if found.get(path) != wanted.get(path):
            hint = "Cast in the forward pass, not in the state: what differs from the model cannot be loaded again."
            raise StructureError(label, path, found.get(path, "nothing"), wanted.get(path, "nothing"), hint)


def _check_trees(state: State) -> None:
    require_owner(state)
    for path, ids in flatten(state.owner).items():
        if not ids.size:
            continue
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high > len(state.tasks):
            hint = "Owner ids are ids of tasks in the state; 0 is free."
            raise StructureError("owner", path, f"ids {low}..{high}", f"ids in 0..{len(state.tasks)}", hint)


def _check_tasks(state: State) -> None:
    order = names(state)
    ids = [state.tasks[name].id for name in order]
    if ids != list(range(1, len(ids) + 1)) or len(ids) > MAX_TASKS:
        raise StructureError("tasks", "", f"ids {ids}", f"ids 1..{len(ids)} without a gap, at most {MAX_TASKS}")
    widths = [growth.narrow for growth in state.growth] + [state.width]
    for narrow, growth, wide in zip(widths, state.growth, widths[1:], strict=False):
        if growth.wide != wide or not narrow < wide:
            raise StructureError("growth", "", f"{narrow} -> {growth.wide}", f"an expansion up to width {wide}")
    for position, name in enumerate(order):
        entry = state.tasks[name]
        if not entry.frozen and name != order[-1]:
            raise StructureError(f"task {name!r}", "", "not frozen", "frozen, because a later task exists")
        if entry.width not in widths:
            raise StructureError(f"task {name!r}", "", f"width {entry.width}", f"one of the state's widths {widths}")
        if position and entry.width < state.tasks[order[position - 1]].width:
            raise StructureError(f"task {name!r}", "", f"width {entry.width}", "at least that of the task before")
        if entry.sharing not in SHARING:
            raise StructureError(f"task {name!r}", "", f"sharing {entry.sharing!r}", f"one of {SHARING}")
        _check_pick(state, name, entry)


def _check_pick(state: State, name: str, entry: TaskState) -> None:
    label = f"pick of task {name!r}"
    if (entry.picking is not None) != (entry.sharing == "picked"):
        raise StructureError(
            label, "", f"sharing {entry.sharing!r} with {entry.picking}", "picking if and only if picked"
        )
    if entry.pick is None:
        if entry.picking is not None and entry.id > 1:
            raise StructureError(label, "", "nothing", "a pick tree, because older tasks exist")
        return
    if entry.picking is None:
        raise StructureError(label, "", "a pick tree", f"none, because sharing is {entry.sharing!r}")
    kind = jnp.float32 if not entry.frozen else jnp.int8 if entry.picking.ternary else jnp.bool_
    owner = ownership.at_width(state, state.owner, entry.width)
    require_match(label, entry.pick, jax.tree.map(lambda o: jax.ShapeDtypeStruct(o.shape, kind), owner))
