"""Which weights a task would use: squared gradients of its loss on a few batches, before it is packed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pae_jax.caching import Cache
from pae_jax.checks import check_count, check_key
from pae_jax.core import State, WeightInit, check_state, find, pack
from pae_jax.errors import DataError
from pae_jax.nets import Net, as_inputs, check_net
from pae_jax.training import gated
from pae_jax.training.batches import Augment, Feed, Form, feed, form
from pae_jax.training.losses import Loss, LossPer, Objective, objective
from pae_jax.training.steps import key_of
from pae_jax.training.task_arrays import whole_leaves
from pae_jax.training.train_state import TrainState
from pae_jax.trees import Tree, abstract, flatten

_SCORE = Cache(8)
_NO_OPTIMIZER = optax.identity()


def gradient_scores(
    net: Net,
    state: State,
    task: str,
    data: Any,
    *,
    head: Any,
    key: jax.Array,
    sharing: str = "all",
    local_init: str = "backbone",
    weight_init: WeightInit = "fresh",
    loss: Loss | None = None,
    loss_per: LossPer = "example",
    augment: Augment | None = None,
    batches: int = 8,
    batch_size: int = 32,
) -> Tree:
    """Score every free weight by the squared gradient of a coming task's loss, for `pack(budget_scores=)`.

    `mean_b (dL_b / dw)^2` over the first batches b, in training mode, without any update. For this the task is packed
    on trial and owns every free weight; the network that is given does not change. Every weight of the batches' path
    takes part, also those that the budget will leave out, which `pack` hides again.

    Args:
      net: the network description the state was made with.
      state: the network before the task; its newest task, if any, is frozen.
      task: name of the coming task, not used before.
      data: its training data, as for `fit`. Arrays are shuffled by the key; other data gives its first batches.
      head: as for `pack`.
      key: random key. With the key that `pack` gets later, the head and local variables are those that `pack` draws.
      sharing: as for `pack`; with "picked", all older weights take part.
      local_init: as for `pack`.
      weight_init: values of the free weights, as for `pack`. "fresh" draws freed weights. "preserve" sets one side of a
        new channel to 0, so the other side has no gradient and no score; use it only if all channels are in use.
      loss: as for `fit`.
      loss_per: as for `fit`.
      augment: as for `fit`.
      batches: how many batches to read, at least 1; fewer if the data has fewer.
      batch_size: examples per batch when `data` is arrays.

    Returns:
      Tree parallel to `state.shared`, float32, finite and at least 0; 0 for weights of other tasks.

    Raises:
      ArgumentError, PhaseError, StructureError: as for `pack`.
      CapacityError: no weight is free.
      DataError: unusable data or loss, a gradient that is not finite, or a gradient of 0 at every free weight.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.init(net, jax.random.key(0))
      >>> x = jax.random.normal(jax.random.key(1), (64, 4))
      >>> data, new = (x, (x[:, 0] > 0).astype(int)), {"head": 2, "key": jax.random.key(2)}
      >>> scores = pae.gradient_scores(net, state, "sign", data, **new)
      >>> state = pae.pack(net, state, "sign", budget=0.1, budget_scores=scores, **new)
      >>> pae.free_fraction(state)
      0.9

    Source: Sung et al., "Training Neural Networks with Fixed Sparse Masks", NeurIPS 2021 (there per example).
    """
    check_net(net)
    check_state(state)
    check_key(key)
    options: Any = {"sharing": sharing, "local_init": local_init, "weight_init": weight_init}
    trial = pack(net, state, task, head=head, key=key, **options)
    wanted = objective(loss, loss_per, {})
    entry = find(trial, task)
    shape = form(net, entry.width, entry.head_spec, wanted.takes_classes, augment)
    return scores_of(trial, task, shape, wanted, feed(data, shape, batch_size), key, batches)


def scores_of(
    trial: State, task: str, form: Form, wanted: Objective, data: Feed, key: jax.Array, batches: int = 8
) -> Tree:
    """Do the work of `gradient_scores` on a task that is packed on trial, with checked data."""
    batches = check_count("batches", batches, 1)
    order_key, step_key = jax.random.split(jax.random.fold_in(key, 1))
    ts = TrainState.create(form.net, trial, task, tx=_NO_OPTIMIZER, key=step_key)
    sums, step, count = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), ts.params["shared"]), None, 0
    for x, y in itertools.islice(data.epoch(0, order_key), batches):
        x = as_inputs(form.net, x) if form.augment is None else jax.tree.map(jnp.asarray, x)
        step = step or _step(ts, wanted, form, x, y)
        sums, count = step(ts, sums, jax.random.fold_in(step_key, count), x, y), count + 1
    means = {path: leaf / count for path, leaf in flatten(whole_leaves(ts, sums)).items()}
    _check(task, means)
    scores = {path: means.get(path, jnp.zeros(w.shape, jnp.float32)) for path, w in flatten(trial.shared).items()}
    return jax.tree.unflatten(jax.tree.structure(trial.shared), list(scores.values()))


def _check(task: str, means: dict[str, jax.Array]) -> None:
    host = {path: np.asarray(leaf) for path, leaf in means.items()}
    for path, leaf in host.items():
        if not np.isfinite(leaf).all():
            raise DataError(
                f"task {task!r}: the squared gradient of '{path}' is not finite; scale the loss or look at the data"
            )
    if not any(leaf.any() for leaf in host.values()):
        raise DataError(
            f"task {task!r}: the loss has gradient 0 at every free weight, so there is nothing to choose by. Is the "
            "head zero, the loss constant, or no free weight connected to the output (weight_init='fresh')?"
        )


def _step(ts: TrainState, wanted: Objective, form: Form, x: Tree, y: Tree) -> Callable[..., Tree]:
    """Return the compiled `(ts, sums, key, x, y) -> sums`, with the squared gradient of a batch added."""
    augment = form.augment

    def step(ts: TrainState, sums: Tree, key: jax.Array, x: Tree, y: Tree) -> Tree:
        keys = jax.random.split(key, 3)
        if augment is not None:
            x, y = augment(keys[2], x, y)
        run = lambda shared: gated.run(ts, {**ts.params, "shared": shared}, x, True, keys[0], keys[1])[0]  # noqa: E731
        slope = jax.grad(lambda shared: wanted.mean_loss(run(shared), y))(ts.params["shared"])
        return jax.tree.map(lambda total, g: total + jnp.square(g.astype(jnp.float32)), sums, slope)

    batch = abstract((x, y))
    seen = batch if augment is None else jax.eval_shape(augment, jax.random.key(0), *batch)
    seen = form.output(seen[0], train=True), seen[1]
    wanted.check(*seen, train=True)
    return _SCORE.get(key_of(abstract(ts), wanted, augment, batch, seen), lambda: jax.jit(step))
