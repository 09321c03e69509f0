"""Which older task is most like a new one: whose features classify its training data best by nearest neighbours."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.checks import check_key
from pae_jax.core import State, check_state, names
from pae_jax.errors import ArgumentError
from pae_jax.nets import Net, as_inputs, check_net, heads
from pae_jax.training.batches import Augment, Feed, Form, feed, form
from pae_jax.training.evaluation import EVAL_BATCH, features
from pae_jax.training.losses import class_numbers

_EXAMPLES, _NEIGHBOURS = 2000, 200
_REFERENCE = 0.66
"""Share of the examples that vote; the others are classified."""


def nearest_task(
    net: Net,
    state: State,
    data: Any,
    *,
    head: Any,
    key: jax.Array,
    augment: Augment | None = None,
    batch_size: int = EVAL_BATCH,
) -> str | None:
    """Return the older task whose features classify a new task's data best; nothing is trained.

    Up to 2000 training examples; 66 % of them vote on the others, in groups of the 200 nearest (at most half of the
    voters), Euclidean. It costs one forward pass of these examples for each older task. Start the new task from it by
    `pack(..., local_init=name)`.

    Args:
      net: the network description the state was made with.
      state: the network before the new task.
      data: training data of the new task, as for `fit`, with one class number per example. Arrays are shuffled by the
        key; other data gives its first batches.
      head: as for `pack`.
      key: random key.
      augment: as for `fit`.
      batch_size: examples per batch when `data` is arrays.

    Returns:
      The name of the task; None if there is no older task, or none is better than chance.

    Raises:
      ArgumentError: labels that are not one class number per example, or features that are several arrays.
      DataError, StructureError: unusable data.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
      >>> state = pae.freeze(state, "a")
      >>> x = jax.random.normal(jax.random.key(2), (90, 4))
      >>> pae.nearest_task(net, state, (x, (x[:, 0] > 0).astype(int)), head=2, key=jax.random.key(3))
      'a'

    Source: the transfer module of Yadav and Bansal, Findings of ACL 2023.
    """
    check_state(state)
    check_net(net)
    check_key(key)
    shape = form(net, state.width, heads.check_head(head), True, augment)
    return nearest_of(state, shape, feed(data, shape, batch_size), key)


def nearest_of(state: State, form: Form, data: Feed, key: jax.Array) -> str | None:
    """Do the work of `nearest_task` with checked data."""
    if not state.tasks:
        return None
    x, y = _examples(form, data, key)
    scores = {}
    for task in names(state):
        found = features(form.net, state, task, x, batch_size=EVAL_BATCH)
        if not hasattr(found, "shape"):
            raise ArgumentError("the nearest task is found by features that are one array; these are several")
        scores[task] = neighbour_accuracy(np.asarray(found, np.float32).reshape(len(y), -1), y)
    best = max(scores, key=lambda task: scores[task])
    return best if scores[best] > 1 / len(np.unique(y)) else None


def require_classes(labels: Any) -> None:
    """Raise `ArgumentError` unless labels are one class number per example."""
    if getattr(labels, "ndim", 0) != 1 or not class_numbers(labels):
        raise ArgumentError(
            "nearest_task, picks_from= and local_init='nearest' need one class number per example; take another value, "
            "or choose the task yourself"
        )


def neighbour_accuracy(points: np.ndarray, labels: np.ndarray) -> float:
    """Return the accuracy of a vote of the nearest of the first 66 % of points on the labels of the others."""
    split = max(1, int(_REFERENCE * len(points)))
    reference, votes = points[:split], labels[:split]
    if split == len(points):
        return 0.0
    k = max(1, min(_NEIGHBOURS, split // 2))
    distances = (reference**2).sum(axis=1)[None] - 2 * points[split:] @ reference.T  # without a term of the point alone
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :k]
    counts = (votes[nearest][:, :, None] == np.unique(labels)[None, None]).sum(axis=1)
    return float((np.unique(labels)[counts.argmax(axis=1)] == labels[split:]).mean())


def _examples(form: Form, data: Feed, key: jax.Array) -> tuple[object, np.ndarray]:
    """Return inputs and class numbers of the first training examples."""
    order_key, draw_key = jax.random.split(jax.random.fold_in(key, 2))
    parts, count = [], 0
    for number, (x, y) in enumerate(data.epoch(0, order_key)):
        if form.augment is None:
            x = as_inputs(form.net, x)
        else:
            x, y = form.augment(jax.random.fold_in(draw_key, number), *jax.tree.map(jnp.asarray, (x, y)))
        parts.append(jax.tree.map(np.asarray, (x, y)))
        require_classes(parts[-1][1])
        count += len(parts[-1][1])
        if count >= _EXAMPLES:
            break
    x, y = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:_EXAMPLES], *parts)
    return x, y
