"""The arrays of a `TrainState`: what of them the task owns, and the model's variables that they make."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import traverse_util

from pae_jax.core import ownership, picking
from pae_jax.training.places import put, take
from pae_jax.training.variables import joined, require_like, without_empty
from pae_jax.trees import PARAMS, Tree

if TYPE_CHECKING:
    from pae_jax.training.train_state import TrainState

Params = dict[str, Tree]


def own_masks(ts: TrainState) -> dict[str, Tree]:
    """Return masks of the task's own entries for the gated parts of the parameters."""
    masks: dict[str, Tree] = {}
    if "shared" in ts.params:
        owner = take(ts.places, ts.owner, ts.params["shared"])
        masks["shared"] = jax.tree.map(lambda ids: ids == ts.task_id, owner)
    if "pick" in ts.params:
        masks["pick"] = (ts.picking or picking.Picking()).among(ts.owner, ts.task_id)
    return masks


def own(ts: TrainState, tree: Params) -> Params:
    """Return a tree like the parameters with 0 where the task owns nothing."""
    masks = own_masks(ts)
    return {part: ownership.select(masks[part], sub) if part in masks else sub for part, sub in tree.items()}


def pinned(ts: TrainState, params: Params) -> Params:
    """Return parameters in which entries that the task does not own are those of this state."""
    if params is ts.params:
        return params
    require_like("params", params, ts.params)
    masks = own_masks(ts)
    pin = lambda m, new, old: jnp.where(m, new.astype(old.dtype), old)  # noqa: E731
    return {
        part: jax.tree.map(pin, masks[part], sub, ts.params[part]) if part in masks else sub
        for part, sub in params.items()
    }


def model_variables(ts: TrainState, params: Params) -> tuple[Tree, Tree]:
    """Return the variables of backbone and head for given parameters."""
    params = pinned(ts, params)
    backbone, head, pick = _with_params(ts, params)
    if ts.picking is not None:
        shared = _shared_of(ts, backbone)
        factors = ts.picking.straight_through(pick)
        effective = ownership.effective(shared, ts.owner, ts.task_id, ts.sharing, factors)
        backbone = {**backbone, PARAMS: joined(backbone[PARAMS], effective)}
    return backbone, head


def raw_variables(ts: TrainState) -> tuple[Tree, Tree, Tree | None]:
    """Return `(backbone, head, pick)` in the form of the network's state."""
    backbone, head, pick = _with_params(ts, ts.params)
    return without_empty(backbone), without_empty(head), pick


def _with_params(ts: TrainState, params: Params) -> tuple[Tree, Tree, Tree | None]:
    """Return `(backbone, head, pick)` with given parameters in their places."""
    backbone, head = ts.variables["backbone"], ts.variables["head"]
    shared = put(ts.places, backbone[PARAMS], params.get("shared", {}))
    trained = joined(shared, params.get("local", {}))
    backbone = {**backbone, PARAMS: joined(backbone[PARAMS], trained)}
    head = {**head, PARAMS: joined(head[PARAMS], params.get("head", {}))}
    return backbone, head, params.get("pick", ts.variables.get("pick"))


def all_shared(ts: TrainState) -> Tree:
    """Return all shared weights of the task's width, trained or not."""
    return _shared_of(ts, _with_params(ts, ts.params)[0])


def _shared_of(ts: TrainState, backbone: Tree) -> Tree:
    """Return those of a backbone's parameters that have owners."""
    flat = traverse_util.flatten_dict(backbone[PARAMS])
    return traverse_util.unflatten_dict({path: flat[path] for path in traverse_util.flatten_dict(ts.owner)})


def whole_leaves(ts: TrainState, shared: Tree) -> Tree:
    """Return a tree like `params["shared"]`, such as gradients, with whole leaves: 0 where they hold nothing."""
    zeros = jax.tree.map(lambda owner: jnp.zeros(owner.shape, jnp.float32), take({}, ts.owner, ts.places))
    return put(ts.places, zeros, shared)
