"""`TrainState`: a task in training as one pytree, for custom train steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from pae_jax.checks import check_choice, check_fraction, check_key, is_traced
from pae_jax.core import Of, Picking, Scope, State, find_trainable, flax, integrity, names, ownership, picking, pruning
from pae_jax.errors import ArgumentError, ForgettingError, UnknownTaskError
from pae_jax.nets import Net, Rngs, heads
from pae_jax.training import partial_gradients
from pae_jax.training.optimizer import transformation
from pae_jax.training.pickling import picklable
from pae_jax.training.places import find_all, pairs, put, take
from pae_jax.training.variables import (
    joined,
    laid_like,
    on_devices_of,
    paths,
    require_like,
    require_updates,
    strayed,
    with_updates,
    without_empty,
)
from pae_jax.trees import PARAMS, Tree, flatten

PARTS = ("shared", "local", "head", "pick")
Params = dict[str, Tree]
_STATIC = {"static": True}


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
        which it owns little is a block of its rows and columns, or a vector of single weights.
      opt_state: state of `tx`, over the same tree, 0 where the task owns nothing.
      variables: all other variables of the model: `{"backbone": {collection: ...}, "head": {collection: ...}}`, and
        the leaves of which only a part is in `params`.
      places: for each of these leaves, where its parameter lies.
      owner: owner ids of all shared weights.
      task_id: int8 scalar.
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
          ArgumentError: an unknown part, or `tx` is no optimizer.
        """
        return cls._made(net, state, task, tx, key, parts, None)

    def again(
        self, net: Net, state: State, task: str, tx: Any, key: jax.Array | None, parts: Collection[str]
    ) -> TrainState:
        """Return what `create` does, with parameters of the shapes that they have here."""
        return self._made(net, state, task, tx, key, parts, self.places)

    @classmethod
    def _made(
        cls,
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
        whole = set(moving) - set(traverse_util.flatten_dict(places))
        still = traverse_util.unflatten_dict({path: leaf for path, leaf in flat.items() if path not in whole})
        backbone = {**entry.local, PARAMS: joined(still, {} if "local" in params else local)}
        output = {**entry.head, PARAMS: {} if "head" in params else head}
        kept = {"backbone": backbone, "head": output} | ({} if "pick" in params or not picks else {"pick": entry.pick})
        copied = jax.tree.map(jnp.copy, (params, kept, places, state.owner))
        made = cls(
            step=jnp.zeros((), jnp.int32),
            params=copied[0],
            opt_state=None,
            variables=copied[1],
            places=copied[2],
            owner=copied[3],
            task_id=task_id,
            key=None if key is None else jnp.copy(check_key(key)),
            slow=None,
            net=net,
            width=entry.width,
            head_spec=entry.head_spec,
            sharing="all" if entry.sharing == "picked" and not picks else entry.seeing,
            picking=entry.picking if picks else None,
            tx=tx,
        )
        return made._started()

    def _started(self) -> TrainState:
        seen = self.own(self.params)
        # An optimizer may use one array in two places, which cannot be donated.
        opt_state = jax.tree.map(jnp.copy, transformation(self.tx).init(seen))
        slow = jax.tree.map(jnp.copy, seen) if isinstance(opt_state, optax.LookaheadState) else None
        return dataclasses.replace(self, opt_state=opt_state, slow=slow)

    def replace(self, **changes: Any) -> TrainState:
        """Return a state with some fields replaced; entries of `params` that the task does not own do not change."""
        if "params" in changes:
            changes["params"] = self._pinned(changes["params"])
        return dataclasses.replace(self, **changes)

    def apply_fn(self, params: Params, x: Tree, train: bool = False, rngs: Rngs = None) -> tuple[Tree, dict[str, Tree]]:
        """Run the task.

        Args:
          params: tree like `self.params`: the parameters, an average of them, or any other values.
          x: inputs (batch, ...), as in the net's sample.
          train: whether dropout is on and running statistics are updated.
          rngs: a random key, or `{stream: key}`; None draws from `self.key` and `self.step`.

        Returns:
          `(output, updates)`; updates are for `apply_gradients`: the collections after this call, including sown
          values, `{"backbone": {collection: ...}, "head": {...}}`, empty unless `train`.
        """
        if rngs is None and train and self.key is not None:
            rngs = jax.random.fold_in(self.key, self.step)
        first, second = jax.random.split(rngs) if isinstance(rngs, jax.Array) else (rngs, rngs)
        return self.run(params, x, train, first, second)

    def run(self, params: Params, x: Tree, train: bool, rngs: Rngs, head_rngs: Rngs) -> tuple[Tree, dict[str, Tree]]:
        """Do the work of `apply_fn`, with random keys for backbone and head."""
        backbone, head = self.model_variables(params)
        program, output = self.net.program(self.width), heads.program(self.head_spec)
        in_training = train and "local" in self.params
        apply = lambda variables, x, rngs: program.apply(variables, x, in_training, rngs)  # noqa: E731
        if self.places:
            parts = {(PARAMS, *path): pair for path, pair in pairs(self.places, self._pinned(params)["shared"]).items()}
            features, moved = partial_gradients.call(apply, backbone, parts, x, rngs)
        else:
            features, moved = apply(backbone, x, rngs)
        out, head_moved = output.apply(head, features, train and "head" in self.params, head_rngs)
        return out, {"backbone": moved, "head": head_moved} if train else {}

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
        """
        require_like("grads", grads, self.params)
        if "grad" in extra:
            require_like("grad", extra["grad"], self.params)
            extra["grad"] = self.own(extra["grad"])
        require_updates(updates or {}, self.variables)
        changes, opt_state = self.proposed(self.own(grads), extra)
        return self.moved(changes, opt_state, updates or {})

    def proposed(self, grads: Params, extra: dict[str, Any]) -> tuple[Any, Any]:
        """Return `(changes of the parameters, optimizer state)`; gradients are 0 where the task owns nothing."""
        seen = self.own(self.params)
        tx = optax.with_extra_args_support(transformation(self.tx))
        known = seen if self.slow is None else optax.LookaheadParams(seen, self.slow)
        return tx.update(grads, self.opt_state, known, **self._whole(extra))

    def moved(
        self, changes: Any, opt_state: Any, updates: dict[str, Tree], good: jax.Array | None = None
    ) -> TrainState:
        """Return the state after changes of the parameters and collections.

        With `good`, a new value is used only if `good` holds and the value is finite.
        """
        slow: Any = self.slow
        if isinstance(changes, optax.LookaheadParams):
            new_slow: Any = optax.apply_updates(slow, changes.slow)
            slow, changes = self.own(new_slow), changes.fast
        new: Any = laid_like(optax.apply_updates(self.params, changes), self.params)
        variables = {part: with_updates(tree, updates.get(part, {})) for part, tree in self.variables.items()}
        variables = laid_like(variables, self.variables)
        if good is None:
            params = self._pinned(new)
        else:
            accept = lambda mask, new, old: jnp.where(mask & good & jnp.isfinite(new), new, old)  # noqa: E731
            masks, everywhere = self._masks(), lambda tree: jax.tree.map(lambda leaf: True, tree)
            params = {
                part: jax.tree.map(accept, masks.get(part, everywhere(tree)), tree, self.params[part])
                for part, tree in new.items()
            }
            keep = lambda new, old: new if new is old else accept(True, new, old)  # noqa: E731
            variables = jax.tree.map(keep, variables, self.variables)
        if self.places:
            # The forward pass makes the same leaves; as results of the step they take the memory of the donated ones.
            backbone = variables["backbone"]
            partial = put(self.places, backbone[PARAMS], take({}, self.params["shared"], self.places))
            variables = {**variables, "backbone": {**backbone, PARAMS: joined(backbone[PARAMS], partial)}}
        return dataclasses.replace(
            self, step=self.step + 1, params=params, opt_state=opt_state, variables=variables, slow=slow
        )

    def prune(self, fraction: float | jax.Array, *, scope: Scope = "leaf", of: Of = "available") -> TrainState:
        """Release the smallest weights until a fraction of the task's available weights is free, as `pae.prune`.

        Args:
          fraction: share in [0, 1]; may be traced.
          scope: "leaf" or "global".
          of: "available" or "own".

        Returns:
          A new state; released weights are 0 and no longer trained.

        Raises:
          ArgumentError: an argument outside its range.
        """
        check_choice("scope", scope, ("leaf", "global"))
        check_choice("of", of, ("available", "own"))
        if not is_traced(fraction):
            check_fraction(fraction)
        return self._released(*pruning.pruned(self.all_shared(), self.owner, self.task_id, fraction, scope, of))

    def pruned_to(self, targets: jax.Array, scope: Scope) -> TrainState:
        """Release the smallest weights until a given number of each leaf, int32 (leaves,), is free."""
        return self._released(*pruning.release_until(self.all_shared(), self.owner, self.task_id, targets, scope))

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
          StructureError: a leaf of another shape or dtype, or NaN or infinity; names it.
          ForgettingError: the train state was created from another state, or arrays of other tasks were changed; names
            the leaf.
        """
        task = self._task(state)
        find_trainable(state, task, "commit")
        if not is_traced((self.owner, state.owner)):
            before = on_devices_of(state.owner, self.owner)
            for path, count in flatten(strayed(self.owner, before, self.task_id)).items():
                if int(count):
                    raise ForgettingError(
                        f"task {task!r}: {int(count)} weights of '{path}' have other owners than in the state. Commit "
                        "into the state that the train state was created from; prune by TrainState.prune."
                    )
        backbone, head, pick = self.raw_variables()
        return flax.accept(net, state, task, backbone, head, owner=self.owner, pick=pick)

    def as_state(self, state: State) -> State:
        """Return the network with this task's arrays, unchecked and not copied; for evaluation during training."""
        task, entry = self._task(state), state.tasks[self._task(state)]
        backbone, head, pick = self.raw_variables()
        shared, local = self.net.split(backbone)
        before = on_devices_of((state.shared, state.owner), (shared, self.owner))
        taken = ownership.taken(*before, shared, self.owner, self.task_id)
        entry = entry.replace(local=local, head=head, pick=pick)
        return state.replace(shared=taken, owner=self.owner, tasks={**state.tasks, task: entry})

    def _task(self, state: State) -> str:
        for name in names(state):
            if state.tasks[name].id == self._id():
                return name
        raise UnknownTaskError(self._id(), names(state), "the network to commit to")

    def _id(self) -> int:
        if is_traced(self.task_id):
            raise ArgumentError("commit finds its task by the id, which has no value inside jit; call it outside")
        return int(self.task_id)

    def model_variables(self, params: Params) -> tuple[Tree, Tree]:
        """Return the variables of backbone and head for given parameters."""
        params = self._pinned(params)
        backbone, head, pick = self._variables(params)
        if self.picking is not None:
            shared = self._shared_of(backbone)
            factors = self.picking.straight_through(pick)
            effective = ownership.effective(shared, self.owner, self.task_id, self.sharing, factors)
            backbone = {**backbone, PARAMS: joined(backbone[PARAMS], effective)}
        return backbone, head

    def raw_variables(self) -> tuple[Tree, Tree, Tree | None]:
        """Return `(backbone, head, pick)` in the form of the network's state."""
        backbone, head, pick = self._variables(self.params)
        return without_empty(backbone), without_empty(head), pick

    def _variables(self, params: Params) -> tuple[Tree, Tree, Tree | None]:
        backbone, head = self.variables["backbone"], self.variables["head"]
        shared = put(self.places, backbone[PARAMS], params.get("shared", {}))
        trained = joined(shared, params.get("local", {}))
        backbone = {**backbone, PARAMS: joined(backbone[PARAMS], trained)}
        head = {**head, PARAMS: joined(head[PARAMS], params.get("head", {}))}
        return backbone, head, params.get("pick", self.variables.get("pick"))

    def whole_leaves(self, shared: Tree) -> Tree:
        """Return a tree like `params["shared"]`, such as gradients, with whole leaves: 0 where they hold nothing."""
        zeros = jax.tree.map(lambda owner: jnp.zeros(owner.shape), take({}, self.owner, self.places))
        return put(self.places, zeros, shared)

    def all_shared(self) -> Tree:
        """Return all shared weights of the task's width, trained or not."""
        return self._shared_of(self._variables(self.params)[0])

    def _shared_of(self, backbone: Tree) -> Tree:
        flat = traverse_util.flatten_dict(backbone[PARAMS])
        return traverse_util.unflatten_dict({path: flat[path] for path in traverse_util.flatten_dict(self.owner)})

    def _released(self, shared: Tree, owner: Tree) -> TrainState:
        if "shared" not in self.params:
            backbone = {**self.variables["backbone"]}
            backbone[PARAMS] = joined(backbone[PARAMS], shared)
            return dataclasses.replace(self, owner=owner, variables={**self.variables, "backbone": backbone})
        params = {**self.params, "shared": take(self.places, shared, self.params["shared"])}
        after = dataclasses.replace(self, owner=owner, params=params)
        return after if self.slow is None else dataclasses.replace(after, slow=after.own(self.slow))

    def _masks(self) -> dict[str, Tree]:
        """Return masks of the task's own entries for the gated parts of the parameters."""
        masks: dict[str, Tree] = {}
        if "shared" in self.params:
            owner = take(self.places, self.owner, self.params["shared"])
            masks["shared"] = jax.tree.map(lambda ids: ids == self.task_id, owner)
        if "pick" in self.params:
            masks["pick"] = (self.picking or picking.Picking()).among(self.owner, self.task_id)
        return masks

    def own(self, tree: Params) -> Params:
        """Return a tree like the parameters with 0 where the task owns nothing."""
        masks = self._masks()
        return {part: ownership.select(masks[part], sub) if part in masks else sub for part, sub in tree.items()}

    def _pinned(self, params: Params) -> Params:
        """Return parameters in which entries that the task does not own are those of this state."""
        if params is self.params:
            return params
        require_like("params", params, self.params)
        masks = self._masks()
        pin = lambda m, new, old: jnp.where(m, new.astype(old.dtype), old)  # noqa: E731
        return {
            part: jax.tree.map(pin, masks[part], sub, self.params[part]) if part in masks else sub
            for part, sub in params.items()
        }

    def _whole(self, extra: dict[str, Any]) -> dict[str, Any]:
        """Return extra arguments of an optimizer, with functions wrapped to take the optimizer's parameters."""
        found = dict(extra)
        if "value_fn" in found:
            value_fn = found["value_fn"]
            found["value_fn"] = lambda params, *rest, **named: value_fn(self._pinned(params), *rest, **named)
        if "grad_fn" in found:
            grad_fn = found["grad_fn"]
            found["grad_fn"] = lambda params, *rest: self.own(grad_fn(self._pinned(params), *rest))
        return found

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
