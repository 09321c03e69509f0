"""The training loop: epochs of compiled steps, releases of weights between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pae_jax import ownership, training
from pae_jax.batching import Feed
from pae_jax.errors import DivergedError
from pae_jax.judging import Judge
from pae_jax.network import Net, as_inputs
from pae_jax.placement import Placement, put_back
from pae_jax.pruning import CubicSchedule, Room
from pae_jax.state import State, TaskState
from pae_jax.training import Carry, Layout, OptStates, Rule
from pae_jax.trees import Tree, abstract, require_match

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


class Loop:
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
        placement: Placement | None,
        steps_per_call: int,
    ):
        self.net, self.state, self.task, self.entry = net, state, task, entry
        self.pruning, self.rule, self.rates = pruning, rule, rates
        self.placement, self.steps_per_call = placement, steps_per_call
        self.owner = self._placed(state.owner)
        self.room = Room(state.owner, entry.id, pruning.scope) if pruning else None
        self.task_id = self._placed(ownership.id_array(entry.id))
        self.shuffle_key, step_key = jax.random.split(key)
        self.step_key = self._placed(step_key)
        self.init_optimizer = training.optimizer_init(net, rule)
        self._data: Any = None

    def run(self, batches: Feed, judge: Judge, epochs: int, opt_state: Any, progress: bool) -> tuple[State, History]:
        """Train; return the network and what happened."""
        carry = self._start(opt_state)
        layout = None
        if self.placement is not None:
            layout = Layout(self.placement.key(), jax.tree.map(lambda leaf: leaf.sharding, carry))
        step = training.train_step(self.net, self.entry, self.rule, layout=layout)
        rows: list[dict[str, float]] = []
        taken = 0
        total = None if batches.steps is None else batches.steps * epochs
        with tqdm(total=total, desc=f"fit {self.task}", unit="step", disable=not progress, leave=False) as bar:
            for epoch in range(epochs):
                before = taken
                for advance, steps in self._calls(step, batches, epoch, taken, judge.rate):
                    carry = advance(carry)
                    taken += steps
                    if self.pruning and self.pruning.updates_at(taken):
                        carry = self._release(carry, taken)
                    bar.update(steps)
                row = {"epoch": epoch + 1, "loss": float(carry.loss_sum) / max(taken - before, 1)}
                bad = int(carry.bad_step)
                if bad >= 0:
                    raise DivergedError(self.task, bad, self._state(carry), History(tuple(rows), epoch, None))
                row |= judge.measure(self._measurable(carry))
                rows.append(row)
                bar.set_postfix({name: f"{value:.3g}" for name, value in row.items() if name != "epoch"})
                carry = carry._replace(loss_sum=self._placed(jnp.zeros((), jnp.float32)))
                if judge.keeps and not (self.pruning and taken < self.pruning.end):
                    judge.consider(row, carry, self._state(carry))
                    resumed = judge.slow_down(carry)
                    if resumed is None:
                        break
                    carry = resumed
        # Tracing may rewrite a schedule's closure, optax.cosine_decay_schedule does; its new key leads here as well.
        training.train_step(self.net, self.entry, self.rule, known=step, layout=layout)
        training.optimizer_init(self.net, self.rule, known=self.init_optimizer)
        last = carry.opt_state if self.rule.pick_tx is not None else carry.opt_state.weights
        if judge.best is not None:
            return self._returned(judge.best.state), History(tuple(rows), judge.best.epoch, last)
        return self._returned(self._state(carry)), History(tuple(rows), len(rows), last)

    def _calls(
        self, step: training.TrainStep, batches: Feed, epoch: int, taken: int, factor: float
    ) -> Iterator[tuple[Callable[[Carry], Carry], int]]:
        """Yield the calls of an epoch, `(carry -> carry, steps)`; none goes past a step that releases weights."""
        if self.steps_per_call == 1 or batches.arrays is None or batches.order is None:
            for number, (x, y) in enumerate(batches.epoch(epoch, self.shuffle_key)):
                rates, inputs = self._rates(taken + number, 1, factor)[0], self._inputs(x)
                y = y if self.placement is None else self.placement.batch(y)
                yield lambda carry, x=inputs, y=y, rates=rates: step(carry, *self._fixed(), rates, x, y), 1
            return
        many = training.train_steps(self.net, self.entry, self.rule)
        x, y = self._device_data(batches)
        order = batches.order(epoch, self.shuffle_key)
        start = 0
        while start < len(order):
            count = min(self.steps_per_call, len(order) - start)
            if self.pruning:
                ahead = range(1, count + 1)
                count = next((n for n in ahead if self.pruning.updates_at(taken + start + n)), count)
            chosen, rates = order[start : start + count], self._rates(taken + start, count, factor)
            yield lambda carry, o=chosen, rates=rates: many(carry, *self._fixed(), rates, o, x, y), count
            start += count

    def _fixed(self) -> tuple[Tree, jax.Array, jax.Array]:
        return self.owner, self.task_id, self.step_key

    def _rates(self, first: int, count: int, factor: float) -> np.ndarray:
        rows = [[factor * rate(first + n) for rate in self.rates] for n in range(count)]
        return np.asarray(rows, np.float32)

    def _inputs(self, x: Tree) -> Tree:
        # With an augmentation the dtype is its choice: it may turn uint8 images into floats on the device.
        inputs = as_inputs(self.net, x) if self.rule.augment is None else jax.tree.map(jnp.asarray, x)
        return inputs if self.placement is None else self.placement.batch(inputs)

    def _device_data(self, batches: Feed) -> Any:
        if self._data is None and batches.arrays is not None:
            x, y = batches.arrays
            self._data = (self._inputs(x), jnp.asarray(y))
        return self._data

    def _start(self, opt_state: Any) -> Carry:
        parts = (self.state.shared, self.entry.local, self.entry.head, self.entry.pick)
        owner, task_id = self.state.owner, ownership.id_array(self.entry.id)
        if opt_state is None:
            opt_state = self.init_optimizer(*parts, owner, task_id)
        else:
            initial = jax.eval_shape(self.init_optimizer, *parts, owner, task_id)
            hint = "It must come from a fit with the same optimizer, width and head."
            opt_state = opt_state if isinstance(opt_state, OptStates) else OptStates(opt_state)
            opt_state = jax.tree.map(jnp.asarray, opt_state)
            require_match("opt_state", abstract(opt_state), abstract(initial), hint)
        zero = jnp.zeros((), jnp.int32)
        # The steps overwrite their operands in place; the caller's arrays must survive.
        mine = jax.tree.map(jnp.copy, (*parts, opt_state))
        carry = Carry(*mine, step=zero, bad_step=zero - 1, loss_sum=jnp.zeros((), jnp.float32))
        return self._placed(carry)

    def _release(self, carry: Carry, step: int) -> Carry:
        assert self.pruning and self.room
        # A bad step ends the pruning too; the device knows, and the host does not wait for it.
        shared, owner = self.room.prune(carry.shared, self.owner, self.pruning(step), good=carry.bad_step < 0)
        self.owner = self._placed(owner)
        return carry._replace(shared=self._placed(shared))

    def _placed(self, tree: Tree) -> Tree:
        return tree if self.placement is None else self.placement.place(tree)

    def _state(self, carry: Carry) -> State:
        entry = self.entry.replace(local=carry.local, head=carry.head, pick=carry.pick)
        return self.state.replace(shared=carry.shared, owner=self.owner, tasks={**self.state.tasks, self.task: entry})

    def _measurable(self, carry: Carry) -> State:
        """Return the state as it can be evaluated: each process of a distributed run does so by itself."""
        state = self._state(carry)
        return self._returned(state) if jax.process_count() > 1 else state

    def _returned(self, state: State) -> State:
        """Return a state whose arrays live where those that were given did."""
        return state if self.placement is None else put_back(state, self.state)
