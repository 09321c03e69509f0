"""What happens to a `TrainState` in training: the forward pass, the optimizer's proposal, the gated move, a release."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pae_jax.checks import is_traced
from pae_jax.core import Scope, State, names, ownership, pruning
from pae_jax.errors import ArgumentError, ForgettingError, UnknownTaskError
from pae_jax.nets import Rngs, heads
from pae_jax.training import partial_gradients
from pae_jax.training import task_arrays as arrays
from pae_jax.training.optimizer import transformation
from pae_jax.training.places import pairs, put, take
from pae_jax.training.task_arrays import Params
from pae_jax.training.variables import joined, laid_like, on_devices_of, with_updates
from pae_jax.trees import PARAMS, Tree

if TYPE_CHECKING:
    from pae_jax.training.train_state import TrainState


def run(
    ts: TrainState, params: Params, x: Tree, train: bool, rngs: Rngs, head_rngs: Rngs
) -> tuple[Tree, dict[str, Tree]]:
    """Do the work of `apply_fn`, with random keys for backbone and head."""
    backbone, head = arrays.model_variables(ts, params)
    program, output = ts.net.program(ts.width), heads.program(ts.head_spec)
    in_training = train and "local" in ts.params
    apply = lambda variables, x, rngs: program.apply(variables, x, in_training, rngs)  # noqa: E731
    if ts.places:
        parts = {(PARAMS, *path): pair for path, pair in pairs(ts.places, arrays.pinned(ts, params)["shared"]).items()}
        features, moved = partial_gradients.call(apply, backbone, parts, x, rngs)
    else:
        features, moved = apply(backbone, x, rngs)
    out, head_moved = output.apply(head, features, train and "head" in ts.params, head_rngs)
    return out, {"backbone": moved, "head": head_moved} if train else {}


def proposed(ts: TrainState, grads: Params, extra: dict[str, Any]) -> tuple[Any, Any]:
    """Return `(changes of the parameters, optimizer state)`; gradients are 0 where the task owns nothing."""
    seen = arrays.own(ts, ts.params)
    tx = optax.with_extra_args_support(transformation(ts.tx))
    known = seen if ts.slow is None else optax.LookaheadParams(seen, ts.slow)
    return tx.update(grads, ts.opt_state, known, **_with_whole(ts, extra))


def _with_whole(ts: TrainState, extra: dict[str, Any]) -> dict[str, Any]:
    """Return extra arguments of an optimizer, with functions wrapped to take the optimizer's parameters."""
    found = dict(extra)
    if "value_fn" in found:
        value_fn = found["value_fn"]
        found["value_fn"] = lambda params, *rest, **named: value_fn(arrays.pinned(ts, params), *rest, **named)
    if "grad_fn" in found:
        grad_fn = found["grad_fn"]
        found["grad_fn"] = lambda params, *rest: arrays.own(ts, grad_fn(arrays.pinned(ts, params), *rest))
    return found


def moved(
    ts: TrainState, changes: Any, opt_state: Any, updates: dict[str, Tree], good: jax.Array | None = None
) -> TrainState:
    """Return the state after changes of the parameters and collections.

    With `good`, a new value is used only if `good` holds and the value is finite.
    """
    slow: Any = ts.slow
    if isinstance(changes, optax.LookaheadParams):
        new_slow: Any = optax.apply_updates(slow, changes.slow)
        slow, changes = arrays.own(ts, new_slow), changes.fast
    new: Any = laid_like(optax.apply_updates(ts.params, changes), ts.params)
    variables = {part: with_updates(tree, updates.get(part, {})) for part, tree in ts.variables.items()}
    variables = laid_like(variables, ts.variables)
    if good is None:
        params = arrays.pinned(ts, new)
    else:
        accept = lambda mask, new, old: jnp.where(mask & good & jnp.isfinite(new), new, old)  # noqa: E731
        masks, everywhere = arrays.own_masks(ts), lambda tree: jax.tree.map(lambda leaf: True, tree)
        params = {
            part: jax.tree.map(accept, masks.get(part, everywhere(tree)), tree, ts.params[part])
            for part, tree in new.items()
        }
        keep = lambda new, old: new if new is old else accept(True, new, old)  # noqa: E731
        variables = jax.tree.map(keep, variables, ts.variables)
    if ts.places:
        # The forward pass makes the same leaves; as results of the step they take the memory of the donated ones.
        backbone = variables["backbone"]
        partial = put(ts.places, backbone[PARAMS], take({}, ts.params["shared"], ts.places))
        variables = {**variables, "backbone": {**backbone, PARAMS: joined(backbone[PARAMS], partial)}}
    return dataclasses.replace(ts, step=ts.step + 1, params=params, opt_state=opt_state, variables=variables, slow=slow)


