"""Learning one task as a replay of stages: stages on disk are read, not computed again."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pae_jax.core import State, freeze, integrity
from pae_jax.lifelong import policy
from pae_jax.lifelong.policy import Goal, Outcome, Stage, StageRecord, Status
from pae_jax.lifelong.session import Session
from pae_jax.lifelong.stage_maker import StageMaker
from pae_jax.lifelong.task import CheckedTask
from pae_jax.lifelong.task_folder import FROZEN, TaskFolder
from pae_jax.storage import digests

DEAD_SHARE = 0.25
"""Share of a task's weights without any change in training above which a run logs `dead weights`."""


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
        self.start, self.upcoming = start, upcoming
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
        self.maker = StageMaker(session, checked, start, self.goal, title)

    def learn(self) -> Outcome:
        if self.folder is not None and self.folder.finished:
            return self._finished(self.folder)
        width = policy.starting_width(self.net, self.start, self.recipe)
        if width is None:
            self._log("no capacity", {}, once=True)
            return self._not_added(Status.NO_CAPACITY)
        attempt = 0
        while True:
            trained = self._stage(f"{attempt}-trained", functools.partial(self.maker.train, width=width))
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
            make = functools.partial(self.maker.rung, below=below, ladder=ladder, fractions=(last, rung), met=met)
            stage = self._stage(f"{attempt}-pruned-{rung:.3f}", make)
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

    def _retrain(self, chosen: Stage, attempt: int) -> Stage:
        phase = self.recipe.retrain
        if phase is None or not self.start.tasks or not chosen.record.weights:
            return chosen
        again = self._stage(f"{attempt}-retrained", functools.partial(self.maker.retrain, chosen=chosen, phase=phase))
        if again.record.diverged:
            return chosen
        better = self.goal.metric.score(again.record.value) > self.goal.metric.score(chosen.record.value)
        return again if better else chosen

    def _freeze(self, chosen: Stage) -> Outcome:
        state = freeze(chosen.network(), self.task.name)
        test = None
        if self.task.test is not None:
            test = self.maker.measure(state, "test")
        self._settle()
        status = Status.LEARNED
        if self.goal.value is not None:
            status = Status.GOAL_MET if self.goal.met_by(chosen.record) else Status.GOAL_MISSED
        if self.folder is not None:
            known = None if test is None or math.isnan(test) else test
            more = {"status": status.name, "test": policy.as_json(known), "goal": self.goal.value}
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
        return self._outcome(Status[facts["status"]], state, record, policy.from_json(facts["test"]))

    def _kept(self, folder: TaskFolder, facts: dict[str, Any]) -> StageRecord:
        """Finish the work of a process that was killed after freezing; return the record of the frozen stage."""
        record = StageRecord.from_json(facts["record"])
        self.records = folder.records()[:-1]
        ended = facts["status"].lower().replace("_", " ")
        self._log(ended, {"value": record.value, "test": policy.from_json(facts["test"])}, once=True)
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
            if record.dead is not None and record.dead > DEAD_SHARE:
                self._log("dead weights", {"stage": label, "dead": record.dead}, once=True)
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
