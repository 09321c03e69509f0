"""Compiled steps of `fit` and `evaluate`, built on `TrainState`: pure functions of arrays."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pae_jax.caching import Cache, program_text
from pae_jax.errors import ArgumentError
from pae_jax.nets import Net, heads
from pae_jax.training import gated
from pae_jax.training.batches import Augment
from pae_jax.training.losses import Objective
from pae_jax.training.optimizer import transformation
from pae_jax.training.task_arrays import own
from pae_jax.training.train_state import TrainState
from pae_jax.trees import Tree

_TRAIN, _EVAL = Cache(8), Cache(32)


class Carry(NamedTuple):
    """The arrays that a train step changes.

    Attributes:
      ts: the task in training.
      bad_step: int32, the step whose loss or result was not finite; -1 if there is none.
      sums: float32, sums over the steps since the last reset: "loss", and the means of the metrics.
    """

    ts: TrainState
    bad_step: jax.Array
    sums: dict[str, jax.Array]


Step = Callable[[Carry, Any, Tree, Tree], Carry]
"""`(carry, rates, x, y) -> carry`; rates, float32 (2,), multiply the updates of the picks and of everything else."""


def start(ts: TrainState, objective: Objective) -> Carry:
    """Return the carry before the first step."""
    return Carry(ts, jnp.full((), -1, jnp.int32), no_sums(objective))


def no_sums(objective: Objective) -> dict[str, jax.Array]:
    """Return sums set to 0."""
    return {name: jnp.zeros((), jnp.float32) for name in ("loss", *(name for name, _ in objective.metrics))}


def key_of(ts: TrainState, objective: Objective, augment: Augment | None, batch: Any, seen: Any) -> tuple[Any, ...]:
    """Return the cache key of a train step, apart from the shapes of its operands.

    It contains the user's functions and digests of their present programs, because values that a function captures may
    have changed since it was last traced.

    Args:
      ts: abstract train state.
      objective: loss and metrics.
      augment: the augmentation; None without.
      batch: abstract `(x, y)`, input of the step.
      seen: abstract `(outputs, y)`, input of the loss.
    """
    head = heads.key_of(ts.head_spec)
    texts = _settled("loss or a metric", lambda: objective.text(*seen))
    if not hasattr(ts.tx, "transformation"):  # optimizers of recipes compare by value
        texts += (program_text(lambda params: _optimizer(ts.tx, params), ts.params),)
    if augment is not None:
        texts += (_settled("augment", lambda: program_text(augment, jax.random.key(0), *batch)),)
    return (ts.net, ts.width, head, ts.sharing, ts.picking, ts.tx, objective, augment, texts)


def _settled(name: str, text: Callable[[], Any]) -> Any:
    """Return the text of a program; raise `ArgumentError` if the next one differs, as with numbers of NumPy's."""
    first = text()
    if first != text():
        raise ArgumentError(
            f"{name} is another program each time it is traced, as with np.random: what it draws would be a constant "
            "of the compiled step. Draw in augment, by jax.random from its key"
        )
    return first


def _optimizer(tx: Any, params: Tree) -> Any:
    tx = transformation(tx)
    state = tx.init(params)
    try:
        return tx.update(params, state, params)
    except (TypeError, ValueError):  # it needs more than gradients; the step raises the error
        return state


def train_step(key: tuple[Any, ...], objective: Objective, augment: Augment | None, shardings: Any = None) -> Step:
    """Return the compiled train step; `shardings`, a carry of shardings, fixes the layout on several devices."""

    def make() -> Step:
        step = step_function(objective, augment)
        if shardings is None:
            return jax.jit(step, donate_argnums=0)
        return jax.jit(step, donate_argnums=0, out_shardings=shardings)

    layout = None if shardings is None else tuple(map(str, jax.tree.leaves(shardings)))
    return _TRAIN.get(("one", layout, *key), make)


def train_steps(key: tuple[Any, ...], objective: Objective, augment: Augment | None) -> Callable[..., Carry]:
    """Return the compiled `(carry, rates (n, 2), order (n, batch), x, y) -> carry` of n steps.

    All data is on the device and each step takes its batch from it, so there is one host call per n steps.
    """

    def make() -> Callable[..., Carry]:
        step = step_function(objective, augment)

        def steps(carry: Carry, rates: Any, order: Any, x: Tree, y: Tree) -> Carry:
            def body(carry: Carry, operands: tuple[jax.Array, jax.Array]) -> tuple[Carry, None]:
                rate, chosen = operands
                return step(carry, rate, *jax.tree.map(lambda leaf: leaf[chosen], (x, y))), None

            return jax.lax.scan(body, carry, (rates, order))[0]

        return jax.jit(steps, donate_argnums=0)

    return _TRAIN.get(("many", *key), make)


