"""Learning one task as a replay of stages: stages on disk are read, not computed again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from pae_jax.core import (
    CubicSchedule,
    State,
    expand,
    find,
    freeze,
    integrity,
    newest,
    ownership,
    pack,
    pruning,
    release_unpicked,
)
from pae_jax.errors import DivergedError
from pae_jax.lifelong import policy
from pae_jax.lifelong.optimizers import WithPicks, at_phase_rate
from pae_jax.lifelong.policy import Goal, Outcome, Stage, StageRecord, Status
from pae_jax.lifelong.recipes import Ladder, Phase, Recipe
from pae_jax.lifelong.session import Session
from pae_jax.lifelong.task import CheckedTask
from pae_jax.lifelong.task_folder import FROZEN, TaskFolder
from pae_jax.reports import sizes
from pae_jax.storage import digests
from pae_jax.training import Best, History, Training, nearest_of, scores_of, trained

DEAD_SHARE = 0.25
"""Share of a task's weights without any change in training above which a run logs `dead weights`."""


Ends = Callable[[Sequence[Mapping[str, float]]], bool]
"""`epochs so far -> whether training ends`."""


class Learner:
    """One call of `learn`, as a replay: a stage on disk is read, not computed again.

    Args:
      session: settings shared with other tasks.
      checked: the task.
      start: the network before the task.
      goal: the goal of the task.
      upcoming: number of later tasks; None if unknown.
      folder: folder of its stages; None keeps them only in memory.
      title: name of the task in tables.
    """

    def __init__(
        self,
        session: Session,
        checked: CheckedTask,
        start: State,
        goal: float | None,
        upcoming: int | None,
        folder: TaskFolder | None,
        title: str,
    ):
        self.session, self.checked, self.start, self.upcoming = session, checked, start, upcoming
        self.net, self.recipe, self.run = session.net, session.recipe, session.run
        self.processes = session.processes
        self.background = session.run is not None and session.run.background
        self.task, self.folder, self.title = checked.task, folder, title
        self.goal = Goal(self.task.metric, goal, self.recipe.tolerance)
        self.records: list[StageRecord] = []
        self.unlogged: list[StageRecord] = []  # of stages that may not be on disk yet
        self.heads = {name: e.head_spec for name, e in start.tasks.items() if not isinstance(e.head_spec, int)}
        if not isinstance(self.task.head, int):
            self.heads[self.task.name] = self.task.head
        # If the data has no known length, nothing in the recipe depends on the number of steps.
        self.steps = (checked.train and checked.train.steps) or 1

    def learn(self) -> Outcome:
        if self.folder is not None and self.folder.finished:
            return self._finished(self.folder)
        width = policy.starting_width(self.net, self.start, self.recipe)
        if width is None:
            self._log("no capacity", {}, once=True)
            return self._not_added(Status.NO_CAPACITY)
        attempt = 0
        while True:
            trained = self._stage(f"{attempt}-trained", lambda label, width=width: self._train(label, width))
            if trained.record.diverged:
                return self._not_added(Status.DIVERGED)
            growth = self.recipe.expansion
            following = policy.next_width(self.net, width, growth)
            floor = None if growth is None else growth.floor
            fits = self.goal.met_by(trained.record) and self._above(floor, trained.record)
            if fits or following is None:
                return self._freeze(self._retrain(self._climb(trained, attempt), attempt))
            trained.let_go()
            width, attempt = following, attempt + 1

    def finished_value(self) -> float | None:
        """Return the metric of the kept stage if the task is frozen on disk, without reading the network."""
        if self.folder is None or not self.folder.finished:
            return None
        return self._kept(self.folder, self.folder.metadata(FROZEN)).value

    def _train(self, label: str, width: float) -> tuple[State | None, StageRecord]:
        key, task, recipe = self.session.stage_key(self.task.name, label), self.task, self.recipe
        grow_key, pack_key, head_key, fit_key = jax.random.split(key, 4)
        state = self.start
        if width > state.width:
            state = expand(self.net, state, width=width, key=grow_key)
        state = self._packed(state, pack_key)
        phases = [(recipe.train, fit_key)]
        if recipe.head_first is not None:
            phases.insert(0, (recipe.head_first, head_key))
        floored = recipe.expansion is not None and recipe.expansion.floor is not None
        trained, record = self._measured(label, state, phases, None, train_value=floored)
        if trained is not None and "shared" in recipe.train.parts:
            record = replace(record, dead=unmoved(state, trained, task.name))
            if record.dead is not None and record.dead > DEAD_SHARE:
                self._log("dead weights", {"stage": label, "dead": record.dead}, once=True)
        return trained, record

    def _packed(self, state: State, key: jax.Array) -> State:
        """Add the task to the network, with the weights that its budget allows."""
        recipe, name = self.recipe, self.task.name
        options: Any = {"head": self.task.head, "key": key, "sharing": recipe.sharing}
        options |= {"picking": recipe.picking if recipe.sharing == "picked" else None}
        nearest = None
        if "nearest" in (recipe.picks_from, recipe.local_init):
            found = nearest_of(state, self.checked.form(state.width), self.checked.training_data, key)
            nearest = self.processes.agree("nearest task", found)
        options |= {"local_init": _local_init(state, recipe, nearest), "allow_empty": recipe.allow_empty}
        if recipe.picks_from == "nearest":
            options["picks_from"] = nearest
        scores = None
        if recipe.budget is not None and recipe.budget_by == "gradient" and ownership.free_fraction(state):
            trial = pack(self.net, state, name, weight_init="fresh", **options)
            data, form = self.checked.training_data, self.checked.form(state.width)
            scores = scores_of(trial, name, form, self.checked.objective, data, key)
        budget: Any = {"budget": recipe.budget, "budget_scores": scores}
        return pack(self.net, state, name, weight_init=recipe.weight_init, **budget, **options)

    def _climb(self, trained: Stage, attempt: int) -> Stage:
        ladder = self.recipe.ladder
        if ladder is None or not trained.record.weights:
            return trained
        met, width = self.goal.met_by(trained.record), trained.record.width
        stuck = policy.next_width(self.net, width, self.recipe.expansion) is None
        crowded = stuck or not self.start.tasks
        room_needed = bool(self.upcoming) and crowded and not self.recipe.allow_empty
        steps = policy.rungs(ladder, met, self.upcoming)
        pruned: dict[float, Stage] = {}  # by fraction, smallest first
        chosen, rung = trained, policy.next_rung(ladder, steps, (), (), met)
        while rung is not None:
            below, last = _below(pruned, trained, rung)
            stage = self._stage(
                f"{attempt}-pruned-{rung:.3f}",
                lambda label, below=below, last=last, rung=rung: self._rung(label, below, ladder, (last, rung), met),
            )
            if stage.record.diverged or not self._above(ladder.floor, stage.record):
                break
            pruned = dict(sorted({**pruned, rung: stage}.items()))
            stages = [trained, *pruned.values()]
            chosen = stages[policy.choose([one.record for one in stages], ladder, self.goal, met, room_needed)]
            if met and policy.ends(ladder, [one.record for one in pruned.values()], self.goal):
                break
            reached = [fraction for fraction, one in pruned.items() if self.goal.met_by(one.record)]
            rung = policy.next_rung(ladder, steps, list(pruned), reached, met)
            # The final choice is the present choice or a later rung, so the networks of the others can be freed.
            below = None if rung is None else _below(pruned, trained, rung)[0]
            for one in stages:
                if one is not chosen and one is not below:
                    one.let_go()
        return chosen

    def _above(self, floor: float | None, record: StageRecord) -> bool:
        """Return whether the metric on the training data is better than a floor."""
        if floor is None:
            return True
        found = math.nan if record.train_value is None else record.train_value
        return self.goal.metric.score(found) > self.goal.metric.score(floor)

    def _rung(
        self, label: str, below: Stage, ladder: Ladder, fractions: tuple[float, float], met: bool
    ) -> tuple[State | None, StageRecord]:
        state, key, (before, rung) = below.network(), self.session.stage_key(self.task.name, label), fractions
        ends = (lambda rows: policy.hopeless(ladder, self.goal, rows)) if met and ladder.gain is not None else None
        schedule = None
        if ladder.ramp:
            end = max(1, round(ladder.ramp * self.steps))
            schedule = CubicSchedule(final=rung, end=end, initial=before, every=ladder.every, scope=ladder.scope)
        else:
            state = pruning.prune(state, self.task.name, rung, scope=ladder.scope, of=ladder.of)
        floored = ladder.floor is not None
        return self._measured(label, state, [(ladder.phase, key)], below.record, schedule, floored, ends)

    def _retrain(self, chosen: Stage, attempt: int) -> Stage:
        phase = self.recipe.retrain
        if phase is None or not self.start.tasks or not chosen.record.weights:
            return chosen

        def make(label: str) -> tuple[State | None, StageRecord]:
            key = self.session.stage_key(self.task.name, label)
            return self._measured(label, chosen.network(), [(phase, key)], chosen.record)

        again = self._stage(f"{attempt}-retrained", make)
        if again.record.diverged:
            return chosen
        better = self.goal.metric.score(again.record.value) > self.goal.metric.score(chosen.record.value)
        return again if better else chosen

    def _freeze(self, chosen: Stage) -> Outcome:
        state = freeze(chosen.network(), self.task.name)
        test = None
        if self.task.test is not None:
            test = self._measure(state, "test")
        self._settle()
        status = Status.LEARNED
        if self.goal.value is not None:
            status = Status.GOAL_MET if self.goal.met_by(chosen.record) else Status.GOAL_MISSED
        if self.folder is not None:
            known = None if test is None or math.isnan(test) else test
            more = {"status": status.name, "test": known, "goal": self.goal.value}
            self.folder.freeze(self.records, replace(chosen.record, stage=FROZEN, history=()), state, more)
            return self._finished(self.folder, state)
        return self._outcome(status, state, chosen.record, test)

    def _finished(self, folder: TaskFolder, state: State | None = None) -> Outcome:
        """Return the outcome of a task whose frozen stage is on disk."""
        facts = folder.metadata(FROZEN)
        record = self._kept(folder, facts)
        if state is None:
            stage = folder.find(self.net, FROZEN, self.heads)
            assert stage is not None
            state = stage.network()
            integrity.verify(state)
        return self._outcome(Status[facts["status"]], state, record, facts["test"])

    def _kept(self, folder: TaskFolder, facts: dict[str, Any]) -> StageRecord:
        """Finish the work of a process that was killed after freezing; return the record of the frozen stage."""
        record = StageRecord.from_json(facts["record"])
        self.records = folder.records()[:-1]
        ended = facts["status"].lower().replace("_", " ")
        self._log(ended, {"value": record.value, "test": facts["test"]}, once=True)
        if self.run is not None:
            self.run.write_table()
            folder.tidy(self.run.keep)
        return record

    def _outcome(self, status: Status, state: State, record: StageRecord, test: float | None) -> Outcome:
        return Outcome(
            status,
            state,
            task=self.task.name,
            value=record.value,
            goal=self.goal.value,
            test=test,
            pruned=record.pruned,
            width=record.width,
            records=tuple(self.records),
        )

    def _not_added(self, status: Status) -> Outcome:
        return Outcome(
            status,
            self.start,
            task=self.task.name,
            value=math.nan,
            goal=self.goal.value,
            test=None,
            pruned=0.0,
            width=self.start.width,
            records=tuple(self.records),
        )

    def _stage(self, label: str, make: Callable[[str], tuple[State | None, StageRecord]]) -> Stage:
        """Return a stage from disk, or compute and write it."""
        stage = self.folder.find(self.net, label, self.heads) if self.folder is not None else None
        written = stage is not None or not self.background
        if stage is None:
            self._log("started", {"stage": label})
            state, record = make(label)
            self._require_same(label, state, record)
            self._settle()
            if self.folder is not None and self.run is not None:
                self.run.scalars(record)  # before the stage, or a process killed in between would lose them
                self.folder.put(label, record, state, {})
            stage = Stage(record, None if state is None else lambda: state)
        self.records.append(stage.record)
        self.unlogged.append(stage.record)
        if written or stage.record.diverged:
            self._settle()
        return stage

    def _settle(self) -> None:
        """Wait until all stages so far are on disk; then log them and enter them in the table."""
        if not self.unlogged:
            return
        if self.folder is not None:
            self.folder.settle()
        for found in self.unlogged:
            facts = {"value": found.value, "pruned": found.pruned, "epochs": found.epochs, "width": found.width}
            self._log("diverged" if found.diverged else "finished", {"stage": found.stage, **facts}, once=True)
        self.unlogged.clear()
        if self.run is not None:
            self.run.write_table()

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
        try:
            for phase, key in phases:
                state, history = self._fit(state, phase, key, schedule, ends)
                kept = earlier + len(rows) + history.kept_epoch
                rows.extend(history.rows)
        except DivergedError as error:
            rows.extend(error.history.rows)
            return None, replace(record, epochs=earlier + len(rows), diverged=True, history=tuple(rows))
        state = release_unpicked(state, self.task.name)
        own, free = (int(n.sum()) for n in ownership.host_counts(state.owner, find(state, self.task.name).id))
        return state, replace(
            record,
            pruned=free / (own + free) if own + free else 0.0,
            value=self._measure(state, "val") if self.task.val is not None else math.nan,
            train_value=self._measure(state, "train") if train_value else None,
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
            agree=lambda row: self.processes.agree("epoch", row),
        )
        optimizer = at_phase_rate(phase.optimizer)
        if picked:
            optimizer = WithPicks(optimizer, at_phase_rate(phase.pick_optimizer))
        parts = (*phase.parts, *(["pick"] if picked else []))
        return trained(training, optimizer, self.recipe.batch_size, parts)

    def _measure(self, state: State, part: str) -> float:
        return self.processes.agree(f"{part} metric", self.checked.measured(state, part))

    def _require_same(self, label: str, state: State | None, record: StageRecord) -> None:
        """Raise `ProcessError` unless all processes have made the same stage, bit for bit."""
        if not self.processes.alone:
            arrays = {} if state is None else digests(state)
            self.processes.require_same(f"{self.title}, {label}", {"record": record.to_json(), "network": arrays})

    def _log(self, event: str, facts: Mapping[str, str | float | None], *, once: bool = False) -> None:
        if self.run is not None and self.folder is not None:
            self.run.log(event, {"task": self.title, "folder": self.folder.path.name, **facts}, once=once)


def _below(pruned: Mapping[float, Stage], trained: Stage, rung: float) -> tuple[Stage, float]:
    """Return the stage that a rung starts from, which has the largest fraction below it, and that fraction."""
    fraction = max((one for one in pruned if one < rung), default=None)
    return (trained, 0.0) if fraction is None else (pruned[fraction], fraction)


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
    return named[recipe.local_init] or "backbone"
