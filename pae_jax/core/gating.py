"""`gate`: the end of an optax chain, which lets a task move only its own weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pae_jax.checks import is_traced
from pae_jax.core import integrity, ownership
from pae_jax.core.state import State, find_trainable
from pae_jax.errors import StructureError
from pae_jax.nets import Net
from pae_jax.trees import PARAMS, flatten


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
    own = flatten(ownership.owned(ownership.shown(state, entry), ownership.id_array(entry.id)))
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