def step_function(objective: Objective, augment: Augment | None) -> Step:
    """Return a train step before it is compiled: forward, update, gate."""

    def forward(ts: TrainState, x: Tree, y: Tree) -> tuple[Any, ...]:
        assert ts.key is not None
        keys = jax.random.split(jax.random.fold_in(ts.key, ts.step), 3)
        if augment is not None:
            x, y = augment(keys[2], x, y)
        run = lambda params: gated.run(ts, params, x, True, keys[0], keys[1])  # noqa: E731
        out, pull_back, updates = jax.vjp(run, ts.params, has_aux=True)
        value, slope = jax.value_and_grad(objective.mean_loss, allow_int=True)(out, y)
        values = {name: jnp.mean(found) for name, found in objective.values(out, y).items()}
        return {"loss": value, **values}, slope, updates, pull_back

    def update(ts: TrainState, grads: Any, value: jax.Array, rates: Any) -> tuple[Any, Any]:
        extra = _accepted(ts.tx, {"value": value, "grad": grads})
        try:
            changes, opt_state = gated.proposed(ts, grads, extra)
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"the optimizer needs more than gradients ({str(error).splitlines()[0]}); fit gives it no more. Write "
                "the step yourself: pae.TrainState.apply_gradients(grads=..., value=..., value_fn=...)."
            ) from error
        rate = lambda part: rates[0] if part == "pick" else rates[1]  # noqa: E731
        scaled = {
            part: jax.tree.map(lambda u, part=part: u * rate(part).astype(u.dtype), tree)
            for part, tree in changes.items()
        }
        return scaled, opt_state

    def step(carry: Carry, rates: Any, x: Tree, y: Tree) -> Carry:
        values, slope, updates, pull_back = forward(carry.ts, x, y)
        # These are known before the gradients of weights. Checking those gradients would keep all of them in memory
        # until the last.
        finite = all_finite((values["loss"], slope, updates, rates))
        good = finite & (carry.bad_step < 0)
        # They are 0 where the task owns nothing, because the forward pass does not read those weights; a second mask
        # would cost a copy.
        grads = pull_back(slope)[0]
        changes, opt_state = update(carry.ts, grads, values["loss"], rates)
        # Checking the updates of shared weights would keep them in memory, while their gradients are in memory anyway.
        # If an optimizer makes updates non-finite, this also shows in the head and local variables, if those are
        # trained.
        alone = set(changes) == {"shared"} or _treats_parts_differently(opt_state)
        watched = changes if alone else {**changes, "shared": grads.get("shared", {})}
        finite = finite & all_finite(own(carry.ts, watched) if alone else watched)
        ts = gated.moved(carry.ts, changes, opt_state, updates, good)
        bad_step = jnp.where(finite | (carry.bad_step >= 0), carry.bad_step, carry.ts.step)
        return Carry(
            ts, bad_step, {name: total + jnp.where(good, values[name], 0.0) for name, total in carry.sums.items()}
        )

    return step


def _treats_parts_differently(opt_state: Any) -> bool:
    is_partition = lambda node: isinstance(node, optax.PartitionState)  # noqa: E731
    return any(map(is_partition, jax.tree.leaves(opt_state, is_leaf=is_partition)))


def _accepted(tx: Any, extra: dict[str, Any]) -> dict[str, Any]:
    """Return the extra arguments that an optimizer takes."""
    update = transformation(tx).update
    if not isinstance(transformation(tx), optax.GradientTransformationExtraArgs):
        return {}
    parameters = inspect.signature(update).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return extra
    return {name: value for name, value in extra.items() if name in parameters}


def all_finite(tree: Tree) -> jax.Array:
    """Return whether every entry of every leaf is finite; a bool scalar.

    A sum preserves NaN and infinity, and is the cheapest pass over memory. A finite tree whose float32 sum overflows
    counts as not finite.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype != jax.dtypes.float0]
    sums = [jnp.sum(leaf, dtype=jnp.float32) for leaf in leaves]
    return jnp.isfinite(jnp.stack([jnp.zeros((), jnp.float32), *sums]).sum())


def eval_step(net: Net, width: float, head: Any, objective: Objective, texts: tuple[str, ...]) -> Callable[..., Any]:
    """Return the compiled `(backbone variables, head variables, x, y, weight) -> sums over the batch`.

    The sums are of the loss and of each metric. With "example" the sum is the same whether the user's loss averages or
    not; with "batch" it is the loss of the batch times its number of examples.
    """
    backbone, output = net.program(width), heads.program(head)

    def step(variables: Tree, head_variables: Tree, x: Tree, y: Tree, weight: jax.Array) -> dict[str, jax.Array]:
        features, _ = backbone.apply(variables, x, False, None)
        out, _ = output.apply(head_variables, features, False, None)
        summed = lambda values: jnp.sum(jnp.where(weight > 0, values, 0.0).astype(jnp.float32))  # noqa: E731
        sums = {name: summed(values) for name, values in objective.values(out, y).items()}
        if objective.per == "batch":
            return sums | {"loss": objective.mean_loss(out, y) * jnp.sum(weight)}
        return sums | {"loss": summed(objective.example_losses(out, y))}

    key = (net, width, heads.key_of(head), objective, texts)
    return _EVAL.get(key, lambda: jax.jit(step))
