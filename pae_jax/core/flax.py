"""A task as plain Flax, for any trainer: `task_variables`, `as_flax`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx, traverse_util

from pae_jax.core import integrity, ownership
from pae_jax.core.state import State, find
from pae_jax.errors import ArgumentError
from pae_jax.nets import Net, called, check_net, merged
from pae_jax.trees import PARAMS, Tree, merge


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
    variables = by_collection(task_variables(net, state, task))
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
        features = called(self.backbone, self.call, x, train)
        return features if self.head is None else called(self.head, None, features, train)


class NnxTask(nnx.Module):
    """Backbone and head of a task as one NNX module; `.train()` and `.eval()` set its mode."""

    def __init__(self, backbone: nnx.Module, head: nnx.Module | None, call: Any):
        self.backbone, self.head, self.call, self.deterministic = backbone, head, call, True

    def __call__(self, x: Tree, train: bool | None = None) -> Tree:
        """Return the task's output; `train` overrides the mode for modules that take it as an argument."""
        train = not self.deterministic if train is None else train
        features = called(self.backbone, self.call, x, train)
        return features if self.head is None else called(self.head, None, features, train)


def by_collection(parts: dict[str, dict[str, Tree]]) -> dict[str, dict[str, Tree]]:
    """Turn `{part: {collection: tree}}` into `{collection: {part: tree}}`, and back."""
    flat = {(path[1], path[0], *path[2:]): leaf for path, leaf in traverse_util.flatten_dict(parts).items()}
    return traverse_util.unflatten_dict(flat)
