"""`fit`: the call that trains, checked before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from pae_jax import heads
from pae_jax.batching import Feed, feed
from pae_jax.errors import ArgumentError, StructureError
from pae_jax.evaluation import EVAL_BATCH, require_own_net
from pae_jax.judging import Judge, Plateau
from pae_jax.looping import History, Loop, Rate
from pae_jax.network import Net, as_key
from pae_jax.placement import Placement, placement_over
from pae_jax.pruning import CubicSchedule, check_choice
from pae_jax.state import State, find_trainable
from pae_jax.training import PARTS, Augment, Loss, Rule, softmax_cross_entropy


def fit(
    net: Net,
    state: State,
    task: str,
    train: Any,
    *,
    optimizer: Any,
    epochs: int,
    key: jax.Array,
    batch_size: int = 32,
    val: Any = None,
    loss: Loss | None = None,
    augment: Augment | None = None,
    rate: float | Rate = 1.0,
    pruning: CubicSchedule | None = None,
    pick_optimizer: Any = None,
    pick_rate: float | Rate = 1.0,
    parts: Collection[Literal["shared", "local", "head"]] = PARTS,
    keep: Literal["last", "best"] = "last",
    score: Callable[[State], float] | None = None,
    plateau: Plateau | None = None,
    opt_state: Any = None,
    mesh: Mesh | None = None,
    split_weights: bool = False,
    steps_per_call: int | None = None,
    progress: bool = True,
) -> tuple[State, History]:
    """Train the newest task; nothing of any other task changes by a single bit, whatever the optimizer.

    Each step computes the gradient, runs the optax chain on the task's own weights, and applies
    `w <- where(owner == k, w + update, w)`.

    Args:
      net: the network description the state was made with.
      state: the network; it is left as it is.
      task: the newest task, not frozen.
      train: arrays `(x, y)`, shuffled anew every epoch and cut into full batches; or a factory
        `epoch -> iterator of batches`; or an iterable of batches, such as a Grain dataset. A batch is `(x, y)` or a
        dict with `image` and `label`.
      optimizer: any optax transformation over `{"shared", "local", "head"}`. Where a shared weight is not the task's
        own, it sees 0 as parameter and as gradient.
      epochs: passes over the data, at least 0.
      key: random key of shuffling and dropout.
      batch_size: examples per step when `train` is arrays; fewer if there are fewer.
      val: validation data in the same forms, evaluated after every epoch.
      loss: `(logits, y) -> losses`, one per example or their mean; default softmax cross-entropy of integer labels.
      augment: `(key, x) -> x`, compiled into the step: random crops and flips on the device.
      rate: factor of the updates, a number or `step -> number`; unlike a schedule inside the optimizer, another value
        compiles nothing.
      pruning: releases weights while training, after the steps that the schedule names.
      pick_optimizer: optax transformation over the scores of older weights, for a task of sharing "picked"; None
        leaves its picks as they are.
      pick_rate: as `rate`, of the picks.
      parts: what is trained. Without "local", biases and norms stay as they are and the backbone runs as in
        evaluation (PackNet, Piggyback); `("head",)` trains a new head on fixed features.
      keep: "last" returns the last epoch's weights, "best" those of the epoch with the highest validation accuracy,
        the lowest validation loss on ties, among the epochs after the end of `pruning`.
      score: `state -> float`, higher is better: ranks the epochs in place of validation accuracy. It must not keep
        the state.
      plateau: lowers the rate by the score of the epochs; needs keep="best".
      opt_state: state of the same optimizer to go on with; None starts afresh.
      mesh: devices that share the work: each takes a part of every batch. The result is that of one device up to the
        order of summation, and comes back to where the state's arrays live.
      split_weights: with a mesh, whether weights, owners and optimizer state are split over the devices as well,
        each array along its longest axis that the devices divide.
      steps_per_call: train steps that one call to the device takes, for data in arrays, which then stay on the device.
        None takes 1 on a CPU, where loops inside a program are slow, and up to 50 elsewhere.
      progress: show a progress bar.

    Returns:
      `(state, history)`.

    Raises:
      UnknownTaskError, PhaseError: no such task, or it is frozen.
      DataError, StructureError: unusable data, named; raised before training where the data is arrays.
      DivergedError: loss or gradient became NaN or infinite; holds the state after the last good step.

    Example:
      >>> import jax, jax.numpy as jnp, optax, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "sign", head=2, key=jax.random.key(1))
      >>> x = jax.random.normal(jax.random.key(2), (64, 4))
      >>> data = (x, (x[:, 0] > 0).astype(int))
      >>> state, history = pae.fit(net, state, "sign", data, optimizer=optax.adam(0.01), epochs=20,
      ...                          key=jax.random.key(3), progress=False)
      >>> pae.evaluate(net, state, "sign", data)["accuracy"] > 0.9
      True
    """
    entry = find_trainable(state, task, "fit")
    check_choice("keep", keep, ("last", "best"))
    for part in parts:
        check_choice("parts", part, PARTS)
    if isinstance(epochs, bool) or not isinstance(epochs, (int, np.integer)) or epochs < 0:
        raise ArgumentError(f"epochs must be an integer of at least 0, found {epochs!r}")
    if keep == "best" and val is None and score is None:
        raise ArgumentError("keep='best' chooses by validation data; pass val= or score=")
    if plateau is not None and keep != "best":
        raise ArgumentError("plateau goes back to the best epoch; it needs keep='best'")
    if pick_optimizer is not None and entry.pick is None:
        raise ArgumentError(
            f"pick_optimizer trains picks, but task {task!r} has none: pack it with sharing='picked', and not first"
        )
    if not parts and pick_optimizer is None:
        raise ArgumentError("parts is empty and there is no pick_optimizer: nothing would be trained")
    require_own_net(net, state, entry)
    objective = loss or softmax_cross_entropy
    pick_tx = None if pick_optimizer is None else _transformation(pick_optimizer)
    ordered = tuple(part for part in PARTS if part in parts)
    rule = Rule(_transformation(optimizer), objective, pick_tx, augment, ordered)
    _, logits = heads.layout(net, entry.head_spec, entry.width)
    batches = feed(net, train, logits, batch_size, class_labels=loss is None, augment=augment)
    placement = placement_over(mesh, split_weights, batches.size(batch_size))
    calls = _steps_per_call(steps_per_call, batches, placement)
    if pruning and batches.steps is not None and pruning.end > batches.steps * epochs:
        raise ArgumentError(
            f"pruning ends at step {pruning.end}, but {epochs} epochs of {batches.steps} steps are only "
            f"{batches.steps * epochs}; its final fraction would not be reached. Lower `end` or train longer."
        )
    val_feed = None if val is None else feed(net, val, logits, EVAL_BATCH, class_labels=loss is None)
    rates = (_schedule("rate", rate), _schedule("pick_rate", pick_rate))
    judge = Judge(net, task, val_feed, objective, score, keep == "best", plateau)
    loop = Loop(net, state, task, entry, rule, rates, pruning, as_key(key), placement, calls)
    return loop.run(batches, judge, int(epochs), opt_state, progress)


def _steps_per_call(wanted: int | None, batches: Feed, placement: Placement | None) -> int:
    if wanted is None:
        possible = batches.arrays is not None and placement is None and jax.default_backend() != "cpu"
        return 50 if possible else 1
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise ArgumentError(f"steps_per_call must be an integer of at least 1, found {wanted!r}")
    if wanted > 1 and (batches.arrays is None or placement is not None):
        raise ArgumentError("steps_per_call above 1 needs data in arrays and no mesh")
    return wanted


def _schedule(name: str, rate: float | Rate) -> Rate:
    if callable(rate):
        return rate
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not math.isfinite(rate):
        raise ArgumentError(f"{name} must be a finite number or a function of the step, found {rate!r}")
    return lambda step: rate


def _transformation(optimizer: Any) -> Any:
    """Return an optimizer as a gradient transformation; `optax.MultiSteps` is wrapped by its own method."""
    if hasattr(optimizer, "gradient_transformation"):
        return optimizer.gradient_transformation()
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise StructureError("optimizer", "", type(optimizer).__name__, "an optax gradient transformation", "")
    return optimizer
