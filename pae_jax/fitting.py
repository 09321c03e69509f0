"""The training loop around the compiled step: `fit`."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pae_jax import heads, ownership, training
from pae_jax.batching import Feed, feed
from pae_jax.errors import ArgumentError, DivergedError, StructureError
from pae_jax.evaluation import EVAL_BATCH, require_own_net
from pae_jax.judging import Judge, Plateau
from pae_jax.network import Net, as_inputs, as_key
from pae_jax.pruning import CubicSchedule, Room, check_choice
from pae_jax.state import State, TaskState, find_trainable
from pae_jax.training import PARTS, Augment, Carry, Loss, OptStates, Rule, softmax_cross_entropy
from pae_jax.trees import abstract, require_match

Rate = Callable[[int], float]


@dataclass(frozen=True)
class History:
    """What happened in a `fit`.

    Attributes:
      rows: one dict per epoch: `epoch` (from 1), `loss` (mean over the steps), and with validation data `val_loss`
        and `val_accuracy`.
      kept_epoch: epoch whose weights were returned.
      opt_state: state of the optimizer at the end, `OptStates` of both where picks were trained; hand it to another
        `fit` as `opt_state=` to go on. None after a divergence.
    """

    rows: tuple[dict[str, float], ...]
    kept_epoch: int
    opt_state: Any


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
    batches = feed(net, train, logits, batch_size, class_labels=loss is None)
    if pruning and batches.steps is not None and pruning.end > batches.steps * epochs:
        raise ArgumentError(
            f"pruning ends at step {pruning.end}, but {epochs} epochs of {batches.steps} steps are only "
            f"{batches.steps * epochs}; its final fraction would not be reached. Lower `end` or train longer."
        )
    val_feed = None if val is None else feed(net, val, logits, EVAL_BATCH, class_labels=loss is None)
    rates = (_schedule("rate", rate), _schedule("pick_rate", pick_rate))
    judge = Judge(net, task, val_feed, objective, score, keep == "best", plateau)
    run = _Fit(net, state, task, entry, rule, rates, pruning, as_key(key))
    return run.run(batches, judge, int(epochs), opt_state, progress)


class _Fit:
    """One call of `fit`: what stays the same from epoch to epoch."""

    def __init__(
        self,
        net: Net,
        state: State,
        task: str,
        entry: TaskState,
        rule: Rule,
        rates: tuple[Rate, Rate],
        pruning: CubicSchedule | None,
        key: jax.Array,
    ):
        self.net, self.state, self.task, self.entry = net, state, task, entry
        self.pruning, self.rule, self.rates = pruning, rule, rates
        self.owner = state.owner
        self.room = Room(state.owner, entry.id, pruning.scope) if pruning else None
        self.task_id = ownership.id_array(entry.id)
        self.shuffle_key, self.step_key = jax.random.split(key)
        self.step = training.train_step(net, entry, rule)
        self.init_optimizer = training.optimizer_init(net, rule)

    def run(self, batches: Feed, judge: Judge, epochs: int, opt_state: Any, progress: bool) -> tuple[State, History]:
        carry = self._start(opt_state)
        rows: list[dict[str, float]] = []
        taken = 0
        total = None if batches.steps is None else batches.steps * epochs
        with tqdm(total=total, desc=f"fit {self.task}", unit="step", disable=not progress, leave=False) as bar:
            for epoch in range(epochs):
                steps = 0
                for x, y in batches.epoch(epoch, self.shuffle_key):
                    rates = np.asarray([judge.rate * rate(taken + steps) for rate in self.rates], np.float32)
                    inputs = as_inputs(self.net, x)
                    carry = self.step(carry, self.owner, self.task_id, self.step_key, rates, inputs, y)
                    steps += 1
                    # A bad step ends the pruning too; asking costs a wait, so only where something is released.
                    if self.pruning and self.pruning.updates_at(taken + steps) and int(carry.bad_step) < 0:
                        carry = self._release(carry, taken + steps)
                    bar.update()
                taken += steps
                row = {"epoch": epoch + 1, "loss": float(carry.loss_sum) / max(steps, 1)}
                bad = int(carry.bad_step)
                if bad >= 0:
                    history = History(tuple(rows), epoch, None)
                    raise DivergedError(self.task, bad, self._state(carry), history)
                row |= judge.measure(self._state(carry))
                rows.append(row)
                bar.set_postfix({name: f"{value:.3g}" for name, value in row.items() if name != "epoch"})
                carry = carry._replace(loss_sum=jnp.zeros((), jnp.float32))
                if judge.keeps and not (self.pruning and taken < self.pruning.end):
                    judge.consider(row, carry, self._state(carry))
                    resumed = judge.slow_down(carry)
                    if resumed is None:
                        break
                    carry = resumed
        # Tracing may rewrite a schedule's closure, optax.cosine_decay_schedule does; its new key leads here as well.
        training.train_step(self.net, self.entry, self.rule, known=self.step)
        training.optimizer_init(self.net, self.rule, known=self.init_optimizer)
        last = carry.opt_state if self.rule.pick_tx is not None else carry.opt_state.weights
        if judge.best is not None:
            return judge.best.state, History(tuple(rows), judge.best.epoch, last)
        return self._state(carry), History(tuple(rows), len(rows), last)

    def _start(self, opt_state: Any) -> Carry:
        parts = (self.state.shared, self.entry.local, self.entry.head, self.entry.pick)
        if opt_state is None:
            opt_state = self.init_optimizer(*parts, self.owner, self.task_id)
        else:
            initial = jax.eval_shape(self.init_optimizer, *parts, self.owner, self.task_id)
            hint = "It must come from a fit with the same optimizer, width and head."
            opt_state = opt_state if isinstance(opt_state, OptStates) else OptStates(opt_state)
            opt_state = jax.tree.map(jnp.asarray, opt_state)
            require_match("opt_state", abstract(opt_state), abstract(initial), hint)
        zero = jnp.zeros((), jnp.int32)
        # The steps overwrite their operands in place; the caller's arrays must survive.
        mine = jax.tree.map(jnp.copy, (*parts, opt_state))
        return Carry(*mine, step=zero, bad_step=zero - 1, loss_sum=jnp.zeros((), jnp.float32))

    def _release(self, carry: Carry, step: int) -> Carry:
        assert self.pruning and self.room
        shared, self.owner = self.room.prune(carry.shared, self.owner, self.pruning(step))
        return carry._replace(shared=shared)

    def _state(self, carry: Carry) -> State:
        entry = self.entry.replace(local=carry.local, head=carry.head, pick=carry.pick)
        return self.state.replace(shared=carry.shared, owner=self.owner, tasks={**self.state.tasks, self.task: entry})


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
