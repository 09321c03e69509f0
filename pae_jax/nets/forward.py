"""Compiled forward passes of a backbone and of a task, one for each width and kind of head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from pae_jax.caching import Cache
from pae_jax.nets import heads
from pae_jax.nets.network import Net
from pae_jax.trees import Tree, merge

_FORWARD = Cache(32)


def apply_backbone(net: Net, width: float) -> Callable[[Tree, Tree, Tree], Tree]:
    """Return the compiled `(weights, local, x) -> features` of a width."""

    def make() -> Callable[..., Tree]:
        features = features_function(net, width)
        return jax.jit(lambda weights, local, x: features(merge(weights, local), x))

    return _FORWARD.get(("features", net, width), make)


def features_function(net: Net, width: float) -> Callable[[Tree, Tree], Tree]:
    """Return `(variables, x) -> features` of a width, before compilation."""
    backbone = net.program(width)
    return lambda variables, x: backbone.apply(variables, x, False, None)[0]


def apply_task(net: Net, width: float, head: Any) -> Callable[[Tree, Tree, Tree, Tree], Tree]:
    """Return the compiled `(weights, local, head variables, x) -> output` of a width and a kind of head."""
    return _FORWARD.get(("output", net, width, heads.key_of(head)), lambda: jax.jit(task_function(net, width, head)))


def task_function(
    net: Net, width: float, head: Any, train_head: bool = False
) -> Callable[[Tree, Tree, Tree, Tree], Tree]:
    """Return `apply_task` before compilation; optionally only the head runs in training mode."""
    backbone, output = net.program(width), heads.program(head)

    def apply(weights: Tree, local: Tree, variables: Tree, x: Tree) -> Tree:
        features, _ = backbone.apply(merge(weights, local), x, False, None)
        return output.apply(variables, features, train_head, jax.random.key(0) if train_head else None)[0]

    return apply
