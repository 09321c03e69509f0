"""Which epoch of a training is the best, and when a plateau asks for a lower rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pae_jax.checks import check_count, check_number
from pae_jax.core import State
from pae_jax.errors import ArgumentError
from pae_jax.training.train_state import TrainState


@dataclass(frozen=True)
class Plateau:
    """Lower the learning rate when validation stops improving, and stop when that does not help.

    After `patience` epochs without a strictly better score, training goes back to the best epoch, weights and
    optimizer state, with all updates multiplied by `factor`; at the `stop`-th such time in a row it ends. The score is
    that of `Best(score=)`, or validation accuracy, or without it the negative validation loss.

    Attributes:
      patience: epochs without improvement, at least 1.
      factor: of the updates, in (0, 1].
      stop: how many times in a row, at least 1.

    Raises:
      ArgumentError: a value outside its range.

    Example:
      >>> import pae_jax as pae
      >>> pae.Plateau()
      Plateau(patience=15, factor=0.1, stop=2)

    Source: Hung et al., "Packing and Expanding", ICMR 2019, in the authors' training code.
    """

    patience: int = 15
    factor: float = 0.1
    stop: int = 2

    def __post_init__(self) -> None:
        check_count("patience", self.patience, 1)
        check_count("stop", self.stop, 1)
        if not check_number("factor", self.factor, 0.0, 1.0):
            raise ArgumentError(f"factor must lie in (0, 1], found {self.factor!r}")


@dataclass(frozen=True)
class Best:
    """Keep the epoch of the best validation score, for `fit(keep=)`.

    The score is the validation accuracy, or without one the negative validation loss; the loss breaks ties. Epochs
    before the end of gradual pruning do not count.

    Attributes:
      score: `state -> float`, higher is better, in place of those. It must not keep the state.
      plateau: lowers the rate by the score; None leaves it.

    Example:
      >>> import pae_jax as pae
      >>> pae.Best(plateau=pae.Plateau(patience=5)).plateau.patience
      5
    """

    score: Callable[[State], float] | None = None
    plateau: Plateau | None = None


def _ordered(value: float) -> float:
    """Return a value that can be compared: NaN, which no comparison ranks, is the lowest."""
    return -math.inf if math.isnan(value) else value


class Snapshot(NamedTuple):
    """An epoch that was kept."""

    score: tuple[float, float]
    epoch: int
    ts: TrainState


@dataclass(frozen=True)
class Progress:
    """How far the choice of an epoch has come.

    Attributes:
      best: the best epoch so far.
      waited: epochs since the score got better, or the rate lower.
      decays: how often in a row the rate was lowered.
      rate: product of the factors.
      ended: whether the plateau has ended training.
    """

    best: Snapshot | None = None
    waited: int = 0
    decays: int = 0
    rate: float = 1.0
    ended: bool = False

    def after(self, row: dict[str, float], ts: TrainState, rule: Best) -> Progress:
        """Return the progress after an epoch."""
        lowest = -row.get("val_loss", 0.0)
        score = _ordered(row.get("score", row.get("val_accuracy", lowest))), _ordered(lowest)
        now = replace(self, waited=self.waited + 1)  # a lower loss alone breaks ties, but is no better score
        if self.best is None or score[0] > self.best.score[0]:
            now = replace(self, waited=0, decays=0)
        if self.best is not None and score <= self.best.score:
            return now
        # The next step overwrites the arrays in place. The optimizer's state is only gone back to on a plateau.
        kept = jax.tree.map(jnp.copy, ts if rule.plateau else ts.replace(opt_state=None))
        return replace(now, best=Snapshot(score, int(row["epoch"]), kept))

    def slowed(self, ts: TrainState, plateau: Plateau | None) -> tuple[Progress, TrainState | None]:
        """Return the progress and the state to go on with, None where training ends."""
        if plateau is None or self.best is None or self.waited < plateau.patience:
            return self, ts
        now = replace(self, waited=0, decays=self.decays + 1)
        if now.decays >= plateau.stop:
            return replace(now, ended=True), None
        back = jax.tree.map(jnp.copy, self.best.ts).replace(step=ts.step)
        return replace(now, rate=self.rate * plateau.factor), back
