"""Recipes: the settings of the lifelong loop as typed data. PAE, PackNet, CPG and Piggyback are four of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pae_jax.checks import check_choice, check_count, check_number
from pae_jax.core import SHARING, Picking
from pae_jax.errors import ArgumentError
from pae_jax.lifelong.optimizers import Adam as Adam
from pae_jax.lifelong.optimizers import Sgd as Sgd
from pae_jax.lifelong.phases import Expansion as Expansion
from pae_jax.lifelong.phases import Ladder as Ladder
from pae_jax.lifelong.phases import Phase as Phase
from pae_jax.lifelong.phases import Rate as Rate
from pae_jax.training import Plateau


@dataclass(frozen=True)
class Recipe:
    """All settings of the loop for one task: train, expand if short, prune as far as the goal allows, retrain.

    Attributes:
      name: as it stands in tables.
      train: training of a new task.
      batch_size: examples per step.
      head_first: training before `train`, of the head alone as a rule; None leaves it out.
      ladder: pruning; None frees nothing.
      retrain: training after pruning, kept only where the validation metric gets better; None leaves it out. Not for
        the first task of a network, which has nothing older to use.
      goal: metric that the task must keep: "baseline" (that of its own network), a number, or None.
      tolerance: how much worse than the goal still counts as reaching it.
      expansion: growth; None keeps the width.
      sharing: which older weights a task sees, as for `pae.pack`.
      picking: threshold and kind of picks with sharing "picked".
      local_init: as for `pae.pack`: "backbone", "fresh", or "newest", the task learned last. The first task of a
        network starts from the backbone's.
      reclaim_init: as for `pae.pack`.
      allow_empty: whether a task may start without a free weight.
      first: recipe of the first task of a network, where it differs; None takes this one.

    Raises:
      ArgumentError: a value outside its range, or settings that do not go together.

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
    goal: Literal["baseline"] | float | None = None
    tolerance: float = 0.0
    expansion: Expansion | None = None
    sharing: Literal["all", "first", "picked"] = "all"
    picking: Picking | None = None
    local_init: Literal["backbone", "fresh", "newest"] = "backbone"
    reclaim_init: Literal["zeros", "fresh"] = "zeros"
    allow_empty: bool = False
    first: Recipe | None = None

    def __post_init__(self) -> None:
        check_choice("sharing", self.sharing, SHARING)
        check_choice("local_init", self.local_init, ("backbone", "fresh", "newest"))
        check_choice("reclaim_init", self.reclaim_init, ("zeros", "fresh"))
        check_count("batch_size", self.batch_size, 1)
        check_number("tolerance", self.tolerance, 0.0)
        if isinstance(self.goal, str):
            check_choice("goal", self.goal, ("baseline",))
        elif self.goal is not None:
            check_number("goal", self.goal)
        needs_goal = self.ladder is not None and self.ladder.choose == "largest_meeting_goal"
        if self.goal is None and (needs_goal or self.expansion is not None):
            raise ArgumentError(
                "a ladder that chooses by the goal, and an expansion, need goal= 'baseline' or a number"
            )
        if self.first is not None and self.first.first is not None:
            raise ArgumentError("the recipe of the first task cannot have another first recipe")

    @property
    def phases(self) -> tuple[Phase, ...]:
        """All phases of training, in order."""
        rung = None if self.ladder is None else self.ladder.phase
        return tuple(p for p in (self.head_first, self.train, rung, self.retrain) if p is not None)

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON can say it; functions are named."""
        return plain(self)


def plain(value: Any) -> Any:
    """Return settings as JSON can say them; what JSON has no word for is named by its type or function."""
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
    return getattr(value, "__qualname__", type(value).__qualname__)


_TENTHS = tuple(n / 10 for n in range(1, 10))


def pae() -> Recipe:
    """Return Packing and Expanding with the settings of the paper's scripts.

    Adam with epsilon 0.1 in the epsilon-hat form, L2 5e-4 on kernels and heads, batches of 90; up to 500 epochs at
    0.01 under the plateau rule (15 epochs, factor 0.1); nine rungs 0.1 ... 0.9 of 4 epochs at 5e-4, whose fraction
    rises over the first epoch, every 10 steps; norms start fresh; growth to a size ratio of 1.2.

    Returns:
      A recipe whose goal is the accuracy of the task's own network, as the paper describes it. The authors' scripts
      climb all rungs and take the best accuracy, `Ladder(choose="best_accuracy")`; they grow by hand, train the wider
      network at 0.03, prune it at 2e-4 and let it see task 1 alone, `Recipe(sharing="first")`. Here the optimizer's
      means start afresh with every rung; there they go on.

    Example:
      >>> import pae_jax as pae
      >>> pae.recipes.pae().train.plateau
      Plateau(patience=15, factor=0.1, stop=2)

    Source: Hung et al., ICMR 2019: poster and the scripts of experiment 1.
    """
    adam = Adam(epsilon=0.1, epsilon_hat=True, weight_decay=5e-4, decayed=("shared", "head"))
    # There the optimizer's step count goes on from training, so that the slow start of this Adam is over.
    warm = dataclasses.replace(adam, start=10_000)
    return Recipe(
        name="pae",
        batch_size=90,
        train=Phase(500, Rate(0.01), adam, Plateau(15, 0.1, 2)),
        ladder=Ladder(_TENTHS, Phase(4, Rate(5e-4), warm), ramp=1.0, every=10),
        goal="baseline",
        expansion=Expansion(step=0.2, maximum=1.2),
        local_init="fresh",
    )


def packnet() -> Recipe:
    """Return PackNet as CPG's authors run it on CIFAR-100 in 20 tasks.

    Nesterov SGD 0.9 with decay 4e-5, batches of 32; 100 epochs at 0.01, divided by 10 after 50 and 80; 60 % of the
    available weights freed at once; 30 epochs at 1e-3, divided by 10 after 25. No goal, no growth.

    Returns:
      A recipe. Both trainings keep the epoch of the best validation metric; there it is the last epoch.

    Example:
      >>> import pae_jax as pae
      >>> pae.recipes.packnet().ladder.rungs
      (0.6,)

    Source: Mallya and Lazebnik, CVPR 2018; settings of Hung et al., NeurIPS 2019, experiment 1.
    """
    return Recipe(
        name="packnet",
        train=Phase(100, Rate(1e-2, ((50, 0.1), (80, 0.1)))),
        ladder=Ladder((0.6,), Phase(30, Rate(1e-3, ((25, 0.1),))), ramp=0.0, choose="last"),
        local_init="newest",
        allow_empty=True,
    )


def cpg() -> Recipe:
    """Return Compacting, Picking and Growing with its settings for CIFAR-100 in 20 tasks.

    Training as PackNet's, picks by Adam at 5e-4, a fifth of it after 50 epochs and 0 after 70; ten rungs
    0.1 ... 0.9, 0.95 of 20 epochs at 1e-3 whose fraction rises over 4 epochs, ended by a training accuracy of 0.95;
    then 30 epochs of retraining at 1e-3, picks at 1e-4. Norms start as the last task's. Growth by 0.5 to 1.5.

    Returns:
      A recipe whose goal is the accuracy of the task's own network. The best validation epoch counts, of training, of
      every rung (at its full fraction) and of the own network; there it is the last one. Growth goes by the validation
      metric alone, there by a training accuracy of 0.95 too. Retraining starts from the picks that were learned.

    Example:
      >>> import pae_jax as pae
      >>> recipe = pae.recipes.cpg()
      >>> recipe.sharing, recipe.expansion
      ('picked', Expansion(step=0.5, maximum=1.5))

    Source: Hung et al., "Compacting, Picking and Growing for Unforgetting Continual Learning", NeurIPS 2019.
    """
    return Recipe(
        name="cpg",
        train=Phase(100, Rate(1e-2, ((50, 0.1), (80, 0.1))), pick_rate=Rate(5e-4, ((50, 0.2), (70, 0.0)))),
        ladder=Ladder((*_TENTHS, 0.95), Phase(20, Rate(1e-3)), ramp=4.0, floor=0.95),
        retrain=Phase(30, Rate(1e-3), plateau=Plateau(patience=5, stop=1), pick_rate=Rate(1e-4)),
        goal="baseline",
        expansion=Expansion(step=0.5, maximum=1.5),
        sharing="picked",
        local_init="newest",
    )


def piggyback(first: Recipe | None = None, *, ternary: bool = False) -> Recipe:
    """Return Piggyback: picks on a fixed backbone, which the first task trains.

    Picks and head by Adam at 1e-4, divided by 10 after 15 epochs, 30 epochs, batches of 32; biases and norms stay
    those of the backbone.

    Args:
      first: recipe of the first task, which makes the backbone; None takes `finetune()`. A pretrained network whose
        first task is frozen needs none.
      ternary: whether picked weights may also be used with their sign turned.

    Returns:
      A recipe.

    Example:
      >>> import pae_jax as pae
      >>> pae.recipes.piggyback(ternary=True).picking.ternary
      True

    Source: Mallya et al., "Piggyback: Adapting a Single Network to Multiple Tasks", ECCV 2018.
    """
    rate = Rate(1e-4, ((15, 0.1),))
    return Recipe(
        name="piggyback",
        train=Phase(30, rate, Adam(), pick_rate=rate, parts=("head",)),
        sharing="picked",
        picking=Picking(ternary=ternary),
        local_init="newest",
        allow_empty=True,
        first=first or finetune(),
    )


def finetune(head_epochs: int = 0) -> Recipe:
    """Return plain training of all that is free, without pruning or growth: a task's own network.

    On an empty or pretrained network this is the baseline of PAE and CPG; of a network with tasks it takes all room.

    Args:
      head_epochs: epochs in which only the head trains, at 1e-2, before everything does; PAE's baselines take 3.

    Returns:
      A recipe with CPG's training: 100 epochs at 0.01, divided by 10 after 50 and 80.

    Example:
      >>> import pae_jax as pae
      >>> pae.recipes.finetune().ladder is None
      True

    Source: the baselines of Hung et al., ICMR 2019 and NeurIPS 2019.
    """
    head = Phase(head_epochs, Rate(1e-2), keep="last", parts=("head",)) if head_epochs else None
    return Recipe(name="finetune", train=Phase(100, Rate(1e-2, ((50, 0.1), (80, 0.1)))), head_first=head)
