"""What a recipe is made of: a learning rate, a phase of training, a pruning ladder, growth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from pae_jax.checks import check_choice, check_count, check_fraction, check_number
from pae_jax.core import Of, Scope
from pae_jax.errors import ArgumentError
from pae_jax.lifelong.optimizers import Adam, Optimizer, Sgd
from pae_jax.training import Plateau

_SGD, _ADAM = Sgd(), Adam()
WEIGHTS: tuple[Literal["shared", "local", "head"], ...] = ("shared", "local", "head")
_SMALLEST_STEP = 1e-6


@dataclass(frozen=True)
class Rate:
    """A learning rate over the epochs of a phase.

    `initial * product of the factors of all drops whose epoch has passed`, with `cosine` also
    `* (1 + cos(pi t / T)) / 2` over the whole phase.

    Attributes:
      initial: first learning rate, finite and at least 0.
      drops: `(epoch, factor)`: after so many epochs the rate is multiplied.
      cosine: whether the rate falls to 0 by the end.

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

    def __post_init__(self) -> None:
        check_number("initial rate", self.initial, 0.0)
        for epoch, factor in self.drops:
            check_number("epoch of a drop", epoch, 0.0)
            check_number("factor of a drop", factor, 0.0)

    @property
    def constant(self) -> bool:
        """Whether it stays the same, so that no number of steps per epoch is needed."""
        return not self.drops and not self.cosine

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
      epochs: the most epochs it takes, at least 0.
      rate: learning rate of weights, local variables and head.
      optimizer: what makes the optax chain; starts afresh in every phase.
      plateau: lowers the rate when validation stops improving, and ends the phase; None takes all epochs.
      keep: "best" keeps the epoch of the best validation metric, "last" the last one.
      pick_rate: learning rate of the picks; None leaves them as they are.
      pick_optimizer: as `optimizer`, of the picks.
      parts: what is trained, of "shared", "local" and "head", as for `pae.fit`.

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

    def __post_init__(self) -> None:
        check_choice("keep", self.keep, ("best", "last"))
        check_count("epochs", self.epochs, 0)
        for name, rate in (("rate", self.rate), ("pick_rate", self.pick_rate)):
            if not isinstance(rate, Rate) and (name == "rate" or rate is not None):
                raise ArgumentError(f"{name} must be a Rate, such as Rate(0.01), found {rate!r}")
        for name, optimizer in (("optimizer", self.optimizer), ("pick_optimizer", self.pick_optimizer)):
            if not hasattr(optimizer, "transformation"):
                raise ArgumentError(f"{name} must be an Optimizer, such as Sgd() or Adam(), found {optimizer!r}")
        for part in self.parts:
            check_choice("parts", part, WEIGHTS)
        if not self.parts and self.pick_rate is None:
            raise ArgumentError("parts is empty and there is no pick_rate: nothing would be trained")
        if self.plateau is not None and self.keep != "best":
            raise ArgumentError("plateau goes back to the best epoch; it needs keep='best'")

    @property
    def needs_steps(self) -> bool:
        """Whether a rate changes at some epoch, for which the steps per epoch must be known."""
        return not self.rate.constant or (self.pick_rate is not None and not self.pick_rate.constant)


@dataclass(frozen=True)
class Ladder:
    """Pruning step by step: each rung frees a larger fraction, trains, and is kept or not.

    Attributes:
      rungs: fractions in [0, 1], increasing by at least 0.001. Ignored with `equal_share`.
      phase: training of each rung.
      ramp: epochs of a rung over which its fraction rises (cubic); 0 frees it at once, before the training.
      every: steps between the releases of a ramp.
      choose: "largest_meeting_goal" takes the largest fraction whose validation metric reaches the goal,
        "best_accuracy" the best metric, "last" the last rung climbed. If that is the unpruned network, tasks are to
        come and the network cannot grow, the lowest rung is taken: they need room.
      misses: rungs in a row below the goal that end the ladder, at least 1; None climbs it to the top.
      floor: the ladder ends at a rung whose metric on the training data is not better than this; None never.
      equal_share: one rung that leaves each task still to come as much as this one keeps, `1 - 1 / (upcoming + 1)`.
      of: what fractions are of, as for `pae.prune`.
      scope: as for `pae.prune`.

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

    def __post_init__(self) -> None:
        for rung in self.rungs:
            check_fraction(rung, "rungs")
        # A stage is named by three decimals.
        names = [round(rung, 3) for rung in self.rungs]
        if names != sorted(set(names)) or not (names or self.equal_share):
            raise ArgumentError(
                f"rungs must be fractions that increase by at least 0.001, at least one; found {self.rungs}"
            )
        check_choice("choose", self.choose, ("largest_meeting_goal", "best_accuracy", "last"))
        check_choice("of", self.of, ("available", "own"))
        check_choice("scope", self.scope, ("leaf", "global"))
        check_count("every", self.every, 1)
        if self.misses is not None:
            check_count("misses", self.misses, 1)
        if self.floor is not None:
            check_number("floor", self.floor)
        if not 0.0 <= self.ramp <= self.phase.epochs:
            raise ArgumentError(f"ramp must lie in 0..{self.phase.epochs} epochs of its phase, found {self.ramp}")
        if self.ramp and self.of == "own":
            raise ArgumentError("of='own' counts a task's weights at one moment; it needs ramp=0")


@dataclass(frozen=True)
class Expansion:
    """When a task misses its goal, or finds no free weight, the network grows and the task starts again.

    Attributes:
      step: added to the size ratio (number of weights over that at width 1) each time, at least 1e-6. Where that
        makes no layer larger, it is added again.
      maximum: largest size ratio, finite and at least 1; it is never exceeded.

    Raises:
      ArgumentError: a value outside its range.
    """

    step: float
    maximum: float

    def __post_init__(self) -> None:
        check_number("step of the size ratio", self.step, _SMALLEST_STEP)
        check_number("maximum size ratio", self.maximum, 1.0)
