"""Records of the lifelong loop, and its decisions as pure functions of them, without training or files."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import jax

from pae_jax import html
from pae_jax.core import State, ownership
from pae_jax.errors import ArgumentError
from pae_jax.lifelong.recipes import Expansion, Ladder, Recipe
from pae_jax.lifelong.task import Metric
from pae_jax.nets import Net, width_for


class Status(enum.Enum):
    """How the learning of a task ended."""

    LEARNED = "learned"
    """There was no goal to reach."""
    GOAL_MET = "goal met"
    """The validation metric reaches the goal, after pruning too."""
    GOAL_MISSED = "goal missed"
    """The kept stage misses the goal, before or after pruning; the task is kept."""
    NO_CAPACITY = "no capacity"
    """No free weight is left and the network may not grow; the task was not added."""
    DIVERGED = "diverged"
    """Training met values that are not finite; the task was not added."""

    @property
    def added(self) -> bool:
        """Whether the task was added to the network."""
        return self not in (Status.NO_CAPACITY, Status.DIVERGED)


@dataclass(frozen=True)
class StageRecord:
    """The record of one stage of learning a task.

    Attributes:
      task: name of the task; "... (own network)" if it was trained alone.
      stage: name of the stage, unique within the task.
      width: channel factor of the network.
      pruned: fraction freed of the weights available to the task.
      value: metric on validation data; NaN without.
      train_value: metric on training data; None if nothing needs it.
      epochs: training epochs of the task so far, including this stage.
      kept_epoch: which of them was kept.
      weights: number of weights the task owns.
      free: number of free weights.
      diverged: whether training met values that are not finite; the stage has no network then.
      sizes: MB (2^20 bytes) by the paper's formula, by column name.
      history: one dict per epoch, as in `pae.History.rows`.
      metric: name of the metric.
      dead: share of the task's weights that training did not change, such as weights between channels that are never
        active; None if it was not measured.
    """

    task: str
    stage: str
    width: float
    pruned: float
    value: float
    train_value: float | None
    epochs: int
    kept_epoch: int
    weights: int
    free: int
    diverged: bool = False
    sizes: dict[str, float] = dataclasses.field(default_factory=dict)
    history: tuple[dict[str, float], ...] = ()
    metric: str = "accuracy"
    dead: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON data; numbers that are not finite are the texts "inf", "-inf" and "nan"."""
        fields = dataclasses.asdict(self)
        rows = [{name: as_json(value) for name, value in row.items()} for row in self.history]
        values = {"value": as_json(self.value), "train_value": as_json(self.train_value)}
        return {**fields, **values, "history": rows}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> StageRecord:
        """Undo `to_json`; null becomes NaN, which earlier versions wrote so."""
        rows = tuple({name: _or_nan(value) for name, value in row.items()} for row in fields["history"])
        values = {"value": _or_nan(fields["value"]), "train_value": from_json(fields["train_value"])}
        return cls(**{**fields, **values, "history": rows})


def as_json(value: float | None) -> float | str | None:
    """Return a number as JSON, which has none that is not finite."""
    return value if value is None or math.isfinite(value) else str(float(value))


def from_json(value: float | str | None) -> float | None:
    """Undo `as_json`."""
    return float(value) if isinstance(value, str) else value


def _or_nan(value: float | str | None) -> float:
    found = from_json(value)
    return math.nan if found is None else found


@dataclass
class Stage:
    """A stage of a task: its record, and the network, read from disk only on access.

    Attributes:
      record: its record.
      read: returns the network; None if training diverged or the network was freed.
    """

    record: StageRecord
    read: Callable[[], State] | None

    def network(self) -> State:
        """Return the network."""
        if self.read is None:
            raise ArgumentError(f"stage {self.record.stage!r} has no network: it diverged, or another one was chosen")
        return self.read()

    def let_go(self) -> None:
        """Keep only the record, so that the memory of the network can be freed."""
        self.read = None


