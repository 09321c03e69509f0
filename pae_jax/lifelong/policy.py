"""Records of the lifelong loop, and its decisions as pure functions of them: no training, no files."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from pae_jax.core import State, ownership
from pae_jax.errors import ArgumentError
from pae_jax.lifelong.recipes import Expansion, Ladder, Recipe
from pae_jax.lifelong.task import Metric
from pae_jax.nets import Net, width_for


class Status(enum.Enum):
    """How learning a task ended."""

    LEARNED = "learned"
    """There was no goal to reach."""
    GOAL_MET = "goal met"
    """The validation metric reaches the goal, after pruning too."""
    GOAL_MISSED = "goal missed"
    """The network could not grow any further; the task is kept all the same."""
    NO_CAPACITY = "no capacity"
    """No free weight is left and the network may not grow; the task was not added."""
    DIVERGED = "diverged"
    """Training met values that are not finite; the task was not added."""

    @property
    def added(self) -> bool:
        """Whether the network has the task now."""
        return self not in (Status.NO_CAPACITY, Status.DIVERGED)


@dataclass(frozen=True)
class StageRecord:
    """What is known of one stage of learning a task.

    Attributes:
      task: name of the task; "... (own network)" where it was trained alone.
      stage: name of the stage, unique within the task.
      width: channel factor of the network.
      pruned: fraction freed of the weights available to the task.
      value: metric on validation data; NaN without.
      train_value: metric on training data; None where nothing asks for it.
      epochs: epochs of training of the task so far, those of this stage included.
      kept_epoch: which of them was kept.
      weights: weights the task owns.
      free: weights nobody owns.
      diverged: whether training met values that are not finite; the stage has no network then.
      sizes: MB (2^20 bytes) by the paper's formula, by column name.
      history: one dict per epoch, as in `pae.History.rows`.
      metric: name of the metric.
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

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON can say it; numbers that are not finite are null."""
        fields = dataclasses.asdict(self)
        rows = [{name: _or_null(value) for name, value in row.items()} for row in self.history]
        values = {"value": _or_null(self.value), "train_value": _or_null(self.train_value)}
        return {**fields, **values, "history": rows}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> StageRecord:
        """Undo `to_json`; null becomes NaN."""
        rows = tuple({name: _or_nan(value) for name, value in row.items()} for row in fields["history"])
        return cls(**{**fields, "value": _or_nan(fields["value"]), "history": rows})


def _or_null(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


@dataclass
class Stage:
    """A stage of a task: its record, and the network, read from disk only when asked for.

    Attributes:
      record: what is known of it.
      read: returns the network; None where training diverged, or the network was let go.
    """

    record: StageRecord
    read: Callable[[], State] | None

    def network(self) -> State:
        """Return the network."""
        if self.read is None:
            raise ArgumentError(f"stage {self.record.stage!r} has no network: it diverged, or another one was chosen")
        return self.read()

    def let_go(self) -> None:
        """Keep the record alone, so that the memory of the network can be freed."""
        self.read = None


@dataclass(frozen=True)
class Goal:
    """What a task has to reach on validation data.

    Attributes:
      metric: what is measured.
      value: of the metric, to be reached; None where nothing is.
      tolerance: how much worse still counts.
    """

    metric: Metric
    value: float | None = None
    tolerance: float = 0.0

    def met_by(self, record: StageRecord) -> bool:
        """Say whether a stage reaches the goal; every stage does where there is none."""
        return self.value is None or self.metric.reaches(record.value, self.value, self.tolerance)


@dataclass(frozen=True)
class Outcome:
    """What came of learning a task.

    Attributes:
      status: how it ended.
      state: the network with the task frozen; unchanged where the task was not added.
      task: name of the task.
      value: metric on validation data of what was kept; NaN without validation data or network.
      goal: value to reach; None without.
      test: metric on test data of what was kept; None without test data.
      pruned: fraction freed of the weights that were available.
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

    def __str__(self) -> str:
        goal = "" if self.goal is None else f", goal {self.goal:.4f}"
        lines = [f"{self.task}: {self.status.value}, validation {self.value:.4f}{goal}, {self.pruned:.1%} pruned"]
        for r in self.records:
            found = "diverged" if r.diverged else f"validation {r.value:.4f}"
            lines.append(f"  {r.stage:<18} size ratio {r.width**2:.3g}, pruned {r.pruned:.3f}: {found}")
        return "\n".join(lines)


