"""Evaluate tasks on data: `evaluate`, `predict`, `features`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from pae_jax.core import State, TaskState, find, integrity, ownership
from pae_jax.nets import Net, apply_backbone, apply_task, as_inputs, check_net, examples, in_pieces
from pae_jax.training.batches import Feed, Form, feed, form, kinds_of, pad
from pae_jax.training.losses import Loss, LossPer, Objective, Values, objective
from pae_jax.training.steps import eval_step
from pae_jax.trees import Tree, abstract, merge

EVAL_BATCH = 256


def evaluate(
    net: Net,
    state: State,
    task: str,
    data: Any,
    *,
    batch_size: int = EVAL_BATCH,
    loss: Loss | None = None,
    loss_per: LossPer = "example",
    metrics: Mapping[str, Values] | None = None,
) -> dict[str, float]:
    """Measure a task; every example counts once, and no array of the state changes.

    Args:
      net: the network description the state was made with.
      state: the network.
      task: name of a task, in any phase.
      data: as for `fit`; the last batch is padded, and the padding has weight 0.
      batch_size: examples per batch when `data` is arrays.
      loss: as for `fit`.
      loss_per: as for `fit`. "batch" averages the losses of whole batches, weighted by their examples, so the result
        depends on `batch_size`.
      metrics: `{name: (outputs, y) -> one number per example}`, averaged. None: the accuracy, if there is no custom
        loss.

    Returns:
      `{"accuracy": ..., "loss": ..., "count": ...}`, or the metrics in place of the accuracy.

    Raises:
      UnknownTaskError: no task of this name.
      DataError, StructureError: unusable data, or a loss that does not match `loss_per`; named.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
      >>> pae.evaluate(net, state, "a", (jnp.ones((10, 4)), jnp.zeros(10, int)), batch_size=4)["count"]
      10
    """
    entry = find(state, task)
    integrity.require_own_net(net, state, [entry])
    wanted = objective(loss, loss_per, metrics)
    shape = form(net, entry.width, entry.head_spec, wanted.takes_classes)
    return evaluate_state(net, state, task, feed(data, shape, batch_size), wanted)


def evaluate_state(net: Net, state: State, task: str, batches: Feed, wanted: Objective) -> dict[str, float]:
    """Do the work of `evaluate` on checked batches."""
    entry = find(state, task)
    variables = merge(ownership.task_weights(state, entry), entry.local)
    return Evaluation(form(net, entry.width, entry.head_spec, wanted.takes_classes), wanted).run(
        variables, entry.head, batches
    )


class Evaluation:
    """A compiled measurement of a task, whose functions are checked once for each form of a batch."""

    def __init__(self, form: Form, objective: Objective):
        self.form, self.objective = form, objective
        self._step: Any = None
        self._known: list[Any] = []

    def check(self, batches: Feed) -> None:
        """Raise if data in arrays cannot be measured, before any training."""
        if batches.arrays is not None:
            self._prepare(next(batches.epoch(0, None)))

    def run(self, backbone: Tree, head: Tree, batches: Feed) -> dict[str, float]:
        """Return the means over all examples of batches."""
        sums: list[dict[str, jax.Array]] = []
        count = size = 0
        for batch in batches.epoch(0, None):
            step = self._prepare(batch)
            found = examples(batch)
            size = found if self.objective.per == "batch" else max(size, found)
            x, y, weight = pad(batch, size)
            sums.append(step(backbone, head, as_inputs(self.form.net, x), y, weight))
            count += found
        totals = {name: float(sum(float(part[name]) for part in sums)) for name in sums[0]}
        return {name: totals[name] / count for name in sorted(totals)} | {"count": count}

    def _prepare(self, batch: Any) -> Any:
        """Return the compiled step; check loss and metrics on the first batch, and on later ones of other shapes."""
        kinds = kinds_of(batch)
        if kinds in self._known:
            return self._step
        self._known.append(kinds)
        x, y = batch
        out, labels = self.form.output(x), abstract(y)
        self.objective.check(out, labels)
        few = min(8, examples(batch))
        first = jax.tree.map(lambda leaf: leaf[:few], y)
        self.objective.check_scalar(
            jax.tree.map(lambda o: jax.ShapeDtypeStruct((few, *o.shape[1:]), o.dtype), out), first
        )
        texts = self.objective.text(out, labels)
        self._step = eval_step(self.form.net, self.form.width, self.form.head, self.objective, texts)
        return self._step


def predict(net: Net, state: State, task: str, x: Tree, *, batch_size: int | None = None) -> Tree:
    """Return a task's output, computed at the task's own width with the weights it sees.

    For a frozen task the output is bit-identical after every later pack, fit, prune, freeze, expand, save and load
    (same machine, same JAX, same batch shape).

    Args:
      net: the network description the state was made with.
      state: the network.
      task: name of a task, in any phase.
      x: inputs (batch, ...), shapes and dtypes as in the net's sample.
      batch_size: compute in chunks of this size, with the last one padded; None computes all at once, and has to
        be used inside jit.

    Returns:
      The head's output: an array, or a tree of arrays, (batch, ...).

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
    check_net(net)
    entry = find(state, task)
    apply = apply_task(net, entry.width, entry.head_spec)
    return _run(net, state, entry, x, batch_size, lambda weights, x: apply(weights, entry.local, entry.head, x))


def features(net: Net, state: State, task: str, x: Tree, *, batch_size: int | None = None) -> Tree:
    """Return the features that a task's head would get; otherwise like `predict`.

    Args:
      net: the network description the state was made with.
      state: the network.
      task: name of a task, in any phase.
      x: inputs (batch, ...), shapes and dtypes as in the net's sample.
      batch_size: compute in chunks of this size, with the last one padded; None computes all at once, and has to
        be used inside jit.

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
    check_net(net)
    entry = find(state, task)
    if entry.head_spec is None:  # the features are the output, to the bit: one program computes both
        return predict(net, state, task, x, batch_size=batch_size)
    apply = apply_backbone(net, entry.width)
    return _run(net, state, entry, x, batch_size, lambda weights, x: apply(weights, entry.local, x))


def _run(net: Net, state: State, entry: TaskState, x: Tree, batch_size: int | None, apply: Any) -> Tree:
    integrity.require_own_net(net, state, [entry])
    weights = ownership.task_weights(state, entry)
    return in_pieces(net, x, batch_size, lambda x: apply(weights, x))
