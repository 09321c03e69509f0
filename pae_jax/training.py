"""Compiled steps: train, evaluate, apply. Pure functions of arrays; nothing here reads files or prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from pae_jax import heads, ownership
from pae_jax.fingerprint import fingerprint
from pae_jax.network import Net, Program
from pae_jax.state import TaskState
from pae_jax.trees import PARAMS, Tree, merge

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the cross-entropy of each example, in float32; the default loss."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels.astype(jnp.int32))


class Carry(NamedTuple):
    """What a train step changes.

    Attributes:
      shared: all shared weights; only those of the task in training ever differ.
      local: the task's local variables.
      head: the task's head variables.
      opt_state: state of the optax chain over `{"shared", "local", "head"}`.
      step: int32, steps taken in this fit.
      bad_step: int32, the step whose loss or result was not finite; -1 while all is well.
      loss_sum: float32, sum of the losses since the last reset.
    """

    shared: Tree
    local: Tree
    head: Tree
    opt_state: Any
    step: jax.Array
    bad_step: jax.Array
    loss_sum: jax.Array


TrainStep = Callable[[Carry, Tree, jax.Array, jax.Array, Tree, jax.Array], Carry]


def trainables(shared: Tree, local: Tree, head: Tree) -> dict[str, Tree]:
    """Return the tree that the optimizer sees: shared weights, and the `params` of local variables and head."""
    return {"shared": shared, "local": local.get(PARAMS, {}), "head": head.get(PARAMS, {})}


def own_part(params: dict[str, Tree], mine: Tree) -> dict[str, Tree]:
    """Return trainables with 0 where a shared weight is not the task's own.

    The optimizer sees only what the task owns: norms (clipping, LAMB) and decay take no notice of other tasks.
    """
    return {**params, "shared": ownership.select(mine, params["shared"])}


def optimizer_init(net: Net, tx: Any, known: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Return a compiled `(shared, local, head, owner, task_id) -> opt_state`."""

    def init(shared: Tree, local: Tree, head: Tree, owner: Tree, task_id: jax.Array) -> Any:
        return tx.init(own_part(trainables(shared, local, head), ownership.owned(owner, task_id)))

    return net.memo(("optimizer", fingerprint(tx)), lambda: known or jax.jit(init))


def train_step(net: Net, entry: TaskState, tx: Any, loss: Loss, known: TrainStep | None = None) -> TrainStep:
    """Return the compiled train step of a task; tasks of equal width and head share it.

    Task id, owners and key are operands. What compiles anew is another width, head, loss, optimizer or batch shape.
    A step that is already there can be given as `known`.
    """
    # Under sharing "all" the newest task sees every weight that is not exactly 0: older tasks' and its own, while
    # free weights exist only where it pruned itself. Masking the forward pass would change no bit.
    masked = entry.sharing != "all"
    key = ("train", entry.width, fingerprint(entry.head_spec), entry.sharing, fingerprint(tx), fingerprint(loss))
    return net.memo(key, lambda: known or _make_train_step(net, entry, optax.with_extra_args_support(tx), loss, masked))


def _make_train_step(
    net: Net, entry: TaskState, tx: optax.GradientTransformationExtraArgs, loss: Loss, masked: bool
) -> TrainStep:
    backbone, output, sharing = net.program(entry.width), heads.program(entry.head_spec), entry.sharing

    def step(carry: Carry, owner: Tree, task_id: jax.Array, key: jax.Array, x: Tree, y: jax.Array) -> Carry:
        chex.assert_trees_all_equal_shapes(carry.shared, owner)
        params = trainables(carry.shared, carry.local, carry.head)
        keys = jax.random.split(jax.random.fold_in(key, carry.step))

        def objective(params: dict[str, Tree]) -> tuple[jax.Array, tuple[Tree, Tree]]:
            shared = params["shared"]
            if masked:
                shared = ownership.select(ownership.visible(owner, task_id, sharing), shared)
            variables = merge(shared, _with_params(carry.local, params["local"]))
            features, local = backbone.apply(variables, x, True, keys[0])
            logits, head = output.apply(_with_params(carry.head, params["head"]), features, True, keys[1])
            return jnp.mean(loss(logits, y)).astype(jnp.float32), (local, head)

        (value, (local, head)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        mine = ownership.owned(owner, task_id)
        grads = own_part(grads, mine)
        updates, opt_state = tx.update(grads, carry.opt_state, own_part(params, mine), value=value, grad=grads)
        new: Any = optax.apply_updates(params, updates)

        # Whatever the optimizer made of frozen weights (momentum, decay, Adam's epsilon), the values stay: the gate
        # is on the result, not on the gradient. After a bad step nothing moves any more.
        finite = jnp.isfinite(value) & all_finite((own_part(new, mine), local, head))
        good = finite & (carry.bad_step < 0)
        shared = jax.tree.map(lambda m, n, old: jnp.where(m & good, n, old), mine, new["shared"], carry.shared)
        rest = (
            {**carry.local, **local, **_params(carry.local, new["local"])},
            {**carry.head, **head, **_params(carry.head, new["head"])},
        )
        kept = jax.tree.map(lambda n, old: jnp.where(good, n, old), rest, (carry.local, carry.head))
        return Carry(
            shared,
            *kept,
            opt_state=opt_state,
            step=carry.step + 1,
            bad_step=jnp.where(finite | (carry.bad_step >= 0), carry.bad_step, carry.step),
            loss_sum=carry.loss_sum + jnp.where(good, value, 0.0),
        )

    return jax.jit(step, donate_argnums=0)


def all_finite(tree: Tree) -> jax.Array:
    """Say whether every entry of every leaf is finite; a bool scalar.

    NaN and infinity survive a sum, and a sum is the cheapest pass over memory there is. A finite tree whose float32
    sum overflows counts as not finite.
    """
    return jnp.isfinite(jnp.stack([jnp.sum(leaf, dtype=jnp.float32) for leaf in jax.tree.leaves(tree)]).sum())


def _params(variables: Tree, params: Tree) -> dict[str, Tree]:
    return {PARAMS: params} if PARAMS in variables else {}


def _with_params(variables: Tree, params: Tree) -> Tree:
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