@dataclass(frozen=True)
class Goal:
    """The goal of a task on validation data.

    Attributes:
      metric: what is measured.
      value: value of the metric to reach; None without a goal.
      tolerance: how much worse than the value still reaches the goal.
    """

    metric: Metric
    value: float | None = None
    tolerance: float = 0.0

    def met_by(self, record: StageRecord) -> bool:
        """Return whether a stage reaches the goal; without a goal every stage does."""
        return self.value is None or self.metric.reaches(record.value, self.value, self.tolerance)


@dataclass(frozen=True)
class Outcome:
    """The result of learning a task.

    Attributes:
      status: how it ended.
      state: the network with the task frozen; unchanged if the task was not added.
      task: name of the task.
      value: metric on validation data of the kept stage; NaN without validation data or network.
      goal: value to reach; None without.
      test: metric on test data of the kept stage; None without test data.
      pruned: fraction freed of the available weights.
      width: channel factor of the network.
      records: every stage that was tried, in order.
    """

    status: Status
    state: State
    task: str
    value: float
    goal: float | None
    test: float | None
    pruned: float
    width: float
    records: tuple[StageRecord, ...]

    def __repr__(self) -> str:
        return f"Outcome({str(self).splitlines()[0]}, {len(self.records)} stages)"

    def __str__(self) -> str:
        goal = "" if self.goal is None else f", goal {self.goal:.4f}"
        lines = [f"{self.task}: {self.status.value}, validation {self.value:.4f}{goal}, {self.pruned:.1%} pruned"]
        for r in self.records:
            found = "diverged" if r.diverged else f"validation {r.value:.4f}"
            lines.append(f"  {r.stage:<18} size ratio {r.width**2:.3g}, pruned {r.pruned:.3f}: {found}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        columns = ("stage", "size ratio", "pruned", "validation", "epochs", "weights", "free")
        rows = [
            (
                r.stage,
                f"{r.width**2:.3g}",
                f"{r.pruned:.1%}",
                "diverged" if r.diverged else r.value,
                r.epochs,
                r.weights,
                r.free,
            )
            for r in self.records
        ]
        return f"<div>{escape(str(self).splitlines()[0])}</div>{html.table(columns, rows)}"


def wider(width: float, expansion: Expansion | None) -> float | None:
    """Return the next width, or None if the network may not be expanded.

    The size ratio increases by the step, at most to the maximum.
    """
    if expansion is None:
        return None
    ratio = width**2
    if ratio >= expansion.maximum * (1 - 1e-9):
        return None
    return width_for(min(round(ratio + expansion.step, 9), expansion.maximum))


def next_width(net: Net, width: float, expansion: Expansion | None) -> float | None:
    """Return the next width at which some layer is larger, or None if there is none.

    Channel counts are rounded down, so a small step of the size ratio may change nothing.
    """
    following = wider(width, expansion)
    while following is not None and _shapes(net, following) == _shapes(net, width):
        following = wider(following, expansion)
    return following


def starting_width(net: Net, state: State, recipe: Recipe) -> float | None:
    """Return the width at which a new task starts, wider if no free weight is left; None if it cannot start."""
    if recipe.allow_empty or ownership.free_fraction(state) > 0:
        return state.width
    return next_width(net, state.width, recipe.expansion)


def _shapes(net: Net, width: float) -> list[tuple[int, ...]]:
    layout = net.layout(width)
    return [leaf.shape for leaf in jax.tree.leaves((layout.shared, layout.local))]


def rungs(ladder: Ladder, met: bool, upcoming: int | None) -> tuple[float, ...]:
    """Return the rungs to try.

    The last task of a stream has no rungs if the ladder does not prune it. With equal shares there is one rung:
    `1 - 1 / (upcoming + 1)`. If the goal is missed at the largest width, later tasks still need free weights: the
    ladder ends with the first rung of at least `1 - round(1 / (upcoming + 1), 1)`.

    Args:
      ladder: the settings.
      met: whether the unpruned network reaches the goal.
      upcoming: number of later tasks; None if unknown, counted as one.

    Source: CPG's scripts for a missed goal.
    """
    later = 1 if upcoming is None else upcoming
    if not later and not ladder.prune_last:
        return ()
    if ladder.equal_share:
        return (1 - 1 / (later + 1),) if later else ()
    if met:
        return ladder.rungs
    needed = 1 - round(1 / (later + 1), 1)
    lower = [rung for rung in ladder.rungs if rung < needed]
    return (*lower, *ladder.rungs[len(lower) : len(lower) + 1]) if needed > 0 else ()


def next_rung(
    ladder: Ladder, steps: Sequence[float], tried: Sequence[float], reached: Sequence[float], met: bool = True
) -> float | None:
    """Return the next rung to try, or None if the ladder has ended.

    Args:
      ladder: how to search.
      steps: the rungs, smallest first.
      tried: the rungs already tried.
      reached: the tried rungs that reach the goal.
      met: whether the unpruned network reaches the goal; if not, there is no binary search.
    """
    if ladder.search == "climb" or not met:
        return next((step for step in steps if step not in tried), None)
    low, high = max(reached, default=-1.0), min((t for t in tried if t not in reached), default=2.0)
    open_steps = [step for step in steps if low < step < high and step not in tried]
    return open_steps[len(open_steps) // 2] if open_steps else None


def ends(ladder: Ladder, climbed: Sequence[StageRecord], goal: Goal) -> bool:
    """Return whether the ladder ends after the last of these rungs, because of too many consecutive misses."""
    if ladder.misses is None or goal.value is None or len(climbed) < ladder.misses:
        return False
    return not any(goal.met_by(record) for record in climbed[-ladder.misses :])


def hopeless(ladder: Ladder, goal: Goal, rows: Sequence[Mapping[str, float]]) -> bool:
    """Return whether a rung can no longer reach its goal: `best score + gain * epochs left < score of the goal`.

    Args:
      ladder: its `gain`, its `ramp` and the epochs of its phase.
      goal: the goal of the task.
      rows: the epochs of the rung so far; those before the end of the ramp do not count.
    """
    if ladder.gain is None or goal.value is None:
        return False
    # The accuracy of an epoch says nothing of a goal of another metric.
    other = "val_accuracy" if goal.metric.measure is None else "score"
    scores = [row.get("score", row.get(other, math.nan)) for row in rows[max(math.ceil(ladder.ramp) - 1, 0) :]]
    if not scores or any(map(math.isnan, scores)):
        return False
    reachable = max(scores) + ladder.gain * (ladder.phase.epochs - len(rows))
    value = reachable if goal.metric.higher_is_better else -reachable
    return not goal.metric.reaches(value, goal.value, goal.tolerance)


def choose(
    records: Sequence[StageRecord], ladder: Ladder, goal: Goal, met: bool = True, room_needed: bool = False
) -> int:
    """Return the position of the stage to keep, among the unpruned one and the rungs tried, smallest fraction first.

    Args:
      records: the unpruned stage first.
      ladder: how to choose.
      goal: the goal of the task.
      met: whether the unpruned stage reaches the goal; if not, `ladder.missed` decides.
      room_needed: whether later tasks need free weights, so that the unpruned stage is taken only if there is no other.
    """
    last = len(records) - 1
    if ladder.choose == "last" or (not met and ladder.missed == "largest"):
        return last
    reaching = [position for position, record in enumerate(records) if goal.met_by(record)]
    lowest = min(int(room_needed), last)
    if ladder.choose == "largest_meeting_goal" and goal.value is not None and max(reaching, default=-1) >= lowest:
        return max(reaching)
    scores = [goal.metric.score(record.value) for record in records[lowest:]]
    return lowest + scores.index(max(scores))  # the first on ties, as the paper's scripts do
