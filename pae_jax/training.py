"""Compiled steps: train, evaluate, apply. Pure functions of arrays; nothing here reads files or prints."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from pae_jax import heads, ownership
from pae_jax.fingerprint import fingerprint
from pae_jax.network import Net, Program
from pae_jax.picking import older
from pae_jax.state import TaskState
from pae_jax.trees import PARAMS, Tree, merge

Loss = Callable[[jax.Array, jax.Array], jax.Array]
Augment = Callable[[jax.Array, Tree], Tree]
PARTS = ("shared", "local", "head")


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the cross-entropy of each example, in float32; the default loss."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels.astype(jnp.int32))


class Carry(NamedTuple):
    """What a train step changes.

    Attributes:
      shared: all shared weights; only those of the task in training ever differ.
      local: the task's local variables.
      head: the task's head variables.
      pick: the task's scores of older weights; None where nothing is picked.
      opt_state: states of the optimizers of weights and of picks.
      step: int32, steps taken in this fit.
      bad_step: int32, the step whose loss or result was not finite; -1 while all is well.
      loss_sum: float32, sum of the losses since the last reset.
    """

    shared: Tree
    local: Tree
    head: Tree
    pick: Tree | None
    opt_state: OptStates
    step: jax.Array
    bad_step: jax.Array
    loss_sum: jax.Array


class OptStates(NamedTuple):
    """States of the optimizer of weights, local variables and head, and of that of picks (None without one)."""

    weights: Any
    pick: Any = None


@dataclass(frozen=True)
class Rule:
    """What a train step does; everything in it is compiled into the step.

    Attributes:
      tx: optimizer of weights, local variables and head.
      loss: `(logits, y) -> losses`.
      pick_tx: optimizer of the scores of older weights; None leaves them as they are.
      augment: `(key, x) -> x`, on the device; None takes the inputs as they are.
      parts: which of "shared", "local" and "head" are trained.
    """

    tx: Any
    loss: Loss
    pick_tx: Any = None
    augment: Augment | None = None
    parts: tuple[str, ...] = PARTS

    def fingerprint(self) -> Hashable:
        """Return a key that is equal for rules built alike."""
        return tuple(fingerprint(part) for part in (self.tx, self.loss, self.pick_tx, self.augment, self.parts))


TrainStep = Callable[[Carry, Tree, jax.Array, jax.Array, Any, Tree, jax.Array], Carry]
"""`(carry, owner, task id, key, rates, x, y) -> carry`; rates, float32 of shape (2,), multiply the updates of weights
and of picks. As an operand they follow any schedule without compiling anything."""
TrainSteps = Callable[..., Carry]


class Layout(NamedTuple):
    """How the arrays of a `Carry` lie on the devices, and a key that tells layouts apart."""

    key: Hashable
    carry: Carry


OptimizerInit = Callable[[Tree, Tree, Tree, Tree, Tree, jax.Array], OptStates]


def trainables(shared: Tree, local: Tree, head: Tree, parts: tuple[str, ...] = PARTS) -> dict[str, Tree]:
    """Return the tree that the optimizer sees: shared weights, and the `params` of local variables and head."""
    everything = {"shared": shared, "local": local.get(PARAMS, {}), "head": head.get(PARAMS, {})}
    return {part: everything[part] for part in parts}


def own_part(params: dict[str, Tree], mine: Tree) -> dict[str, Tree]:
    """Return trainables with 0 where a shared weight is not the task's own.

    The optimizer sees only what the task owns: norms (clipping, LAMB) and decay take no notice of other tasks.
    """
    if "shared" not in params:
        return params
    return {**params, "shared": ownership.select(mine, params["shared"])}


def optimizer_init(net: Net, rule: Rule, known: OptimizerInit | None = None) -> OptimizerInit:
    """Return a compiled `(shared, local, head, pick, owner, task_id) -> opt_state`."""

    def init(shared: Tree, local: Tree, head: Tree, pick: Tree, owner: Tree, task_id: jax.Array) -> OptStates:
        params = trainables(shared, local, head, rule.parts)
        weights = rule.tx.init(own_part(params, ownership.owned(owner, task_id)))
        if rule.pick_tx is None:
            return OptStates(weights)
        return OptStates(weights, rule.pick_tx.init(ownership.select(older(owner, task_id), pick)))

    key = ("optimizer", fingerprint(rule.tx), fingerprint(rule.pick_tx), rule.parts)
    return net.memo(key, lambda: known or jax.jit(init))


def train_step(
    net: Net, entry: TaskState, rule: Rule, known: TrainStep | None = None, layout: Layout | None = None
) -> TrainStep:
    """Return the compiled train step of a task; tasks of equal width and head share it.

    Task id, owners and key are operands. What compiles anew is another width, head, rule, layout or batch shape. A step
    that is already there can be given as `known`.
    """

    def make() -> TrainStep:
        step = _train_function(net, entry, rule)
        if layout is None:
            return jax.jit(step, donate_argnums=0)
        return jax.jit(step, donate_argnums=0, out_shardings=layout.carry)

    return net.memo(("train", layout and layout.key, *_step_key(entry, rule)), lambda: known or make())


def train_steps(net: Net, entry: TaskState, rule: Rule) -> TrainSteps:
    """Return the compiled `(carry, owner, task id, key, rates (n, 2), order (n, batch), x, y) -> carry` of n steps.

    All data lives on the device and each step takes its batch from it, so the host is asked once in n steps.
    """

    def make() -> TrainSteps:
        step = _train_function(net, entry, rule)

        def steps(
            carry: Carry, owner: Tree, task_id: jax.Array, key: jax.Array, rates: Any, order: Any, x: Tree, y: jax.Array
        ) -> Carry:
            def body(carry: Carry, operands: tuple[jax.Array, jax.Array]) -> tuple[Carry, None]:
                rate, chosen = operands
                batch = jax.tree.map(lambda leaf: leaf[chosen], x)
                return step(carry, owner, task_id, key, rate, batch, y[chosen]), None

            return jax.lax.scan(body, carry, (rates, order))[0]

        return jax.jit(steps, donate_argnums=0)

    return net.memo(("train many", *_step_key(entry, rule)), make)


def _step_key(entry: TaskState, rule: Rule) -> tuple[Hashable, ...]:
    picks = entry.picking if entry.pick is not None else None
    sharing = "all" if entry.sharing == "picked" and picks is None else entry.sharing  # nothing older to pick from
    return (entry.width, fingerprint(entry.head_spec), sharing, picks, rule.fingerprint())


def _train_function(net: Net, entry: TaskState, rule: Rule) -> TrainStep:
    # Under sharing "all" the newest task sees every weight that is not exactly 0: older tasks' and its own, while free
    # weights exist only where it pruned itself. Masking the forward pass would change no bit.
    masked = entry.sharing == "first" or entry.pick is not None
    return _make_train_step(net, entry, rule, masked)


def _make_train_step(net: Net, entry: TaskState, rule: Rule, masked: bool) -> TrainStep:
    backbone, output = net.program(entry.width), heads.program(entry.head_spec)
    tx = optax.with_extra_args_support(rule.tx)
    pick_tx = None if rule.pick_tx is None else optax.with_extra_args_support(rule.pick_tx)

    def features(weights: Tree, local: Tree, x: Tree, key: jax.Array) -> tuple[jax.Array, Tree]:
        # Local variables that are not trained include running statistics, so the backbone must not update them.
        return backbone.apply(merge(weights, local), x, "local" in rule.parts, key)

    def step(carry: Carry, owner: Tree, task_id: jax.Array, key: jax.Array, rates: Any, x: Tree, y: Any) -> Carry:
        chex.assert_trees_all_equal_shapes(carry.shared, owner)
        params = trainables(carry.shared, carry.local, carry.head, rule.parts)
        keys = jax.random.split(jax.random.fold_in(key, carry.step), 3)
        if rule.augment is not None:
            x = rule.augment(keys[2], x)

        def outputs(params: dict[str, Tree], pick: Tree | None = carry.pick) -> tuple[Any, tuple[Tree, Tree]]:
            shared = params.get("shared", carry.shared)
            if masked:
                factors = entry.picking.straight_through(pick) if entry.picking and pick is not None else None
                shared = ownership.effective(shared, owner, task_id, entry.sharing, factors)
            out, local = features(shared, _with_params(carry.local, params.get("local")), x, keys[0])
            head = _with_params(carry.head, params.get("head"))
            logits, head = output.apply(head, out, "head" in rule.parts, keys[1])
            return logits, (local, head)

        def mean_loss(logits: Any) -> jax.Array:
            return jnp.mean(rule.loss(logits, y)).astype(jnp.float32)

        wanted = (params,) if pick_tx is None else (params, carry.pick)
        logits, pull_back, (local, head) = jax.vjp(outputs, *wanted, has_aux=True)
        value, slope = jax.value_and_grad(mean_loss)(logits)
        # Known before any weight's gradient is: a check of those would keep all of them in memory until the last.
        finite = all_finite((value, slope, local, head, rates))
        good = finite & (carry.bad_step < 0)
        grads, *pick_grads = pull_back(slope)
        mine = ownership.owned(owner, task_id)
        grads = own_part(grads, mine)
        extra = {"value": value, "grad": grads}
        updates, opt_state = tx.update(grads, carry.opt_state.weights, own_part(params, mine), **extra)
        updates: Any = _scaled(updates, rates[0])
        # Checking the updates of shared weights would keep them in memory, while their gradients are there anyway. What
        # the optimizer does to them it does to the head and to local variables too, if those are trained.
        alone = rule.parts == ("shared",)
        watched = own_part(updates, mine) if alone else {**updates, "shared": grads.get("shared", {})}
        finite = finite & all_finite(watched)
        new: Any = optax.apply_updates(params, updates)
        pick, pick_state = carry.pick, carry.opt_state.pick
        if pick_tx is not None:
            old = older(owner, task_id)
            pick_grads, seen = ownership.select(old, pick_grads[0]), ownership.select(old, pick)
            extra = {"value": value, "grad": pick_grads}
            updates, pick_state = pick_tx.update(pick_grads, pick_state, seen, **extra)
            scores = ownership.select(old, optax.apply_updates(seen, _scaled(updates, rates[1])))
            finite = finite & all_finite(scores)
            pick = jax.tree.map(lambda m, n, before: _gated(m & good, n, before), old, scores, pick)

        # Whatever the optimizer made of frozen weights (momentum, decay, Adam's epsilon), the values stay: the gate
        # is on the result, not on the gradient. A result that is not finite is not taken, and after a bad step nothing
        # moves any more.
        shared = carry.shared
        if "shared" in new:
            shared = jax.tree.map(lambda m, n, old: _gated(m & good, n, old), mine, new["shared"], shared)
        rest = (
            {**carry.local, **local, **_params(carry.local, new.get("local"))},
            {**carry.head, **head, **_params(carry.head, new.get("head"))},
        )
        local, head = jax.tree.map(lambda n, old: _gated(good, n, old), rest, (carry.local, carry.head))
        return Carry(
            shared,
            local,
            head,
            pick,
            opt_state=OptStates(opt_state, pick_state),
            step=carry.step + 1,
            bad_step=jnp.where(finite | (carry.bad_step >= 0), carry.bad_step, carry.step),
            loss_sum=carry.loss_sum + jnp.where(good, value, 0.0),
        )

    return step


def _scaled(updates: Tree, rate: jax.Array) -> Tree:
    return jax.tree.map(lambda u: u * rate.astype(u.dtype), updates)


def _gated(gate: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(gate & jnp.isfinite(new), new, old)


def all_finite(tree: Tree) -> jax.Array:
    """Say whether every entry of every leaf is finite; a bool scalar.

    NaN and infinity survive a sum, and a sum is the cheapest pass over memory there is. A finite tree whose float32
    sum overflows counts as not finite.
    """
    sums = [jnp.sum(leaf, dtype=jnp.float32) for leaf in jax.tree.leaves(tree)]
    return jnp.isfinite(jnp.stack([jnp.zeros((), jnp.float32), *sums]).sum())


def _params(variables: Tree, params: Tree | None) -> dict[str, Tree]:
    return {PARAMS: params} if PARAMS in variables and params is not None else {}


def _with_params(variables: Tree, params: Tree | None) -> Tree:
    return {**variables, **_params(variables, params)}


def apply_backbone(net: Net, width: float) -> Callable[[Tree, Tree, Tree], jax.Array]:
    """Return the compiled `(weights, local, x) -> features` of a width."""
    backbone: Program = net.program(width)

    def apply(weights: Tree, local: Tree, x: Tree) -> jax.Array:
        return backbone.apply(merge(weights, local), x, False, None)[0]

    return net.memo(("features", width), lambda: jax.jit(apply))


def apply_task(net: Net, width: float, head_spec: Any) -> Callable[[Tree, Tree, Tree, Tree], jax.Array]:
    """Return the compiled `(weights, local, head, x) -> logits` of a width and a kind of head."""
    return net.memo(("logits", width, fingerprint(head_spec)), lambda: jax.jit(_logits(net, width, head_spec)))


def _logits(net: Net, width: float, head_spec: Any) -> Callable[[Tree, Tree, Tree, Tree], jax.Array]:
    backbone, output = net.program(width), heads.program(head_spec)

    def apply(weights: Tree, local: Tree, head: Tree, x: Tree) -> jax.Array:
        features, _ = backbone.apply(merge(weights, local), x, False, None)
        return output.apply(head, features, False, None)[0]

    return apply


def eval_step(net: Net, width: float, head_spec: Any, loss: Loss) -> Callable[..., dict[str, jax.Array]]:
    """Return the compiled `(weights, local, head, x, y, weight) -> sums over the batch`.

    The sums are of loss and, for integer labels of the logits' shape, of right answers. The loss is taken of one
    example at a time, so it counts the same whether the user's loss averages or not.
    """

    def make() -> Callable[..., dict[str, jax.Array]]:
        apply = _logits(net, width, head_spec)

        def step(weights: Tree, local: Tree, head: Tree, x: Tree, y: jax.Array, weight: jax.Array) -> dict[str, Any]:
            logits = apply(weights, local, head, x)
            losses = jax.vmap(lambda one, label: jnp.mean(loss(one[None], label[None])))(logits, y)
            sums = {"loss": jnp.sum(jnp.where(weight > 0, losses, 0.0).astype(jnp.float32))}
            if (jnp.issubdtype(y.dtype, jnp.integer) or y.dtype == jnp.bool_) and y.shape == logits.shape[:-1]:
                right = (jnp.argmax(logits, axis=-1) == y).astype(jnp.float32)
                right = right.reshape(right.shape[0], -1).mean(axis=1)
                sums["accuracy"] = jnp.sum(right * weight)
            return sums

        return jax.jit(step)

    return net.memo(("eval", width, fingerprint(head_spec), fingerprint(loss)), make)
