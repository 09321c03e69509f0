"""`fit`: train a task, with all arguments checked before any computation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pae_jax.checks import check_choice, check_count, check_key, check_kind
from pae_jax.core import CubicSchedule, State, find_trainable, integrity
from pae_jax.errors import ArgumentError, kind_of
from pae_jax.nets import Net
from pae_jax.training import gated
from pae_jax.training.batches import Augment, feed, form
from pae_jax.training.choice import Best
from pae_jax.training.evaluation import EVAL_BATCH
from pae_jax.training.loop import History, Row, Training
from pae_jax.training.losses import Loss, LossPer, Values, objective
from pae_jax.training.optimizer import holds
from pae_jax.training.sharding import Devices, devices_of
from pae_jax.training.train_state import PARTS, TrainState, created_like
from pae_jax.trees import abstract, flatten, require_match

_BEYOND_FIT = (optax.LookaheadState, optax.contrib.SAMState, optax.contrib.ScheduleFreeState)


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
    loss_per: LossPer = "example",
    metrics: Mapping[str, Values] | None = None,
    augment: Augment | None = None,
    pruning: CubicSchedule | None = None,
    parts: Collection[Literal["shared", "local", "head", "pick"]] = PARTS,
    keep: Literal["last", "best"] | Best = "last",
    devices: Devices | Mesh | None = None,
    resume: History | None = None,
    on_epoch: Callable[[State, Row], bool | None] | None = None,
    on_step: Callable[[Row], bool | None] | None = None,
    progress: bool = False,
) -> tuple[State, History]:
    """Train the newest task; with any optimizer, no bit of any other task changes.

    A loop over `TrainState`: each step computes the gradient, runs the optax chain on the task's own weights, and
    applies `w <- where(owner == k, w + update, w)`.

    Args:
      net: the network description the state was made with.
      state: the network; it is not modified.
      task: the newest task, not frozen.
      train: arrays `(x, y)`, shuffled in every epoch and cut into full batches; or a factory
        `epoch -> iterator of batches`; or an iterable of batches, such as a Grain dataset. A batch is `(x, y)`, or a
        dict of the inputs and a `label`. x and y are any trees of arrays (batch, ...); y may be None with a custom
        loss.
      optimizer: any optax transformation over `{"shared", "local", "head", "pick"}`, or an optimizer of `pae.recipes`.
        For a shared weight that the task does not own, the optimizer gets 0 as parameter and as gradient; a leaf of
        which the task owns little is a block or a row for it, with as many axes. A new optimizer object for every call
        compiles every time; optimizers of `pae.recipes` compare by value.
      epochs: passes over the data, at least 0; with `resume`, additional passes.
      key: random key of shuffling and dropout.
      batch_size: examples per step when `train` is arrays; fewer if there are fewer.
      val: validation data in the same forms, evaluated after every epoch.
      loss: `(outputs, y) -> losses`, one per example or their mean; default softmax cross-entropy of class numbers.
        A loss of three arguments gets the two parts of a pair y.
      loss_per: "example", or "batch" for a loss that is a function of all examples together, such as a contrastive one.
      metrics: `{name: (outputs, y) -> one number per example}`, measured in training and on `val`. None: the accuracy,
        if there is no custom loss.
      augment: `(key, x) -> x` or `(key, x, y) -> (x, y)`, compiled into the step: random crops, flips, mixing.
      pruning: releases weights while training, after the steps that the schedule names.
      parts: the parts to train. Without "local", biases and norms do not change and the backbone runs as in evaluation
        (PackNet, Piggyback); `("head",)` trains a new head on fixed features.
      keep: "last" returns the last epoch's weights, "best" those of the best validation score; `pae.Best` has more
        options.
      devices: a mesh, and steps per call; None takes one device.
      resume: the history of an earlier `fit` of this task, to continue from its end: last epoch's weights, optimizer,
        epoch, key. 2 + 2 epochs give the same bits as 4.
      on_epoch: called after every epoch with a copy of the network and the epoch's row; True ends training.
      on_step: called with `{"step": ..., "loss": ...}` after every call to the device, the loss a scalar on it; True
        ends training after this epoch's measurements.
      progress: show a progress bar.

    Returns:
      `(state, history)`.

    Raises:
      UnknownTaskError, PhaseError: no such task, or it is frozen.
      ArgumentError: an argument outside its range, or an optimizer that needs more arguments than gradients.
      DataError, StructureError: unusable data or loss, named; before training where the data is arrays.
      TrainingInterrupted: a KeyboardInterrupt; holds the state after the last finished step.
      DivergedError: loss or gradient became NaN or infinite; holds the state after the last good step.

    Example:
      >>> import jax, jax.numpy as jnp, optax, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "sign", head=2, key=jax.random.key(1))
      >>> x = jax.random.normal(jax.random.key(2), (64, 4))
      >>> data = (x, (x[:, 0] > 0).astype(int))
      >>> state, history = pae.fit(net, state, "sign", data, optimizer=optax.adam(0.01), epochs=20,
      ...                          key=jax.random.key(3))
      >>> pae.evaluate(net, state, "sign", data)["accuracy"] > 0.9
      True
    """
    entry = find_trainable(state, task, "fit")
    rule = _keep(keep, val is not None)
    if pruning is not None and not hasattr(pruning, "updates_at"):
        raise ArgumentError(
            f"pruning must be a schedule such as pae.CubicSchedule(final=0.5, end=100), found {kind_of(pruning)}"
        )
    integrity.require_own_net(net, state, [entry])
    wanted = objective(loss, loss_per, metrics)
    shape = form(net, entry.width, entry.head_spec, wanted.takes_classes, augment)
    plain = form(net, entry.width, entry.head_spec, wanted.takes_classes)
    training = Training(
        task=task,
        state=state,
        form=shape,
        objective=wanted,
        data=feed(train, shape, batch_size),
        val=None if val is None else feed(val, plain, EVAL_BATCH),
        epochs=check_count("epochs", epochs),
        key=check_key(key),
        pruning=pruning,
        keep=rule,
        devices=devices_of(devices),
        on_epoch=on_epoch,
        on_step=on_step,
        progress=progress,
    )
    return trained(training, optimizer, batch_size, parts, resume)


def trained(
    training: Training, optimizer: Any, batch_size: int, parts: Collection[str] = PARTS, resume: History | None = None
) -> tuple[State, History]:
    """Do the work of `fit` on checked arguments."""
    for part in parts:
        check_choice("parts", part, PARTS)
    data = training.data
    if data.arrays is not None:
        training.devices.check_batch(data.size(batch_size))
    shuffle_key, step_key = jax.random.split(training.key)
    training = dataclasses.replace(training, key=shuffle_key)
    if resume is None:
        ts = TrainState.create(
            training.form.net, training.state, training.task, tx=optimizer, key=step_key, parts=parts
        )
    else:
        ts = _resumed(training, optimizer, parts, step_key, resume)
    for kind in _BEYOND_FIT:
        if holds(ts.opt_state, kind):
            raise ArgumentError(
                f"an optimizer with {kind.__name__} moves weights that are not those to keep; fit does not know when "
                "to look. Write the step yourself with pae.TrainState."
            )
    if data.steps is not None and data.arrays is not None:
        training.require_reached(int(ts.step), data.steps)
    return training.run(ts, resume)


def _keep(keep: Any, validated: bool) -> Best | None:
    rule = Best() if keep == "best" else keep
    if not isinstance(rule, Best):
        check_choice("keep", rule, ("last", "best"))
        return None
    if not validated and rule.score is None:
        raise ArgumentError("keep='best' chooses by validation data; pass val=, or keep=pae.Best(score=...)")
    return rule


def _resumed(
    training: Training, optimizer: Any, parts: Collection[str], step_key: jax.Array, history: History
) -> TrainState:
    """Return the final train state of an earlier fit, after checking that it belongs to this call."""
    check_kind("resume", history, History, "the history that fit returned")
    ts, entry = history.end, training.state.tasks[training.task]
    if ts is None:
        raise ArgumentError("resume= needs the history of a fit that did not diverge")
    same = ts.net is training.form.net and (ts.width, int(ts.task_id)) == (entry.width, entry.id)
    if not same or not gated.is_of(ts, training.task):
        raise ArgumentError(f"resume= is the history of another task, width or network than {training.task!r} here")
    owner, known = flatten(training.state.owner), flatten(ts.owner)
    for path, ids in known.items():
        if not bool((ids == owner[path]).all()):
            raise ArgumentError(
                f"the state was pruned or packed since that fit: owners of '{path}' differ. Start a new fit without "
                "resume=."
            )
    fresh = created_like(ts, training.form.net, training.state, training.task, optimizer, step_key, parts)
    hint = "resume= goes on with the same optimizer, parts and head."
    for part in ("params", "variables", "opt_state"):
        require_match(f"history.{part}", abstract(getattr(ts, part)), abstract(getattr(fresh, part)), hint)
    # The steps overwrite their operands, so copy what the earlier fit returned.
    return jax.tree.map(jnp.copy, ts).replace(tx=optimizer, key=step_key)
