"""Recipes: the settings of the lifelong loop as typed data. PAE, PackNet, CPG and Piggyback are four of them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from pae_jax.errors import ArgumentError
from pae_jax.judging import Plateau
from pae_jax.optimizers import Adam as Adam
from pae_jax.optimizers import Optimizer
from pae_jax.optimizers import Sgd as Sgd
from pae_jax.picking import Picking
from pae_jax.pruning import Of, Scope, check_choice, check_fraction
from pae_jax.state import SHARING

_SGD, _ADAM = Sgd(), Adam()


@dataclass(frozen=True)
class Rate:
    """A learning rate over the epochs of a phase.

    `initial * product of the factors of all drops whose epoch has passed`, with `cosine` also
    `* (1 + cos(pi t / T)) / 2` over the whole phase.

    Attributes:
      initial: first learning rate.
      drops: `(epoch, factor)`: after so many epochs the rate is multiplied.
      cosine: whether the rate falls to 0 by the end.

    Example:
      >>> from pae_jax.recipes import Rate
      >>> rate = Rate(0.01, drops=((50, 0.1),)).schedule(epochs=100, steps=10)
      >>> rate(0), round(rate(500), 6)
      (0.01, 0.001)
    """

    initial: float
    drops: tuple[tuple[float, float], ...] = ()
    cosine: bool = False

    def schedule(self, epochs: int, steps: int) -> Any:
        """Return `step -> rate` for a number of epochs of so many steps each."""

        def rate(step: int) -> float:
            value = self.initial * math.prod(factor for epoch, factor in self.drops if step >= epoch * steps)
            return value * 0.5 * (1 + math.cos(math.pi * step / (epochs * steps))) if self.cosine else value

        return rate


@dataclass(frozen=True)
class Phase:
    """How a task trains for some epochs.

    Attributes:
      epochs: the most epochs it takes.
      rate: learning rate of weights, local variables and head.
      optimizer: what makes the optax chain; starts afresh in every phase.
      plateau: lowers the rate when validation stops improving, and ends the phase; None takes all epochs.
      keep: "best" keeps the epoch of the best validation metric, "last" the last one.
      pick_rate: learning rate of the picks; None leaves them as they are.
      pick_optimizer: as `optimizer`, of the picks.
      parts: what is trained, of "shared", "local" and "head", as for `pae.fit`.
    """

    epochs: int
    rate: Rate
    optimizer: Optimizer = _SGD
    plateau: Plateau | None = None
    keep: Literal["best", "last"] = "best"
    pick_rate: Rate | None = None
    pick_optimizer: Optimizer = _ADAM
    parts: tuple[Literal["shared", "local", "head"], ...] = ("shared", "local", "head")

    def __post_init__(self) -> None:
        check_choice("keep", self.keep, ("best", "last"))
        if self.epochs < 0:
            raise ArgumentError(f"epochs must be at least 0, found {self.epochs}")


@dataclass(frozen=True)
class Ladder:
    """Pruning step by step: each rung frees a larger fraction, trains, and is kept or not.

    Attributes:
      rungs: fractions in (0, 1), increasing. Ignored with `equal_share`.
      phase: training of each rung.
      ramp: epochs of a rung over which its fraction rises (cubic); 0 frees it at once, before the training.
      every: steps between the releases of a ramp.
      choose: "largest_meeting_goal" takes the largest fraction whose validation metric reaches the goal,
        "best_accuracy" the best metric, "last" the last rung climbed.
      misses: rungs in a row below the goal that end the ladder; None climbs it to the top.
      floor: the ladder ends at a rung whose accuracy on the training data is not above this; None never.
      equal_share: one rung that leaves each task still to come as much as this one keeps, `1 - 1 / (upcoming + 1)`.
      of: what fractions are of, as for `pae.prune`.
      scope: as for `pae.prune`.
    """

    rungs: tuple[float, ...]
    phase: Phase
    ramp: float = 1.0
    every: int = 10
    choose: Literal["largest_meeting_goal", "best_accuracy", "last"] = "largest_meeting_goal"
    misses: int | None = None
    floor: float | None = None
    equal_share: bool = False
    of: Of = "available"
    scope: Scope = "leaf"

    def __post_init__(self) -> None:
        for rung in self.rungs:
            check_fraction(rung, "rungs")
        if list(self.rungs) != sorted(set(self.rungs)) or not (self.rungs or self.equal_share):
            raise ArgumentError(f"rungs must be increasing fractions, at least one; found {self.rungs}")
        check_choice("choose", self.choose, ("largest_meeting_goal", "best_accuracy", "last"))
        if not 0.0 <= self.ramp <= self.phase.epochs:
            raise ArgumentError(f"ramp must lie in 0..{self.phase.epochs} epochs of its phase, found {self.ramp}")
        if self.ramp and self.of == "own":
            raise ArgumentError("of='own' counts a task's weights at one moment; it needs ramp=0")


@dataclass(frozen=True)
class Expansion:
    """When a task misses its goal, or finds no free weight, the network grows and the task starts again.

    Attributes:
      step: added to the size ratio (number of weights over that at width 1) each time, positive.
      maximum: largest size ratio; it is never exceeded.
    """

    step: float
    maximum: float

    def __post_init__(self) -> None:
        if not self.step > 0 or not self.maximum >= 1:
            raise ArgumentError(f"step must be positive and maximum at least 1, found {self.step}, {self.maximum}")


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
      norm_init: as for `pae.pack`.
      reclaim_init: as for `pae.pack`.
      allow_empty: whether a task may start without a free weight.
      first: recipe of the first task of a network, where it differs; None takes this one.

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
    norm_init: Literal["fresh", "inherit"] = "fresh"
    reclaim_init: Literal["zeros", "fresh"] = "zeros"
    allow_empty: bool = False
    first: Recipe | None = None

    def __post_init__(self) -> None:
        check_choice("sharing", self.sharing, SHARING)
        if isinstance(self.goal, str):
            check_choice("goal", self.goal, ("baseline",))
        needs_goal = self.ladder is not None and self.ladder.choose == "largest_meeting_goal"
        if self.goal is None and (needs_goal or self.expansion is not None):
            raise ArgumentError(
                "a ladder that chooses by the goal, and an expansion, need goal= 'baseline' or a number"
            )
        if self.first is not None and self.first.first is not None:
            raise ArgumentError("the recipe of the first task cannot have another first recipe")

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON can say it; functions are named."""
        return _plain(self)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
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
      climb all rungs and take the best accuracy: `Ladder(choose="best_accuracy")`.

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
    )


def packnet() -> Recipe:
    """Return PackNet as CPG's authors run it on CIFAR-100 in 20 tasks.

    Nesterov SGD 0.9 with decay 4e-5, batches of 32; 100 epochs at 0.01, divided by 10 after 50 and 80; 60 % of the
    available weights freed at once; 30 epochs at 1e-3, divided by 10 after 25. No goal, no growth.

    Returns:
      A recipe.

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
        norm_init="inherit",
        allow_empty=True,
    )


def cpg() -> Recipe:
    """Return Compacting, Picking and Growing with its settings for CIFAR-100 in 20 tasks.

    Training as PackNet's, picks by Adam at 5e-4, a fifth of it after 50 epochs and 0 after 70; ten rungs
    0.1 ... 0.9, 0.95 of 20 epochs at 1e-3 whose fraction rises over 4 epochs, ended by a training accuracy of 0.95;
    then 30 epochs of retraining at 1e-3, picks at 1e-4. Norms start as the last task's. Growth by 0.5 to 1.5.

    Returns:
      A recipe whose goal is the accuracy of the task's own network.

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
        norm_init="inherit",
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
        norm_init="inherit",
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
