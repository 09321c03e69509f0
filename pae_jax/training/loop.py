"""The training loop: epochs of compiled steps over a `TrainState`, releases of weights between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax import html
from pae_jax.core import CubicSchedule, State, pruning, spread_arrays
from pae_jax.errors import ArgumentError, DivergedError, TrainingInterrupted
from pae_jax.nets import as_inputs
from pae_jax.progress import progress_bar
from pae_jax.training import gated, steps
from pae_jax.training.batches import Feed, Form, kinds_of
from pae_jax.training.choice import Best, Progress
from pae_jax.training.evaluation import Evaluation
from pae_jax.training.losses import Objective
from pae_jax.training.sharding import Devices
from pae_jax.training.steps import Carry
from pae_jax.training.task_arrays import model_variables
from pae_jax.training.train_state import TrainState
from pae_jax.trees import Tree, abstract

Row = dict[str, Any]
Rates = Callable[[int], tuple[float, float]]
"""`step -> (factor of the picks' updates, factor of all others)`."""


def constant(step: int) -> tuple[float, float]:
    """Do not scale the updates."""
    del step
    return 1.0, 1.0


@dataclass(frozen=True, repr=False)
class History:
    """The history of a `fit`; pass it to another as `resume=` to continue. Its text shows only the rows.

    Attributes:
      rows: one dict per epoch: `epoch` (from 1), `loss` and metrics in training (means over the steps), and with
        validation data the same after `val_`.
      kept_epoch: epoch whose weights were returned.
      end: the train state after the last step, with the optimizer's state; None after a divergence.
      progress: state of the choice of the epoch.
    """

    rows: tuple[Row, ...]
    kept_epoch: int
    end: TrainState | None = field(default=None)
    progress: Progress = field(default=Progress())

    @property
    def opt_state(self) -> Any:
        """State of the optimizer at the end."""
        return None if self.end is None else self.end.opt_state

    def __repr__(self) -> str:
        return f"History of {len(self.rows)} epochs, kept {self.kept_epoch}\n{self._table()}"

    def _table(self) -> str:
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        lines = [names, *([html.cell(row.get(name)) for name in names] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines
        )

    def _repr_html_(self) -> str:
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        return html.table(names, [[row.get(name) for name in names] for row in self.rows])


@dataclass(frozen=True)
class Training:
    """One call of `fit`, checked.

    Attributes:
      task: name of the task, for messages.
      state: the network before.
      form: the required form of a batch; holds network, head and augmentation.
      objective: loss and metrics.
      data: training data.
      val: validation data; None without.
      epochs: passes over the data.
      key: of shuffling.
      pruning: schedule of weight releases; None without.
      keep: how the epoch to keep is chosen; None keeps the last.
      devices: placement of the arrays, and steps per call.
      rates: factors of the updates by step.
      on_epoch, on_step: callbacks of the user.
      progress: whether a progress bar is shown.
      agree: returns the row of an epoch that all processes go by.
    """

    task: str
    state: State
    form: Form
    objective: Objective
    data: Feed
    val: Feed | None
    epochs: int
    key: jax.Array
    pruning: CubicSchedule | None = None
    keep: Best | None = None
    devices: Devices = field(default_factory=Devices)
    rates: Rates = constant
    on_epoch: Callable[[State, Row], bool | None] | None = None
    on_step: Callable[[Row], bool | None] | None = None
    progress: bool = False
    agree: Callable[[Row], Row] = dict

    def run(self, ts: TrainState, before: History | None = None) -> tuple[State, History]:
        """Train; return the network and the history."""
        start = before if before is not None else History((), 0)
        return _Loop(self, ts, start).run()

    def require_reached(self, begun: int, in_an_epoch: int) -> None:
        """Raise `ArgumentError` if the pruning schedule ends after the last of so many steps an epoch."""
        planned = begun + in_an_epoch * self.epochs
        if self.pruning is not None and self.pruning.end > planned:
            raise ArgumentError(
                f"pruning ends at step {self.pruning.end}, but {self.epochs} epochs of {in_an_epoch} steps end at "
                f"{planned}; its final fraction would not be reached. Lower `end` or train longer."
            )


def in_training(form: Form, objective: Objective) -> Objective:
    """Return an objective without metrics if a head returns more in training than they expect."""
    outputs = [form.output(form.net.sample, train) for train in (False, True)]
    return objective if outputs[0] == outputs[1] else replace(objective, metrics=())


class _Loop:
    """The mutable state of a training."""

    def __init__(self, training: Training, ts: TrainState, before: History):
        self.of, self.before, self.choice = training, before, before.progress
        self.rows, self.first = list(before.rows), len(before.rows)
        self.taken = self.begun = int(ts.step)
        self.objective = in_training(training.form, training.objective)
        self.carry = training.devices.place(steps.start(ts, self.objective))
        self.key: Any = None
        self.step: Any = None
        self.known: list[Any] = []
        self.evaluation = Evaluation(training.form, training.objective)
        self.room = None
        if training.pruning is not None:
            self.room = pruning.available(
                training.state.owner, training.state.tasks[training.task].id, training.pruning.scope
            )

    def run(self) -> tuple[State, History]:
        try:
            return self._run()
        except KeyboardInterrupt as error:
            ts = self.carry.ts
            if any(leaf.is_deleted() for leaf in jax.tree.leaves(ts)):  # between the step and its result
                raise
            if spread_arrays.over_processes(ts):
                raise  # to put it together, the other processes would have to be interrupted as well
            kept = jax.tree.map(jnp.copy, ts)
            history = History(tuple(self.rows), len(self.rows), kept, self.choice)
            raise TrainingInterrupted(self.of.task, self.taken, self._state(ts), history) from error

    def _run(self) -> tuple[State, History]:
        of = self.of
        if of.val is not None:
            self.evaluation.check(of.val)
        if of.pruning is not None and of.epochs and of.pruning.end <= self.begun:
            self._release(of.pruning.final)  # the update at the end always happens
        if of.keep is not None and of.pruning is not None and self.taken < of.pruning.end:
            self.choice = replace(self.choice, best=None, waited=0)  # epochs before the end of pruning do not count
        elif of.keep is not None:
            self.choice = self.choice.resumed(self.carry.ts, of.keep, lambda ts: of.agree(self._scores(ts)))
        total = None if of.data.steps is None else of.data.steps * of.epochs
        with progress_bar(title=f"fit {of.task}", unit="step", shown=of.progress, total=total) as bar:
            for epoch in range(self.first, self.first + (0 if self.choice.ended else of.epochs)):
                count = self.taken
                stopped = self._epoch(epoch, bar)
                row = self._row(epoch, max(self.taken - count, 1))
                if epoch == self.first and not stopped:
                    self.of.require_reached(self.begun, self.taken - count)
                self.rows.append(row)
                bar.set_postfix({name: f"{value:.3g}" for name, value in row.items() if name != "epoch"})
                self.carry = self.carry._replace(sums=of.devices.place(steps.no_sums(self.objective)))
                if self._ends(row) or stopped:
                    break
        self._finish_pruning()
        return self._result()

    def _epoch(self, epoch: int, bar: Any) -> bool:
        """Take the steps of an epoch; return whether the user stopped it."""
        for advance, count in self._calls(epoch):
            before = jnp.copy(self.carry.sums["loss"]) if self.of.on_step is not None else 0.0
            self.carry = advance(self.carry)
            self.taken += count
            if self.of.pruning is not None and self.of.pruning.updates_at(self.taken):
                self._release(self.of.pruning(self.taken))
            bar.update(count)
            row = {"step": self.taken, "loss": (self.carry.sums["loss"] - before) / count} if self.of.on_step else {}
            if self.of.on_step is not None and self.of.on_step(row):
                return True
        return False

    def _calls(self, epoch: int) -> Iterator[tuple[Callable[[Carry], Carry], int]]:
        """Yield the calls of an epoch, `(carry -> carry, steps)`; no call extends past a step that releases weights."""
        of = self.of
        per_call = self._steps_per_call()
        if per_call == 1 or of.data.arrays is None or of.data.order is None:
            for x, y in of.data.epoch(epoch, of.key):
                x, y = self._inputs(x), jax.tree.map(jnp.asarray, y) if of.devices.mesh is None else y
                x, y = of.devices.batch((x, y))
                step, rates = self._compiled(x, y), self._rates(self.taken, 1)[0]
                yield lambda carry, x=x, y=y, rates=rates, step=step: step(carry, rates, x, y), 1
            return
        x, y = self._on_device()
        order, start = of.data.order(epoch, of.key), 0
        batch = jax.tree.map(lambda leaf: leaf[: order.shape[1]], (x, y))
        self._compiled(*batch)
        many = steps.train_steps(self.key, self.objective, of.form.augment)
        while start < len(order):
            count = min(per_call, len(order) - start)
            if of.pruning is not None:
                ahead = range(1, count + 1)
                count = next((n for n in ahead if of.pruning.updates_at(self.taken + n)), count)
            chosen, rates = order[start : start + count], self._rates(self.taken, count)
            yield lambda carry, o=chosen, rates=rates: many(carry, rates, o, x, y), count
            start += count

    def _steps_per_call(self) -> int:
        wanted = self.of.devices.steps_per_call
        possible = self.of.data.arrays is not None and self.of.devices.mesh is None
        if wanted is not None:
            if wanted > 1 and not possible:
                raise ArgumentError("steps_per_call above 1 needs data in arrays and no mesh")
            return wanted
        return 50 if possible and jax.default_backend() != "cpu" else 1

    def _compiled(self, x: Tree, y: Tree) -> steps.Step:
        """Return the train step; check loss and metrics on the first batch, and on later ones of other shapes."""
        kinds = kinds_of((x, y))
        if kinds not in self.known:
            of, ts, batch = self.of, self.carry.ts, abstract((x, y))
            self.known.append(kinds)
            seen = of.form.trained(batch)
            self.objective.check(*seen, train=True)
            if self.step is not None:
                return self.step
            self.key = steps.key_of(abstract(ts), self.objective, of.form.augment, batch, seen)
            shardings = None
            if of.devices.mesh is not None:
                shardings = jax.tree.map(lambda leaf: leaf.sharding, self.carry)
            self.step = steps.train_step(self.key, self.objective, of.form.augment, shardings)
        return self.step

    def _on_device(self) -> Any:
        if not hasattr(self, "_data"):
            x, y = self.of.data.arrays or (None, None)
            self._data = self._inputs(x), jax.tree.map(jnp.asarray, y)
        return self._data

    def _inputs(self, x: Tree) -> Tree:
        # An augmentation determines the dtype: it may turn uint8 images into floats on the device.
        return as_inputs(self.of.form.net, x) if self.of.form.augment is None else jax.tree.map(jnp.asarray, x)

    def _rates(self, first: int, count: int) -> np.ndarray:
        factors = self.choice.pick_rate, self.choice.rate
        rows = ([f * r for f, r in zip(factors, self.of.rates(first + n), strict=True)] for n in range(count))
        return np.asarray(list(rows), np.float32)

    def _release(self, fraction: float) -> None:
        assert self.of.pruning is not None
        targets = jnp.asarray(pruning.rounded(fraction, self.room))
        # A bad step also ends the pruning; the device checks this without host synchronisation.
        targets = jnp.where(self.carry.bad_step < 0, targets, 0)
        ts = gated.pruned_to(self.carry.ts, targets, self.of.pruning.scope)
        self.carry = self.carry._replace(ts=self.of.devices.place(ts))

    def _finish_pruning(self) -> None:
        """Prune to the final fraction if an epoch was shorter than the first one, or training was stopped."""
        if self.of.pruning is not None and self.of.epochs and self.taken < self.of.pruning.end:
            self._release(self.of.pruning.final)

    def _row(self, epoch: int, count: int) -> Row:
        of, carry = self.of, self.carry
        means = {name: float(value) / count for name, value in carry.sums.items()}
        row = {"epoch": epoch + 1, "loss": means.pop("loss")} | means
        bad = int(carry.bad_step)
        if bad >= 0:
            raise DivergedError(of.task, bad, self._state(carry.ts), History(tuple(self.rows), epoch))
        return of.agree(row | self._scores(carry.ts))

    def _scores(self, ts: TrainState) -> Row:
        """Return what is measured on validation data, and the score of the user's rule."""
        of, row = self.of, {}
        if of.val is not None:
            alone = self._alone(ts)
            scores = self.evaluation.run(*model_variables(alone, alone.params), of.val)
            row |= {f"val_{name}": value for name, value in scores.items() if name != "count"}
        if of.keep is not None and of.keep.score is not None:
            row["score"] = float(of.keep.score(self._state(ts)))
        return row

    def _ends(self, row: Row) -> bool:
        """Update the choice of the epoch; return whether training ends."""
        of = self.of
        asked = of.on_epoch is not None and of.on_epoch(self._state(jax.tree.map(jnp.copy, self.carry.ts)), dict(row))
        if of.keep is None or (of.pruning is not None and self.taken < of.pruning.end):
            return bool(asked)
        self.choice = self.choice.after(row, self.carry.ts, of.keep)
        self.choice, ts = self.choice.slowed(self.carry.ts, of.keep.plateau)
        if ts is None:
            return True
        self.carry = self.carry._replace(ts=ts)
        return bool(asked)

    def _result(self) -> tuple[State, History]:
        end, best = self.carry.ts, self.choice.best
        rows = tuple(self.rows)
        if best is not None:
            return self._state(best.ts), History(rows, best.epoch, end, self.choice)
        return self._state(end), History(rows, len(rows), end, self.choice)

    def _alone(self, ts: TrainState) -> TrainState:
        """Return a train state that can be evaluated: each process of a distributed run evaluates by itself."""
        if jax.process_count() == 1:
            return ts
        ts = ts.replace(key=None)
        return self.of.devices.put_back(ts, jax.tree.map(lambda leaf: jnp.zeros((), leaf.dtype), ts))

    def _state(self, ts: TrainState) -> State:
        """Return a network whose arrays are on the devices of the given ones."""
        return self.of.devices.put_back(gated.as_state(ts, self.of.state), self.of.state)
