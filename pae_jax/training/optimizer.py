"""Accepted optimizers: optax transformations, `optax.MultiSteps`, and optimizers of `pae.recipes`."""

from __future__ import annotations

from typing import Any

import jax
import optax

from pae_jax.errors import ArgumentError


def transformation(optimizer: Any) -> optax.GradientTransformation:
    """Return an optimizer as a gradient transformation: of optax, `optax.MultiSteps`, or of `pae.recipes`."""
    if getattr(optimizer, "learning_rate", 1.0) is None:
        name = type(optimizer).__name__
        raise ArgumentError(
            f"{name} needs a learning rate here, {name}(learning_rate=0.01); in a recipe its phase has one"
        )
    for method in ("transformation", "gradient_transformation"):
        if hasattr(optimizer, method):
            return getattr(optimizer, method)()
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ArgumentError(f"an optimizer must be an optax gradient transformation, found {type(optimizer).__name__}")
    return optimizer


def require_state_of(optimizer: Any, params: Any, opt_state: Any) -> None:
    """Raise `ArgumentError` unless a state has the tree of an optimizer's states of these parameters."""
    wanted = jax.eval_shape(transformation(optimizer).init, params)
    if jax.tree.structure(opt_state) != jax.tree.structure(wanted):
        raise ArgumentError(
            "opt_state is not of the form that tx.init gives these parameters, so tx cannot go on from it. Another "
            "optimizer starts anew: commit, then TrainState.create(net, state, task, tx=...)"
        )


def holds(opt_state: Any, kind: type) -> bool:
    """Return whether an optimizer's state is, or has in it, a state of a kind."""
    is_kind = lambda node: isinstance(node, kind)  # noqa: E731
    return any(map(is_kind, jax.tree.leaves(opt_state, is_leaf=is_kind)))