def wider(width: float, expansion: Expansion | None) -> float | None:
    """Return the next width, or None where the network may not grow.

    The size ratio grows by the step, never beyond the maximum.
    """
    if expansion is None:
        return None
    ratio = width**2
    if ratio >= expansion.maximum * (1 - 1e-9):
        return None
    return width_for(min(round(ratio + expansion.step, 9), expansion.maximum))


def next_width(net: Net, width: float, expansion: Expansion | None) -> float | None:
    """Return the next width at which some layer is larger, or None where there is none.

    Channel counts are rounded down, so a small step of the size ratio may change nothing.
    """
    following = wider(width, expansion)
    while following is not None and _shapes(net, following) == _shapes(net, width):
        following = wider(following, expansion)
    return following


def starting_width(net: Net, state: State, recipe: Recipe) -> float | None:
    """Return the width at which a new task starts, wider where no free weight is left; None if it cannot start."""
    if recipe.allow_empty or ownership.free_fraction(state) > 0:
        return state.width
    return next_width(net, state.width, recipe.expansion)


def _shapes(net: Net, width: float) -> list[tuple[int, ...]]:
    layout = net.layout(width)
    return [leaf.shape for leaf in jax.tree.leaves((layout.shared, layout.local))]


def rungs(ladder: Ladder, met: bool, upcoming: int | None) -> tuple[float, ...]:
    """Return the rungs to climb.

    With equal shares that is one: `1 - 1 / (upcoming + 1)`. Where the goal is missed at the largest width, tasks to
    come need room all the same: the ladder ends with the first rung of at least `1 - round(1 / (upcoming + 1), 1)`.

    Args:
      ladder: the settings.
      met: whether the unpruned network reaches the goal.
      upcoming: tasks still to come; None if unknown, counted as one.

    Source: CPG's scripts for the goal that is missed.
    """
    later = 1 if upcoming is None else upcoming
    if ladder.equal_share:
        return (1 - 1 / (later + 1),) if later else ()
    if met:
        return ladder.rungs
    needed = 1 - round(1 / (later + 1), 1)
    lower = [rung for rung in ladder.rungs if rung < needed]
    return (*lower, *ladder.rungs[len(lower) : len(lower) + 1]) if needed > 0 else ()


def ends(ladder: Ladder, climbed: Sequence[StageRecord], goal: Goal) -> bool:
    """Say whether the ladder ends after the last of these rungs: too many misses in a row."""
    if ladder.misses is None or goal.value is None or len(climbed) < ladder.misses:
        return False
    return not any(goal.met_by(record) for record in climbed[-ladder.misses :])


def choose(
    records: Sequence[StageRecord], ladder: Ladder, goal: Goal, met: bool = True, room_needed: bool = False
) -> int:
    """Return the position of the stage to keep, among the unpruned one and the rungs climbed, smallest fraction first.

    Args:
      records: the unpruned stage first.
      ladder: how to choose.
      goal: what to reach.
      met: whether the unpruned stage reaches the goal; if not, the largest fraction is taken, to leave room.
      room_needed: whether tasks are to come and the network cannot grow, so that the unpruned stage would end the
        stream; the lowest rung is taken in its place.
    """
    last = len(records) - 1
    if not met or ladder.choose == "last":
        return last
    lowest = min(int(room_needed), last)
    if ladder.choose == "best_accuracy" or goal.value is None:
        scores = [goal.metric.score(record.value) for record in records[lowest:]]
        return lowest + scores.index(max(scores))  # the first on ties, as the paper's scripts do
    reaching = (position for position, record in enumerate(records) if goal.met_by(record))
    return max(lowest, *reaching, 0)
