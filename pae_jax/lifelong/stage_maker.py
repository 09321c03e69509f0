"""`StageMaker`: the networks of a task's stages. Trained, pruned to a fraction, retrained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from pae_jax.core import CubicSchedule, State, expand, find, newest, ownership, pack, pruning, release_unpicked
from pae_jax.errors import DivergedError
from pae_jax.lifelong import policy
from pae_jax.lifelong.optimizers import WithPicks, at_phase_rate
from pae_jax.lifelong.policy import Goal, Stage, StageRecord
from pae_jax.lifelong.recipes import Ladder, Phase, Recipe
from pae_jax.lifelong.session import Session
from pae_jax.lifelong.task import CheckedTask, Task
from pae_jax.reports import sizes
from pae_jax.training import Best, History, Training, nearest_of, scores_of, trained

Ends = Callable[[Sequence[Mapping[str, float]]], bool]
"""`epochs so far -> whether training ends`."""


@dataclass(frozen=True)
class StageMaker:
    """Computes stages, each a network with its record; None instead of a network whose training diverged.

    Attributes:
      session: settings shared with other tasks.
      checked: the task.
      start: the network before the task.
      goal: the goal of the task.
      title: name of the task in tables.
      steps: steps of an epoch; 1 if the data has no known length, and then nothing in the recipe depends on it.
    """

    session: Session
    checked: CheckedTask
    start: State
    goal: Goal
    title: str

    @property
    def task(self) -> Task:
        return self.checked.task

    @property
    def steps(self) -> int:
        return (self.checked.train and self.checked.train.steps) or 1

    def train(self, label: str, width: float) -> tuple[State | None, StageRecord]:
        """Add the task to the network, at a width, and train it."""
        name, recipe = self.task.name, self.session.recipe
        key = self.session.stage_key(name, label)
        grow_key, pack_key, head_key, fit_key = jax.random.split(key, 4)
        state = self.start
        if width > state.width:
            state = expand(self.session.net, state, width=width, key=grow_key)
        state = self._packed(state, pack_key)
        phases = [(recipe.train, fit_key)]
        if recipe.head_first is not None:
            phases.insert(0, (recipe.head_first, head_key))
        floored = recipe.expansion is not None and recipe.expansion.floor is not None
        trained, record = self._measured(label, state, phases, None, train_value=floored)
        if trained is not None and "shared" in recipe.train.parts:
            record = replace(record, dead=unmoved(state, trained, name))
        return trained, record

    def _packed(self, state: State, key: jax.Array) -> State:
        """Add the task to the network, with the weights that its budget allows."""
        recipe, name = self.session.recipe, self.task.name
        options: Any = {"head": self.task.head, "key": key, "sharing": recipe.sharing}
        options |= {"picking": recipe.picking if recipe.sharing == "picked" else None}
        nearest = None
        if "nearest" in (recipe.picks_from, recipe.local_init):
            found = nearest_of(state, self.checked.form(state.width), self.checked.training_data, key)
            nearest = self.session.processes.agree("nearest task", found)
        options |= {"local_init": _local_init(state, recipe, nearest), "allow_empty": recipe.allow_empty}
        if recipe.picks_from == "nearest":
            options["picks_from"] = nearest
        scores = None
        if recipe.budget is not None and recipe.budget_by == "gradient" and ownership.free_fraction(state):
            trial = pack(self.session.net, state, name, weight_init="fresh", **options)
            data, form = self.checked.training_data, self.checked.form(state.width)
            scores = scores_of(trial, name, form, self.checked.objective, data, key)
        budget: Any = {"budget": recipe.budget, "budget_scores": scores}
        return pack(self.session.net, state, name, weight_init=recipe.weight_init, **budget, **options)

    def rung(
        self, label: str, below: Stage, ladder: Ladder, fractions: tuple[float, float], met: bool
    ) -> tuple[State | None, StageRecord]:
        """Prune from one fraction to a greater one, the network of the rung below, and train meanwhile."""
        state, key, (before, rung) = below.network(), self.session.stage_key(self.task.name, label), fractions
        ends = (lambda rows: policy.hopeless(ladder, self.goal, rows)) if met and ladder.gain is not None else None
        schedule = None
        if ladder.ramp:
            end = max(1, round(ladder.ramp * self.steps))
            schedule = CubicSchedule(final=rung, end=end, initial=before, every=ladder.every, scope=ladder.scope)
        else:
            # What the rung below has freed is no longer the task's own.
            share = (rung - before) / (1 - before) if ladder.of == "own" else rung
            state = pruning.prune(state, self.task.name, share, scope=ladder.scope, of=ladder.of)
        floored = ladder.floor is not None
        return self._measured(label, state, [(ladder.phase, key)], below.record, schedule, floored, ends)

    def retrain(self, label: str, chosen: Stage, phase: Phase) -> tuple[State | None, StageRecord]:
        """Train the network of the chosen rung once more."""
        key = self.session.stage_key(self.task.name, label)
        return self._measured(label, chosen.network(), [(phase, key)], chosen.record)

    def _measured(
        self,
        label: str,
        state: State,
        phases: Sequence[tuple[Phase, jax.Array]],
        before: StageRecord | None,
        schedule: CubicSchedule | None = None,
        train_value: bool = False,
        ends: Ends | None = None,
    ) -> tuple[State | None, StageRecord]:
        """Train phases, each with its own key; return the network, None if training diverged, and its record."""
        earlier = kept = before.epochs if before is not None else 0
        rows: list[dict[str, float]] = []
        record = StageRecord(
            task=self.title,
            stage=label,
            width=state.width,
            pruned=0.0,
            value=math.nan,
            train_value=None,
            epochs=earlier,
            kept_epoch=kept,
            weights=0,
            free=0,
            metric=self.goal.metric.name,
        )
        diverged = lambda: replace(record, epochs=earlier + len(rows), diverged=True, history=tuple(rows))  # noqa: E731
        try:
            for phase, key in phases:
                state, history = self._fit(state, phase, key, schedule, ends)
                kept = earlier + len(rows) + history.kept_epoch
                rows.extend(history.rows)
                kept_row = history.rows[history.kept_epoch - 1] if history.kept_epoch else {}
                if math.isnan(kept_row.get("val_loss", 0.0)):  # the last step has spoilt the network
                    return None, diverged()
        except DivergedError as error:
            rows.extend(error.history.rows)
            return None, diverged()
        state = release_unpicked(state, self.task.name)
        own, free = (int(n.sum()) for n in ownership.host_counts(state.owner, find(state, self.task.name).id))
        return state, replace(
            record,
            pruned=free / (own + free) if own + free else 0.0,
            value=self.measure(state, "val") if self.task.val is not None else math.nan,
            train_value=self.measure(state, "train") if train_value else None,
            epochs=earlier + len(rows),
            kept_epoch=kept,
            weights=own,
            free=free,
            sizes=sizes.csv_columns(sizes.paper(state), self.task.name),
            history=tuple(rows),
        )

    def _fit(
        self, state: State, phase: Phase, key: jax.Array, schedule: CubicSchedule | None, ends: Ends | None
    ) -> tuple[State, History]:
        task, checked = self.task, self.checked
        picked = find(state, task.name).pick is not None and phase.pick_rate is not None
        keep = None
        if phase.keep == "best" and task.val is not None:
            score = lambda now: task.metric.score(checked.measured(now, "val"))  # noqa: E731
            keep = Best(score if task.metric.measure is not None else None, phase.plateau)
        rate = phase.rate.schedule(phase.epochs, self.steps)
        picks = phase.pick_rate if picked else None
        if picks is not None and phase.lone_pick_rate is not None and not owns(state, task.name):
            picks = phase.lone_pick_rate
        pick_rate = rate if picks is None else picks.schedule(phase.epochs, self.steps)
        training = Training(
            task=task.name,
            state=state,
            form=checked.form(state.width),
            objective=checked.objective,
            data=checked.training_data,
            val=checked.val,
            epochs=phase.epochs,
            key=key,
            pruning=schedule,
            keep=keep,
            devices=self.session.devices,
            rates=lambda step: (pick_rate(step), rate(step)),
            on_epoch=None if ends is None else _collecting(ends),
            progress=self.session.progress,
            agree=lambda row: self.session.processes.agree("epoch", row),
        )
        optimizer = at_phase_rate(phase.optimizer)
        if picked:
            optimizer = WithPicks(optimizer, at_phase_rate(phase.pick_optimizer))
        parts = (*phase.parts, *(["pick"] if picked else []))
        return trained(training, optimizer, self.session.recipe.batch_size, parts)

    def measure(self, state: State, part: str) -> float:
        """Return the metric on a part of the data, the same in all processes."""
        return self.session.processes.agree(f"{part} metric", self.checked.measured(state, part))


def _collecting(ends: Ends) -> Callable[[State, dict[str, float]], bool]:
    """Return a rule on all epochs so far as a function of the newest one."""
    rows: list[dict[str, float]] = []

    def on_epoch(state: State, row: dict[str, float]) -> bool:
        del state
        rows.append(row)
        return ends(rows)

    return on_epoch


def owns(state: State, task: str) -> int:
    """Return how many weights a task owns."""
    return int(ownership.host_counts(state.owner, find(state, task).id)[0].sum())


def unmoved(before: State, after: State, task: str) -> float | None:
    """Return the share of a task's weights that training did not change; None if it owns none."""
    total = owns(after, task)
    mine = ownership.owned(after.owner, ownership.id_array(find(after, task).id))
    same = jax.tree.map(lambda a, b, m: jnp.sum((a == b) & m), before.shared, after.shared, mine)
    return sum(int(count) for count in jax.tree.leaves(same)) / total if total else None


def _local_init(state: State, recipe: Recipe, nearest: str | None) -> str:
    """Return the `local_init` argument of `pack`."""
    named = {"newest": newest(state), "nearest": nearest}
    if not state.tasks or recipe.local_init not in named:
        return recipe.local_init if state.tasks else "backbone"
    return named[recipe.local_init] or ("fresh" if state.local is None else "backbone")
