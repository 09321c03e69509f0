"""Loops around the compiled programs of finished or unfinished tasks: `evaluate`, `predict`, `features`."""

from __future__ import annotations

from typing import Any

import jax

from pae_jax import heads, ownership, training, verification
from pae_jax.batching import Feed, feed, pad
from pae_jax.network import Net, as_inputs
from pae_jax.pieces import in_pieces
from pae_jax.state import State, TaskState, find
from pae_jax.training import Loss, softmax_cross_entropy
from pae_jax.trees import Tree, require_match

EVAL_BATCH = 256


def evaluate(
    net: Net,
    state: State,
    task: str,
    data: Any,
    *,
    batch_size: int = EVAL_BATCH,
    loss: Loss | None = None,
) -> dict[str, float]:
    """Measure a task; every example counts once, and no array of the state changes.

    Args:
      net: the network description the state was made with.
      state: the network.
      task: name of a task, in any phase.
      data: as for `fit`; the last batch is filled up and its filling weighted 0.
      batch_size: examples per batch when `data` is arrays.
      loss: as for `fit`, taken of single examples and averaged.

    Returns:
      `{"accuracy": ..., "loss": ..., "count": ...}`, the first only where labels are class numbers.

    Raises:
      UnknownTaskError: no task of this name.
      DataError, StructureError: unusable data, named.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
      >>> pae.evaluate(net, state, "a", (jnp.ones((10, 4)), jnp.zeros(10, int)), batch_size=4)["count"]
      10
    """
    entry = find(state, task)
    require_own_net(net, state, entry)
    _, logits = heads.layout(net, entry.head_spec, entry.width)
    batches = feed(net, data, logits, batch_size, class_labels=loss is None)
    return evaluate_feed(net, state, task, batches, loss or softmax_cross_entropy)


def evaluate_feed(net: Net, state: State, task: str, batches: Feed, loss: Loss) -> dict[str, float]:
    """Do the work of `evaluate` on checked batches."""
    entry = find(state, task)
    step = training.eval_step(net, entry.width, entry.head_spec, loss)
    weights = ownership.task_weights(state, entry)
    sums: list[dict[str, jax.Array]] = []
    count = size = 0
    for batch in batches.epoch(0, None):
        size = max(size, len(batch[1]))
        x, y, weight = pad(batch, size)
        sums.append(step(weights, entry.local, entry.head, as_inputs(net, x), y, weight))
        count += len(batch[1])
    totals = {name: float(sum(float(part[name]) for part in sums)) for name in sums[0]}
    return {name: totals[name] / count for name in sorted(totals)} | {"count": count}


def predict(net: Net, state: State, task: str, x: Tree, *, batch_size: int | None = None) -> jax.Array:
    """Return a task's logits, computed at the task's own width with the weights it sees.

    For a frozen task they are the same bits for ever: through later pack, fit, prune, freeze, expand, save and load
    (same machine, same JAX, same batch shape).

    Args:
      net: the network description the state was made with.
      state: the network.
      task: name of a task, in any phase.
      x: inputs (batch, ...), shapes and dtypes as in the net's sample.
      batch_size: compute in pieces of this size, the last one filled up; None takes all at once.

    Returns:
      The head's output (batch, ...).

    Raises:
      UnknownTaskError: no task of this name.
      StructureError: inputs of a wrong shape or dtype.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
      >>> pae.predict(net, state, "a", jnp.ones((3, 4))).shape
      (3, 2)
    """
    entry = find(state, task)
    apply = training.apply_task(net, entry.width, entry.head_spec)
    return _run(net, state, entry, x, batch_size, lambda weights, x: apply(weights, entry.local, entry.head, x))


def features(net: Net, state: State, task: str, x: Tree, *, batch_size: int | None = None) -> jax.Array:
    """Return the features that a task's head would get; otherwise like `predict`.

    Args:
      net: the network description the state was made with.
      state: the network.
      task: name of a task, in any phase.
      x: inputs (batch, ...), shapes and dtypes as in the net's sample.
      batch_size: compute in pieces of this size, the last one filled up; None takes all at once.

    Returns:
      The backbone's output (batch, ...) at the task's own width.

    Raises:
      UnknownTaskError: no task of this name.
      StructureError: inputs of a wrong shape or dtype.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
      >>> pae.features(net, state, "a", jnp.ones((3, 4))).shape
      (3, 16)
    """
    entry = find(state, task)
    apply = training.apply_backbone(net, entry.width)
    return _run(net, state, entry, x, batch_size, lambda weights, x: apply(weights, entry.local, x))


def _run(net: Net, state: State, entry: TaskState, x: Tree, batch_size: int | None, apply: Any) -> jax.Array:
    require_own_net(net, state, entry)
    weights = ownership.task_weights(state, entry)
    return in_pieces(net, x, batch_size, lambda x: apply(weights, x))


def require_own_net(net: Net, state: State, entry: TaskState) -> None:
    """Raise `StructureError` unless state and task have the trees of this network."""
    hint = "Was the state made with this net?"
    require_match("state.shared", state.shared, net.layout(state.width).shared, hint)
    require_match(f"local variables of task {entry.id}", entry.local, net.layout(entry.width).local, hint)
    verification.require_owner(state)
