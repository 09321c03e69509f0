"""`TrainState`: a task in training as one pytree, for custom train steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization, traverse_util

from pae_jax.checks import check_choice, check_fraction, check_key, is_traced
from pae_jax.core import Of, Picking, Scope, State, committing, find_trainable, integrity, ownership, pruning
from pae_jax.errors import ArgumentError, ForgettingError
from pae_jax.nets import Net, Rngs, read_inputs
from pae_jax.training import gated
from pae_jax.training import task_arrays as arrays
from pae_jax.training.optimizer import holds, require_state_of, transformation
from pae_jax.training.places import find_all, take
from pae_jax.training.serialization import from_state_dict, picklable, to_state_dict
from pae_jax.training.task_arrays import Params
from pae_jax.training.variables import (
    joined,
    paths,
    require_like,
    require_updates,
    strayed,
)
from pae_jax.trees import PARAMS, Tree, flatten, require_match

PARTS = ("shared", "local", "head", "pick")
_STATIC = {"static": True}
_UNDER_VMAP = "call this under jax.vmap, or on one: jax.tree.map(lambda leaf: leaf[i], ts)"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TrainState:
    """A task in training: like Flax's `TrainState`, with the gate built in. A pytree; make it with `create`.

    Task id and owners are arrays, so tasks of one width and head, whose parameters have the same shapes, share the
    compiled step. Only entries of `params` that the task owns are read: wherever parameters are passed in (`apply_fn`,
    `replace`, `apply_gradients`), the other entries are replaced by those of this state. So averages, perturbations and
    trial points of an optimizer are safe.

    Attributes:
      step: int32 scalar, gradients applied so far.
      params: the trained parameters: `{"shared": ..., "local": ..., "head": ...}`, and `"pick"`, the scores of older
        weights, for a task of sharing "picked". Shared leaves of which the task owns nothing are left out. A leaf of
        which it owns little is a block of its rows and columns, or one row of single weights, (1, ..., 1, n).
      opt_state: state of `tx`, over the same tree, 0 where the task owned nothing from the start; released weights keep
        the optimizer's means, which fade.
      variables: all other variables of the model: `{"backbone": {collection: ...}, "head": {collection: ...}}`, and
        the leaves of which only a part is in `params`.
      places: for each of these leaves, where its parameter lies.
      owner: owner ids of all shared weights.
      task_id: int8 scalar.
      task_name: digest of the task's name, uint32 (2,).
      key: random key from which steps draw; None without.
      slow: the slow parameters of `optax.lookahead`; None with every other optimizer.
      net, width, head_spec, sharing, picking, tx: static; they determine the compiled step.

    Example:
      >>> import jax, jax.numpy as jnp, optax, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
      >>> ts = pae.TrainState.create(net, state, "a", tx=optax.adam(0.01), key=jax.random.key(2))
      >>> @jax.jit
      ... def step(ts, x, y):
      ...     def loss(params):
      ...         out, updates = ts.apply_fn(params, x, train=True)
      ...         return optax.softmax_cross_entropy_with_integer_labels(out, y).mean(), updates
      ...     (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(ts.params)
      ...     return ts.apply_gradients(grads=grads, updates=updates), value
      >>> ts, value = step(ts, jnp.ones((8, 4)), jnp.zeros(8, int))
      >>> state = ts.prune(0.5).commit(net, state)
      >>> pae.free_fraction(state)
      0.5
    """

    step: jax.Array
    params: Params
    opt_state: Any
    variables: dict[str, Tree]
    places: Tree
    owner: Tree
    task_id: jax.Array
    task_name: jax.Array
    key: jax.Array | None
    slow: Params | None
    net: Any = dataclasses.field(metadata=_STATIC)
    width: float = dataclasses.field(metadata=_STATIC)
    head_spec: Any = dataclasses.field(metadata=_STATIC)
    sharing: str = dataclasses.field(metadata=_STATIC)
    picking: Picking | None = dataclasses.field(metadata=_STATIC)
    tx: Any = dataclasses.field(metadata=_STATIC)

    @classmethod
    def create(
        cls,
        net: Net,
        state: State,
        task: str,
        *,
        tx: Any,
        key: jax.Array | None = None,
        parts: Collection[str] = PARTS,
    ) -> TrainState:
        """Create the train state of a task.

        Args:
          net: the network description the state was made with.
          state: the network; its arrays are copied, so this state may be donated.
          task: the newest task, not frozen.
          tx: an optax transformation, `optax.MultiSteps`, or an optimizer of `pae.recipes`.
          key: random key for dropout and other random streams in calls of `apply_fn` without `rngs`; None if every call
            passes `rngs`.
          parts: the parts to train, of "shared", "local", "head" and "pick". Without "local" the backbone runs as in
            evaluation, without "head" so does the head.

        Returns:
          A train state at step 0.

        Raises:
          UnknownTaskError, PhaseError: no such task, or it is frozen.
          StructureError: the state belongs to another model.
          ArgumentError: an unknown part, no part that the task has, or `tx` is no optimizer, or has `optax.lookahead`
            inside another.
        """
        return _made(net, state, task, tx, key, parts, None)

    def replace(self, **changes: Any) -> TrainState:
        """Return a state with some fields replaced; entries of `params` that the task does not own do not change.

        Raises:
          StructureError: `params` of another tree or shape; names the leaf.
          ArgumentError: `key` is no random key, `opt_state` is not of the form of `tx`, `tx` becomes or stops being
            `optax.lookahead`, or `params` for a stack outside `jax.vmap`.
        """
        if "params" in changes:
            gated.require_one(self, _UNDER_VMAP)
            changes["params"] = arrays.pinned(self, changes["params"])
        key, stacked = changes.get("key"), self.task_id.ndim
        if key is not None and not (stacked and np.ndim(key) == stacked):  # a stack has a key for each
            changes["key"] = check_key(key)
        after = dataclasses.replace(self, **changes)
        if changes.keys() & {"tx", "opt_state"} and after.opt_state is not None:
            require_state_of(after.tx, after.params, after.opt_state)
            if holds(after.opt_state, optax.LookaheadState) != (after.slow is not None):
                raise ArgumentError(
                    "only TrainState.create makes the slow parameters of optax.lookahead: tx can neither become a "
                    "look-ahead nor stop being one. Commit, then TrainState.create(net, state, task, tx=...)"
                )
        return after

    def apply_fn(self, params: Params, x: Tree, train: bool = False, rngs: Rngs = None) -> tuple[Tree, dict[str, Tree]]:
        """Run the task.

        Args:
          params: tree like `self.params`: the parameters, an average of them, or any other values.
          x: inputs (batch, ...), as in the net's sample: its tree, shapes after the batch axis, kinds of dtypes.
          train: whether dropout is on and running statistics are updated.
          rngs: a random key, or `{stream: key}`; None draws from `self.key` and `self.step`, so all calls within one
            step draw the same numbers. For several passes, micro-batches, or examples under `jax.vmap`, pass
            `jax.random.fold_in(key, i)`.

        Returns:
          `(output, updates)`; updates are for `apply_gradients`: the collections after this call, including sown
          values, `{"backbone": {collection: ...}, "head": {...}}`, empty unless `train`.

        Raises:
          StructureError: parameters or inputs of another tree, shape or kind of dtype; names the leaf.
          DataError: a masked array.
          ArgumentError: `rngs` is neither a key nor `{stream: key}`, or the model draws random numbers and got none; a
            stack of train states outside `jax.vmap`.
        """
        gated.require_one(self, _UNDER_VMAP)
        x = read_inputs(self.net, x, values=False)
        if rngs is not None and not isinstance(rngs, Mapping):
            rngs = check_key(rngs, "rngs")
        if rngs is None and train and self.key is not None:
            rngs = jax.random.fold_in(self.key, self.step)
        first, second = jax.random.split(rngs) if isinstance(rngs, jax.Array) else (rngs, rngs)
        return gated.run(self, params, x, train, first, second)

    def apply_gradients(self, *, grads: Params, updates: dict[str, Tree] | None = None, **extra: Any) -> TrainState:
        """Take a step of the optimizer; no bit of a weight that the task does not own changes.

        `w <- where(owner == k, w + update, w)`. The optimizer sees parameters and gradients with 0 where the task owns
        nothing, so norms and decay ignore other tasks.

        Args:
          grads: as `self.params`.
          updates: the updates returned by `apply_fn`; None does not change running statistics.
          extra: arguments of the optimizer such as `value`, `grad`, `value_fn` and `grad_fn`; functions get whole
            parameters and gradients are masked.

        Returns:
          A new state.

        Raises:
          StructureError: gradients or updates of another tree or shape; names the leaf.
          ArgumentError: updates that are not of `apply_fn`, or a stack of train states outside `jax.vmap`.
        """
        gated.require_one(self, _UNDER_VMAP)
        require_like("grads", grads, self.params)
        if "grad" in extra:
            require_like("grad", extra["grad"], self.params)
            extra["grad"] = arrays.own(self, extra["grad"])
        require_updates(updates or {}, self.variables)
        changes, opt_state = gated.proposed(self, arrays.own(self, grads), extra)
        return gated.moved(self, changes, opt_state, updates or {})

    def prune(self, fraction: float | jax.Array, *, scope: Scope = "leaf", of: Of = "available") -> TrainState:
        """Release the smallest weights until a fraction of the task's available weights is free, as `pae.prune`.

        Args:
          fraction: share in [0, 1]; may be traced.
          scope: "leaf" or "global".
          of: "available" or "own".

        Returns:
          A new state; released weights are 0 and no longer trained.

        Raises:
          ArgumentError: an argument outside its range, or a stack of train states outside `jax.vmap`.
        """
        gated.require_one(self, _UNDER_VMAP)
        check_choice("scope", scope, ("leaf", "global"))
        check_choice("of", of, ("available", "own"))
        if not is_traced(fraction):
            check_fraction(fraction)
        return gated.released(
            self, *pruning.pruned(arrays.all_shared(self), self.owner, self.task_id, fraction, scope, of)
        )

    def commit(self, net: Net, state: State) -> State:
        """Commit the trained task to the network.

        Args:
          net: the network description the state was made with.
          state: the network that this train state was created from.

        Returns:
          A new state, with the trained values and released weights.

        Raises:
          UnknownTaskError: the state has no task of this id.
          PhaseError: the task is frozen.
          StructureError: the state belongs to another model, or a leaf of another shape or dtype, or NaN or infinity;
            names it.
          ArgumentError: a stack of train states, or a call inside jit.
          ForgettingError: the train state was created for another task or from another state, or arrays of other tasks
            were changed; names the leaf.
        """
        task = gated.task_of(self, state)
        entry = find_trainable(state, task, "commit")
        integrity.require_own_net(net, state, [entry])
        hint = "Commit into the state that the train state was created from."
        require_match(f"owners in the train state of task {task!r}", self.owner, state.owner, hint)
        owner = self.owner
        if not is_traced((owner, state.owner)):
            owner = jax.tree.map(committing.beside, owner, state.owner)
            for path, count in flatten(strayed(owner, state.owner, ownership.id_array(entry.id))).items():
                if int(count):
                    raise ForgettingError(
                        f"task {task!r}: {int(count)} weights of '{path}' have other owners than in the state. {hint} "
                        "Prune by TrainState.prune."
                    )
        backbone, head, pick = arrays.raw_variables(self)
        return committing.accept(net, state, task, backbone, head, owner=owner, pick=pick)

    def __repr__(self) -> str:
        weights = sum(np.size(leaf) for leaf in jax.tree.leaves(self.params))
        step = "traced" if is_traced(self.step) else np.asarray(self.step)
        return f"TrainState(step {step}, {weights:,} parameters in {', '.join(self.params)}, {self.net!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle, without functions that cannot be pickled, such as those of optax."""
        fields = dict(vars(self))
        key = fields["key"]
        if key is not None:
            fields["key"] = (np.asarray(jax.random.key_data(key)), str(jax.random.key_impl(key)))
        return fields | {name: picklable(fields[name], name) for name in ("net", "tx", "head_spec")}

    def __setstate__(self, fields: dict[str, Any]) -> None:
        """Undo `__getstate__`."""
        if fields["key"] is not None:
            data, impl = fields["key"]
            fields = {**fields, "key": jax.random.wrap_key_data(jnp.asarray(data), impl=impl)}
        self.__dict__.update(fields)

    def __copy__(self) -> TrainState:
        """Return the state itself, because its arrays are immutable."""
        return dataclasses.replace(self)

    def __deepcopy__(self, memo: Any) -> TrainState:
        """Return a state with its own copies of the arrays."""
        del memo
        return jax.tree.map(jnp.copy, self)


serialization.register_serialization_state(TrainState, to_state_dict, from_state_dict)


def created_like(
    ts: TrainState, net: Net, state: State, task: str, tx: Any, key: jax.Array | None, parts: Collection[str]
) -> TrainState:
    """Return what `TrainState.create` does, with parameters of the shapes that they have in another train state."""
    return _made(net, state, task, tx, key, parts, ts.places)


def _made(
    net: Net,
    state: State,
    task: str,
    tx: Any,
    key: jax.Array | None,
    parts: Collection[str],
    places: Tree | None,
) -> TrainState:
    entry = find_trainable(state, task, "TrainState.create")
    integrity.require_own_net(net, state, [entry])
    for part in parts:
        check_choice("parts", part, PARTS)
    task_id = ownership.id_array(entry.id)
    picks = entry.pick is not None
    weights = ownership.seen_weights(state, entry) if picks else ownership.task_weights(state, entry)
    own, _ = ownership.counts(state.owner, task_id)
    owns = [True] * len(jax.tree.leaves(weights)) if is_traced(own) else (np.asarray(own) > 0).tolist()
    flat = traverse_util.flatten_dict(weights)
    moving = [path for path, some in zip(paths(weights), owns, strict=True) if some and "shared" in parts]
    local, head = entry.local.get(PARAMS, {}), entry.head.get(PARAMS, {})
    if places is None:
        places = {} if picks or is_traced(own) else find_all(state.owner, entry.id, moving)
    shared = traverse_util.unflatten_dict({path: flat[path] for path in moving})
    everything = {"shared": take(places, weights, shared)}
    everything |= {"local": local, "head": head} | ({"pick": entry.pick} if picks else {})
    params = {part: everything[part] for part in PARTS if part in everything and part in parts}
    if not params:
        raise ArgumentError("parts is empty, or names what the task does not have: nothing would be trained")
    whole = set(moving) - set(traverse_util.flatten_dict(places))
    still = traverse_util.unflatten_dict({path: leaf for path, leaf in flat.items() if path not in whole})
    backbone = {**entry.local, PARAMS: joined(still, {} if "local" in params else local)}
    output = {**entry.head, PARAMS: {} if "head" in params else head}
    kept = {"backbone": backbone, "head": output} | ({} if "pick" in params or not picks else {"pick": entry.pick})
    copied = jax.tree.map(jnp.copy, (params, kept, places, state.owner))
    made = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=copied[0],
        opt_state=None,
        variables=copied[1],
        places=copied[2],
        owner=copied[3],
        task_id=task_id,
        task_name=jnp.array(gated.digest_of(task)),
        key=None if key is None else jnp.copy(check_key(key)),
        slow=None,
        net=net,
        width=entry.width,
        head_spec=entry.head_spec,
        sharing="all" if entry.sharing == "picked" and not picks else entry.seeing,
        picking=entry.picking if picks else None,
        tx=tx,
    )
    seen = arrays.own(made, made.params)
    # An optimizer may use one array in two places, which cannot be donated.
    opt_state = jax.tree.map(jnp.copy, transformation(tx).init(seen))
    outermost = isinstance(opt_state, optax.LookaheadState)
    if holds(opt_state.fast_state if outermost else opt_state, optax.LookaheadState):
        raise ArgumentError(
            "optax.lookahead inside another transformation gets no slow parameters; put optax.lookahead outermost: "
            "optax.lookahead(optax.chain(...), ...)"
        )
    slow = jax.tree.map(jnp.copy, seen) if outermost else None
    return dataclasses.replace(made, opt_state=opt_state, slow=slow)
