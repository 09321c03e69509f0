"""Parts of a recipe: learning rate, training phase, pruning ladder and expansion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from pae_jax.checks import check_choice, check_count, check_flag, check_fraction, check_kind, check_number
from pae_jax.core import Of, Scope
from pae_jax.errors import ArgumentError
from pae_jax.lifelong.optimizers import Adam, Optimizer, Sgd
from pae_jax.training import Plateau

_SGD, _ADAM = Sgd(), Adam()
WEIGHTS: tuple[Literal["shared", "local", "head"], ...] = ("shared", "local", "head")
_SMALLEST_STEP = 1e-6


@dataclass(frozen=True)
class Rate:
    """The learning rate over the epochs of a phase.

    The rate is `initial * product of the factors of all drops whose epoch has passed`. With `cosine` it is also
    `* (1 + cos(pi t / T)) / 2` over the whole phase, and with `warmup` it first rises linearly from 0.

    Attributes:
      initial: first learning rate, finite and at least 0.
      drops: `(epoch, factor)`: after this many epochs the rate is multiplied by the factor.
      cosine: whether the rate falls to 0 by the end.
      warmup: epochs in which it rises.

    Raises:
      ArgumentError: a value outside its range.

    Example:
      >>> from pae_jax.lifelong.recipes import Rate
      >>> rate = Rate(0.01, drops=((50, 0.1),)).schedule(epochs=100, steps=10)
      >>> rate(0), round(rate(500), 6)
      (0.01, 0.001)
    """

    initial: float
    drops: tuple[tuple[float, float], ...] = ()
    cosine: bool = False
    warmup: float = 0.0

    def __post_init__(self) -> None:
        check_number("initial rate", self.initial, 0.0)
        check_number("warmup", self.warmup, 0.0)
        check_flag("cosine", self.cosine)
        pairs = isinstance(self.drops, (tuple, list)) and all(
            isinstance(drop, (tuple, list)) and len(drop) == 2 for drop in self.drops
        )
        if not pairs:
            raise ArgumentError(f"drops must be pairs (epoch, factor), such as ((50, 0.1),), found {self.drops!r}")
        for epoch, factor in self.drops:
            check_number("epoch of a drop", epoch, 0.0)
            check_number("factor of a drop", factor, 0.0)

    @property
    def constant(self) -> bool:
        """Whether the rate is constant, so that the steps per epoch are not needed."""
        return not self.drops and not self.cosine and not self.warmup

    def schedule(self, epochs: int, steps: int) -> Any:
        """Return `step -> rate` for a number of epochs and of steps per epoch."""

        def rate(step: int) -> float:
            value = self.initial * math.prod(factor for epoch, factor in self.drops if step >= epoch * steps)
            if step < self.warmup * steps:
                value *= (step + 1) / (self.warmup * steps + 1)
            return value * 0.5 * (1 + math.cos(math.pi * step / (epochs * steps))) if self.cosine else value

        return rate


@dataclass(frozen=True)
class Phase:
    """Training settings of a task for a number of epochs.

    Attributes:
      epochs: largest number of epochs, at least 0.
      rate: learning rate of weights, local variables and head.
      optimizer: makes the optax chain; its state is reset in every phase.
      plateau: lowers the rate when validation stops improving, and later ends the phase; None runs all epochs.
      keep: "best" keeps the epoch of the best validation metric, "last" the last one.
      pick_rate: learning rate of the picks; None does not train them.
      lone_pick_rate: as `pick_rate`, for a task that owns no weight; None takes `pick_rate`.
      pick_optimizer: as `optimizer`, for the picks.
      parts: parts to train, of "shared", "local" and "head", as for `pae.fit`.

    Raises:
      ArgumentError: a value outside its range.
    """

    epochs: int
    rate: Rate
    optimizer: Optimizer = _SGD
    plateau: Plateau | None = None
    keep: Literal["best", "last"] = "best"
    pick_rate: Rate | None = None
    pick_optimizer: Optimizer = _ADAM
    parts: tuple[Literal["shared", "local", "head"], ...] = WEIGHTS
    lone_pick_rate: Rate | None = None

    def __post_init__(self) -> None:
        check_choice("keep", self.keep, ("best", "last"))
        check_count("epochs", self.epochs, 0)
        picks = (("pick_rate", self.pick_rate), ("lone_pick_rate", self.lone_pick_rate))
        for name, rate in (("rate", self.rate), *picks):
            if name == "rate" or rate is not None:
                check_kind(name, rate, Rate, "a Rate, such as Rate(0.01)")
        for name, optimizer in (("optimizer", self.optimizer), ("pick_optimizer", self.pick_optimizer)):
            if isinstance(optimizer, type) or not hasattr(optimizer, "transformation"):
                raise ArgumentError(f"{name} must be an Optimizer, such as Sgd() or Adam(), found {optimizer!r}")
            own = getattr(optimizer, "learning_rate", None)
            if own not in (None, 1.0):
                raise ArgumentError(
                    f"{name} has learning_rate={own!r}, by which the rate of the phase would be multiplied: leave it "
                    "out, and set Phase(rate=)"
                )
        if self.plateau is not None:
            check_kind("plateau", self.plateau, Plateau, "a Plateau, such as Plateau(patience=5)")
        check_kind("parts", self.parts, (tuple, list), "a tuple of some of 'shared', 'local' and 'head'")
        for part in self.parts:
            check_choice("parts", part, WEIGHTS)
        if not self.parts and self.pick_rate is None:
            raise ArgumentError("parts is empty and there is no pick_rate: nothing would be trained")
        if self.lone_pick_rate is not None and self.pick_rate is None:
            raise ArgumentError("lone_pick_rate takes the place of pick_rate, which is missing")
        if self.plateau is not None and self.keep != "best":
            raise ArgumentError("plateau goes back to the best epoch; it needs keep='best'")

    @property
    def needs_steps(self) -> bool:
        """Whether a rate depends on the epoch, so that the steps per epoch must be known."""
        rates = (self.rate, self.pick_rate, self.lone_pick_rate)
        return any(rate is not None and not rate.constant for rate in rates)


@dataclass(frozen=True)
class Ladder:
    """Pruning step by step: each rung frees a fraction, trains, and is kept or not.

    A rung starts from the network of the largest fraction below it that was tried.

    Attributes:
      rungs: fractions in [0, 1], increasing by at least 0.001. Ignored with `equal_share`.
      phase: training of each rung.
      ramp: epochs of a rung over which its fraction rises (cubic); 0 frees it at once, before the training.
      every: steps between the releases of a ramp.
      choose: "largest_meeting_goal" takes the largest fraction whose validation metric reaches the goal,
        "best_accuracy" the best metric, "last" the last rung tried. If the choice is the unpruned network but more
        tasks will follow, and this is the first task or the network cannot be expanded, the best rung is taken instead,
        because later tasks need free weights.
      misses: consecutive rungs below the goal that end the ladder, at least 1; None tries all rungs.
      floor: the ladder ends at a rung whose metric on the training data, without its augmentation, is not better than
        this; None disables this rule.
      equal_share: use one rung that leaves each later task as many weights as this one keeps, `1 - 1 / (upcoming + 1)`.
      of: what the fractions refer to, as for `pae.prune`.
      scope: as for `pae.prune`.
      search: "climb" tries the rungs in order; "bisect" finds the largest one that reaches the goal by binary search,
        so that of n rungs about log2(n + 1) are trained. It assumes that a larger fraction never makes the goal easier.
        A task that misses its goal unpruned always climbs.
      missed: the choice for a task that misses its goal unpruned at the largest width; the ladder then ends with the
        first rung of at least `1 - round(1 / (upcoming + 1), 1)`, and the last task of a stream has none. "best" takes
        the largest fraction that still reaches the goal, else the best metric; "largest" the largest fraction tried
        (CPG's scripts).
      prune_last: whether the last task of a stream is pruned.
      gain: largest gain of the metric per epoch to be expected, at least 0. A rung ends early, as a miss, once its goal
        is further away from its best epoch than the epochs left times this. Epochs before its whole fraction is freed
        do not count; a task that misses its goal unpruned trains every rung to its end. None trains all rungs.

    Raises:
      ArgumentError: a value outside its range.
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
    search: Literal["climb", "bisect"] = "climb"
    missed: Literal["best", "largest"] = "best"
    prune_last: bool = True
    gain: float | None = None

    def __post_init__(self) -> None:
        check_kind("rungs", self.rungs, (tuple, list), "a tuple of fractions, such as (0.5, 0.7, 0.9)")
        check_flag("equal_share", self.equal_share)
        check_flag("prune_last", self.prune_last)
        for rung in self.rungs:
            check_fraction(rung, "rungs")
        check_kind("phase", self.phase, Phase, "of type Phase")
        # The name of a stage has three decimals of the fraction.
        names = [round(rung, 3) for rung in self.rungs]
        if names != sorted(set(names)) or not (names or self.equal_share):
            raise ArgumentError(
                f"rungs must be fractions that increase by at least 0.001, at least one; found {self.rungs}"
            )
        check_choice("choose", self.choose, ("largest_meeting_goal", "best_accuracy", "last"))
        check_choice("search", self.search, ("climb", "bisect"))
        check_choice("missed", self.missed, ("best", "largest"))
        check_choice("of", self.of, ("available", "own"))
        check_choice("scope", self.scope, ("leaf", "global"))
        check_count("every", self.every, 1)
        if self.misses is not None:
            check_count("misses", self.misses, 1)
        if self.floor is not None:
            check_number("floor", self.floor)
        if self.gain is not None:
            check_number("gain", self.gain, 0.0)
            if self.choose == "last":
                raise ArgumentError("gain= ends rungs that miss the goal, but choose='last' does not look at the goal")
        if not 0.0 <= check_number("ramp", self.ramp) <= self.phase.epochs:
            raise ArgumentError(f"ramp must lie in 0..{self.phase.epochs} epochs of its phase, found {self.ramp}")
        climbs = self.misses is not None or self.floor is not None or self.of == "own"
        if self.search == "bisect" and (climbs or self.choose != "largest_meeting_goal"):
            raise ArgumentError(
                "search='bisect' needs choose='largest_meeting_goal' and of='available', without misses= and floor=, "
                "which end a climb"
            )
        if self.ramp and self.of == "own":
            raise ArgumentError("of='own' counts a task's weights at one moment; it needs ramp=0")


@dataclass(frozen=True)
class Expansion:
    """When a task misses its goal, or no weight is free, the network is expanded and the task starts again.

    A task without a goal misses none.

    Attributes:
      step: added to the size ratio (number of weights over that at width 1) each time, at least 1e-6. If that makes no
        layer larger, it is added again.
      maximum: largest size ratio, finite and at least 1; it is never exceeded.
      floor: the network is also expanded if the metric on the training data, without its augmentation, is not better
        than this after training; None uses only the goal.

    Raises:
      ArgumentError: a value outside its range.
    """

    step: float
    maximum: float
    floor: float | None = None

    def __post_init__(self) -> None:
        check_number("step of the size ratio", self.step, _SMALLEST_STEP)
        check_number("maximum size ratio", self.maximum, 1.0)
        if self.floor is not None:
            check_number("floor", self.floor)
