"""How one task is learned, as a replay of stages: what is on disk is not computed again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax

from pae_jax.core import CubicSchedule, State, expand, find, freeze, integrity, newest, ownership, pack, pruning
from pae_jax.errors import DivergedError
from pae_jax.lifelong import policy
from pae_jax.lifelong.optimizers import WithPicks, at_phase_rate
from pae_jax.lifelong.policy import Goal, Outcome, Stage, StageRecord, Status
from pae_jax.lifelong.recipes import Ladder, Phase, Recipe
from pae_jax.lifelong.run_folder import FROZEN, TaskFolder
from pae_jax.lifelong.session import Session
from pae_jax.lifelong.task import CheckedTask
from pae_jax.reports import sizes
from pae_jax.training import Best, History, Training, trained


class Learner:
    """One call of `learn`, written as a replay: a stage that is on disk is not computed again.

    Args:
      session: what it shares with other tasks.
      checked: the task.
      start: the network before it.
      goal: what to reach.
      upcoming: tasks still to come; None if unknown.
      folder: where its stages are; None works in memory alone.
      title: its name in tables.
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
        self.task, self.folder, self.title = checked.task, folder, title
        self.goal = Goal(self.task.metric, goal, self.recipe.tolerance)
        self.records: list[StageRecord] = []
        self.heads = {name: e.head_spec for name, e in start.tasks.items() if not isinstance(e.head_spec, int)}
        if not isinstance(self.task.head, int):
            self.heads[self.task.name] = self.task.head
        # Data of unknown length has nothing in its recipe that counts steps.
        self.steps = (checked.train and checked.train.steps) or 1

    def learn(self) -> Outcome:
        if self.folder is not None and self.folder.finished:
            return self._finished(self.folder)
        width = policy.starting_width(self.net, self.start, self.recipe)
        if width is None:
            self._log("no capacity", {})
            return self._not_added(Status.NO_CAPACITY)
        attempt = 0
        while True:
            trained = self._stage(f"{attempt}-trained", lambda label, width=width: self._train(label, width))
            if trained.record.diverged:
                return self._not_added(Status.DIVERGED)
            following = policy.next_width(self.net, width, self.recipe.expansion)
            if self.goal.met_by(trained.record) or following is None:
                return self._freeze(self._retrain(self._climb(trained, attempt), attempt))
            trained.let_go()
            width, attempt = following, attempt + 1

    def finished_value(self) -> float | None:
        """Return the metric of what was kept if the task is frozen on disk, without reading the network."""
        if self.folder is None or not self.folder.finished:
            return None
        return self._kept(self.folder, self.folder.metadata(FROZEN)).value

    def _train(self, label: str, width: float) -> tuple[State | None, StageRecord]:
        key, task, recipe = self.session.stage_key(self.task.name, label), self.task, self.recipe
        grow_key, pack_key, head_key, fit_key = jax.random.split(key, 4)
        state = self.start
        if width > state.width:
            state = expand(self.net, state, width=width, key=grow_key)
        picks = {"sharing": recipe.sharing, "picking": recipe.picking if recipe.sharing == "picked" else None}
        state = pack(
            self.net,
            state,
            task.name,
            head=task.head,
            key=pack_key,
            local_init=_local_init(state, recipe),
            reclaim_init=recipe.reclaim_init,
            allow_empty=recipe.allow_empty,
            **picks,
        )
        phases = [(recipe.train, fit_key)]
        if recipe.head_first is not None:
            phases.insert(0, (recipe.head_first, head_key))
        return self._measured(label, state, phases, None)

    def _climb(self, trained: Stage, attempt: int) -> Stage:
        ladder = self.recipe.ladder
        if ladder is None or not trained.record.weights:
            return trained
        met, width = self.goal.met_by(trained.record), trained.record.width
        stuck = policy.next_width(self.net, width, self.recipe.expansion) is None
        room_needed = bool(self.upcoming) and stuck and not self.recipe.allow_empty
        stages, before, chosen = [trained], 0.0, trained
        for rung in policy.rungs(ladder, met, self.upcoming):
            below, last = stages[-1], before
            stage = self._stage(
                f"{attempt}-pruned-{rung:.3f}",
                lambda label, below=below, last=last, rung=rung: self._rung(label, below, ladder, last, rung),
            )
            if stage.record.diverged or not self._above_floor(ladder, stage.record):
                break
            stages.append(stage)
            before = rung
            records = [one.record for one in stages]
            number = policy.choose(records, ladder, self.goal, met, room_needed)
            # What is chosen among all rungs is what is chosen now or comes later, so the others may be let go.
            for one in stages[:-1]:
                if one is not stages[number]:
                    one.let_go()
            chosen = stages[number]
            if met and policy.ends(ladder, records[1:], self.goal):
                break
        return chosen

    def _above_floor(self, ladder: Ladder, record: StageRecord) -> bool:
        if ladder.floor is None:
            return True
        found = math.nan if record.train_value is None else record.train_value
        return self.goal.metric.score(found) > self.goal.metric.score(ladder.floor)

    def _rung(
        self, label: str, below: Stage, ladder: Ladder, before: float, rung: float
    ) -> tuple[State | None, StageRecord]:
        state, key = below.network(), self.session.stage_key(self.task.name, label)
        schedule = None
        if ladder.ramp:
            end = max(1, round(ladder.ramp * self.steps))
            schedule = CubicSchedule(final=rung, end=end, initial=before, every=ladder.every, scope=ladder.scope)
        else:
            state = pruning.prune(state, self.task.name, rung, scope=ladder.scope, of=ladder.of)
        return self._measured(label, state, [(ladder.phase, key)], below.record, schedule, ladder.floor is not None)

    def _retrain(self, chosen: Stage, attempt: int) -> Stage:
        phase = self.recipe.retrain
        if phase is None or not self.start.tasks:
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
            test = self.checked.measured(state, "test")
        status = Status.LEARNED
        if self.goal.value is not None:
            status = Status.GOAL_MET if self.goal.met_by(chosen.record) else Status.GOAL_MISSED
        if self.folder is not None:
            known = None if test is None or math.isnan(test) else test
            more = {"status": status.name, "test": known, "goal": self.goal.value}
            self.folder.write_records(self.records)
            self.folder.put(FROZEN, replace(chosen.record, stage=FROZEN, history=()), state, more)
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
        else:
            self._log(facts["status"].lower().replace("_", " "), {"value": record.value, "test": facts["test"]})
        return self._outcome(Status[facts["status"]], state, record, facts["test"])

    def _kept(self, folder: TaskFolder, facts: dict[str, Any]) -> StageRecord:
        """Do what a process that was killed after freezing left undone; return the record of the frozen stage."""
        record = StageRecord.from_json(facts["record"])
        self.records = folder.read_records()
        for one in (*self.records, record):
            folder.run.enter(one)
        folder.tidy()
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
        """Return a stage from disk, or make it and write it."""
        stage = self.folder.find(self.net, label, self.heads) if self.folder is not None else None
        if stage is None:
            self._log("started", {"stage": label})
            state, record = make(label)
            if self.folder is not None and self.run is not None:
                self.run.scalars(record)  # before the stage is there: a process killed between would not come back
                self.folder.put(label, record, state, {})
            facts = {"value": record.value, "pruned": record.pruned, "epochs": record.epochs, "width": record.width}
            self._log("diverged" if record.diverged else "finished", {"stage": label, **facts})
            stage = Stage(record, None if state is None else lambda: state)
        self.records.append(stage.record)
        if self.run is not None:
            self.run.enter(stage.record)
        return stage

    def _measured(
        self,
        label: str,
        state: State,
        phases: Sequence[tuple[Phase, jax.Array]],
        before: StageRecord | None,
        schedule: CubicSchedule | None = None,
        train_value: bool = False,
    ) -> tuple[State | None, StageRecord]:
        """Train phases, each with its key; return the network and its record, or no network if training diverged."""
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
                state, history = self._fit(state, phase, key, schedule)
                kept = earlier + len(rows) + history.kept_epoch
                rows.extend(history.rows)
        except DivergedError as error:
            rows.extend(error.history.rows)
            return None, replace(record, epochs=earlier + len(rows), diverged=True, history=tuple(rows))
        own, free = (int(n.sum()) for n in ownership.host_counts(state.owner, find(state, self.task.name).id))
        return state, replace(
            record,
            pruned=free / (own + free) if own + free else 0.0,
            value=self.checked.measured(state, "val") if self.task.val is not None else math.nan,
            train_value=self.checked.measured(state, "train") if train_value else None,
            epochs=earlier + len(rows),
            kept_epoch=kept,
            weights=own,
            free=free,
            sizes=sizes.csv_columns(sizes.paper(state), self.task.name),
            history=tuple(rows),
        )

    def _fit(self, state: State, phase: Phase, key: jax.Array, schedule: CubicSchedule | None) -> tuple[State, History]:
        task, checked = self.task, self.checked
        picked = find(state, task.name).pick is not None and phase.pick_rate is not None
        keep = None
        if phase.keep == "best" and task.val is not None:
            score = lambda now: task.metric.score(checked.measured(now, "val"))  # noqa: E731
            keep = Best(score if task.metric.measure is not None else None, phase.plateau)
        rate = phase.rate.schedule(phase.epochs, self.steps)
        pick_rate = phase.pick_rate.schedule(phase.epochs, self.steps) if picked and phase.pick_rate else rate
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
            progress=self.session.progress,
        )
        optimizer = at_phase_rate(phase.optimizer)
        if picked:
            optimizer = WithPicks(optimizer, at_phase_rate(phase.pick_optimizer))
        parts = (*phase.parts, *(["pick"] if picked else []))
        return trained(training, optimizer, self.recipe.batch_size, parts)

    def _log(self, event: str, facts: Mapping[str, str | float | None]) -> None:
        if self.run is not None and self.folder is not None:
            self.run.log(event, {"task": self.title, "folder": self.folder.path.name, **facts})


def _local_init(state: State, recipe: Recipe) -> str:
    """Return what `pack` starts the local variables from."""
    last = newest(state)
    if last is None:
        return "backbone"
    return last if recipe.local_init == "newest" else recipe.local_init