def pruned_to(ts: TrainState, targets: jax.Array, scope: Scope) -> TrainState:
    """Release the smallest weights until a given number of each leaf, int32 (leaves,), is free."""
    return released(ts, *pruning.release_until(arrays.all_shared(ts), ts.owner, ts.task_id, targets, scope))


def released(ts: TrainState, shared: Tree, owner: Tree) -> TrainState:
    """Return the state with other shared weights and owners, of which the task has released some."""
    if "shared" not in ts.params:
        backbone = {**ts.variables["backbone"]}
        backbone[PARAMS] = joined(backbone[PARAMS], shared)
        return dataclasses.replace(ts, owner=owner, variables={**ts.variables, "backbone": backbone})
    params = {**ts.params, "shared": take(ts.places, shared, ts.params["shared"])}
    after = dataclasses.replace(ts, owner=owner, params=params)
    return after if ts.slow is None else dataclasses.replace(after, slow=arrays.own(after, ts.slow))


def as_state(ts: TrainState, state: State) -> State:
    """Return the network with this task's arrays, unchecked and not copied; for evaluation during training."""
    task = task_of(ts, state)
    entry = state.tasks[task]
    backbone, head, pick = arrays.raw_variables(ts)
    shared, local = ts.net.split(backbone)
    before = on_devices_of((state.shared, state.owner), (shared, ts.owner))
    taken = ownership.taken(*before, shared, ts.owner, ts.task_id)
    entry = entry.replace(local=local, head=head, pick=pick)
    return state.replace(shared=taken, owner=ts.owner, tasks={**state.tasks, task: entry})


def require_one(ts: TrainState, advice: str) -> None:
    """Raise `ArgumentError` for a stack of train states."""
    if ts.task_id.ndim:
        raise ArgumentError(f"this is a stack of {len(ts.task_id)} train states; {advice}")


def task_of(ts: TrainState, state: State) -> str:
    """Return the name of the task in a network."""
    if is_traced(ts.task_id):
        raise ArgumentError("commit finds its task by the id, which has no value inside jit; call it outside")
    require_one(ts, "commit one: jax.tree.map(lambda leaf: leaf[i], ts)")
    number = int(ts.task_id)
    for name in names(state):
        if state.tasks[name].id == number:
            if not is_of(ts, name):
                raise ForgettingError(
                    f"this train state was created for another task than {name!r}, which has the same id {number}. "
                    "Commit into the state that the train state was created from."
                )
            return name
    raise UnknownTaskError(number, names(state), "the network to commit to")


def digest_of(task: str) -> np.ndarray:
    """Return a digest of a task's name as an array, uint32 (2,); a name in the tree would compile for every task."""
    return np.frombuffer(hashlib.sha256(task.encode(errors="surrogatepass")).digest()[:8], np.uint32)


def is_of(ts: TrainState, task: str) -> bool:
    """Return whether a train state was created for a task of this name."""
    return bool((np.asarray(ts.task_name) == digest_of(task)).all())
