"""`Recipe`: all settings of the lifelong loop for one task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pae_jax.checks import check_choice, check_count, check_flag, check_kind, check_number
from pae_jax.core import SHARING, WEIGHT_INITS, Picking, WeightInit
from pae_jax.errors import ArgumentError
from pae_jax.lifelong.describing import described
from pae_jax.lifelong.phases import Expansion, Ladder, Phase


@dataclass(frozen=True)
class Recipe:
    """All settings of the loop for one task: train, expand if needed, prune as far as the goal allows, retrain.

    Attributes:
      name: name of the recipe in tables.
      train: training of a new task.
      batch_size: examples per step.
      head_first: training before `train`, such as of the head alone or of the picks alone; None skips it.
      ladder: pruning; None does not prune.
      retrain: training after pruning, kept only if the validation metric improves; None skips it. Not used for the
        first task of a network, which has no older weights to use.
      goal: metric that the task must keep: a number, None, "baseline" (that of its own network), "finetune_average" or
        "finetune_best" (mean or best of up to 5 own networks, each started from another earlier task of the network,
        drawn by the key; the first task has its baseline).
      finetune: training of the own networks of the goals "finetune_average" and "finetune_best"; None takes `train`.
      tolerance: how much worse than the goal still reaches it.
      expansion: when and how far to expand; None keeps the width. Without a goal only where no weight is free.
      sharing: which older weights a task sees, as for `pae.pack`.
      picking: threshold and kind of picks with sharing "picked".
      picks_from: what the picks start from, with sharing "picked": "own", as `picking` says, or "nearest", the weights
        of the older task whose features classify the training data best by nearest neighbours, if better than chance.
      local_init: as for `pae.pack`: "backbone", "fresh", "newest", the task learned last, or "nearest", the older task
        that `picks_from` describes, and the backbone's if none is better than chance, or fresh ones in a network of a
        bundle, which does not hold the backbone's. The first task of a network starts from the backbone's.
      weight_init: as for `pae.pack`.
      budget: as for `pae.pack`: share of all weights that a task may own; None allows all free ones. With a budget, a
        ladder prunes shares of the task's own weights, `Ladder(of="own")`.
      budget_by: which weights a budget takes: "gradient", those of the largest `pae.gradient_scores` on the first 8
        batches, or "key", drawn by the random key.
      allow_empty: whether a task may start without a free weight.
      first: recipe of the first task of a network, if it differs; None takes this one.

    Raises:
      ArgumentError: a value outside its range, or incompatible settings.

    Example:
      >>> import dataclasses, pae_jax as pae
      >>> recipe = pae.recipes.pae()
      >>> recipe.expansion.maximum, recipe.ladder.rungs[-1]
      (1.2, 0.9)
      >>> dataclasses.replace(recipe, goal=0.9).goal
      0.9
    """

    name: str
    train: Phase
    batch_size: int = 32
    head_first: Phase | None = None
    ladder: Ladder | None = None
    retrain: Phase | None = None
    goal: Literal["baseline", "finetune_average", "finetune_best"] | float | None = None
    finetune: Phase | None = None
    tolerance: float = 0.0
    expansion: Expansion | None = None
    sharing: Literal["all", "first", "picked"] = "all"
    picking: Picking | None = None
    picks_from: Literal["own", "nearest"] = "own"
    local_init: Literal["backbone", "fresh", "newest", "nearest"] = "backbone"
    weight_init: WeightInit = "preserve"
    budget: float | None = None
    budget_by: Literal["gradient", "key"] = "gradient"
    allow_empty: bool = False
    first: Recipe | None = None

    def __post_init__(self) -> None:
        phases = dict.fromkeys(("train", "head_first", "retrain", "finetune"), Phase)
        others = {"ladder": Ladder, "expansion": Expansion, "picking": Picking, "first": Recipe}
        for name, kind in (phases | others).items():
            value = getattr(self, name)
            if name == "train" or value is not None:
                check_kind(name, value, kind, f"of type {kind.__name__}")
        check_choice("sharing", self.sharing, SHARING)
        check_choice("local_init", self.local_init, ("backbone", "fresh", "newest", "nearest"))
        check_choice("weight_init", self.weight_init, WEIGHT_INITS)
        check_choice("picks_from", self.picks_from, ("own", "nearest"))
        if self.picks_from == "nearest" and self.sharing != "picked":
            raise ArgumentError("picks_from='nearest' needs sharing='picked'")
        if self.picking is not None and self.sharing != "picked":
            raise ArgumentError(f"picking needs sharing='picked', found sharing={self.sharing!r}; or picking=None")
        check_choice("budget_by", self.budget_by, ("gradient", "key"))
        check_flag("allow_empty", self.allow_empty)
        check_count("batch_size", self.batch_size, 1)
        check_number("tolerance", self.tolerance, 0.0)
        if isinstance(self.goal, str):
            check_choice("goal", self.goal, ("baseline", "finetune_average", "finetune_best"))
        elif self.goal is not None:
            check_number("goal", self.goal)
        needs_goal = self.ladder is not None and self.ladder.choose == "largest_meeting_goal"
        if self.goal is None and needs_goal:
            raise ArgumentError("a ladder that chooses by the goal needs goal= 'baseline' or a number")
        if self.budget is not None:
            if not check_number("budget", self.budget, 0.0, 1.0):
                raise ArgumentError("budget is 0: the task would own nothing")
            if self.ladder is not None and self.ladder.of != "own":
                raise ArgumentError("with a budget most of what is available is free: it needs Ladder(of='own')")
        if self.first is not None and self.first.first is not None:
            raise ArgumentError("the recipe of the first task cannot have another first recipe")

    @property
    def phases(self) -> tuple[Phase, ...]:
        """All phases of training, in order."""
        rung = None if self.ladder is None else self.ladder.phase
        finetune = self.finetune if self.goal in ("finetune_average", "finetune_best") else None
        return tuple(p for p in (self.head_first, self.train, rung, self.retrain, finetune) if p is not None)

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON data; functions and own objects by name, and a digest of what they hold."""
        return plain(self)


def plain(value: Any) -> Any:
    """Return settings as JSON data; values without a JSON form by name, and a digest of what they hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return described(value)
