"""Choice of the best epoch of a training, and lower learning rates on a plateau."""

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

    After `patience` epochs without a strictly better score, training returns to the weights and optimizer state of the
    best epoch, with all updates multiplied by `factor`. At the `stop`-th consecutive time it ends. The score is that of
    `Best(score=)`, or validation accuracy, or without accuracy the negative validation loss.

    Attributes:
      patience: epochs without improvement, at least 1.
      factor: multiplies the updates, in (0, 1].
      stop: consecutive plateaus that end training, at least 1.
      pick_factor: as `factor`, for the updates of picks; None takes `factor`.

    Raises:
      ArgumentError: a value outside its range.

    Example:
      >>> import pae_jax as pae
      >>> pae.Plateau()
      Plateau(patience=15, factor=0.1, stop=2, pick_factor=None)

    Source: Hung et al., "Packing and Expanding", ICMR 2019, in the authors' training code.
    """

    patience: int = 15
    factor: float = 0.1
    stop: int = 2
    pick_factor: float | None = None

    def __post_init__(self) -> None:
        check_count("patience", self.patience, 1)
        check_count("stop", self.stop, 1)
        for name, factor in (("factor", self.factor), ("pick_factor", self.pick_factor)):
            if factor is not None and not check_number(name, factor, 0.0, 1.0):
                raise ArgumentError(f"{name} must lie in (0, 1], found {factor!r}")


@dataclass(frozen=True)
class Best:
    """Keep the epoch of the best validation score, for `fit(keep=)`.

    The score is the validation accuracy, or without one the negative validation loss; the loss breaks ties. Epochs
    before the end of gradual pruning do not count.

    Attributes:
      score: `state -> float`, higher is better, replaces the default score. It must not keep a reference to the state.
      plateau: lowers the rate according to the score; None does not change it.

    Example:
      >>> import pae_jax as pae
      >>> pae.Best(plateau=pae.Plateau(patience=5)).plateau.patience
      5
    """

    score: Callable[[State], float] | None = None
    plateau: Plateau | None = None


def _ordered(value: float) -> float:
    """Return a value that can be compared: NaN counts as the lowest."""
    return -math.inf if math.isnan(value) else value


def _score(row: dict[str, float]) -> tuple[float, float]:
    """Return the score of an epoch, and the negative validation loss, which breaks ties."""
    lowest = -row.get("val_loss", 0.0)
    return _ordered(row.get("score", row.get("val_accuracy", lowest))), _ordered(lowest)


class Snapshot(NamedTuple):
    """An epoch that was kept."""

    score: tuple[float, float]
    epoch: int
    ts: TrainState
    by_user: bool
    """Whether the score is that of `Best(score=)`, which is on a scale of its own."""


@dataclass(frozen=True)
class Progress:
    """State of the choice of an epoch.

    Attributes:
      best: the best epoch so far.
      waited: epochs since the score improved or the rate was lowered.
      decays: consecutive times the rate was lowered.
      rate: product of the factors.
      pick_rate: product of those of the picks.
      ended: whether the plateau has ended training.
    """

    best: Snapshot | None = None
    waited: int = 0
    decays: int = 0
    rate: float = 1.0
    pick_rate: float = 1.0
    ended: bool = False

    def after(self, row: dict[str, float], ts: TrainState, rule: Best) -> Progress:
        """Return the progress after an epoch."""
        score = _score(row)
        now = replace(self, waited=self.waited + 1)  # a lower loss only breaks ties; it is not a better score
        if self.best is None or score[0] > self.best.score[0]:
            now = replace(self, waited=0, decays=0)
        if self.best is not None and score <= self.best.score:
            return now
        # The next step overwrites the arrays in place. The optimizer's state is only restored on a plateau.
        kept = jax.tree.map(jnp.copy, ts if rule.plateau else ts.replace(opt_state=None))
        return replace(now, best=Snapshot(score, int(row["epoch"]), kept, "score" in row))

    def resumed(self, ts: TrainState, rule: Best, rescored: Callable[[TrainState], dict[str, float]]) -> Progress:
        """Return the progress that another call goes on with, whose rule, data or pruning may be others.

        The best epoch does not count if the task owned other weights then, or if it lacks the optimizer's state, to
        which a plateau would go back. It is scored anew if it was chosen by another kind of score.
        """
        if self.best is None:
            return self
        before, now = jax.tree.leaves(self.best.ts.owner), jax.tree.leaves(ts.owner)
        same = all(bool((a == b).all()) for a, b in zip(before, now, strict=True))
        if not same or (rule.plateau is not None and self.best.ts.opt_state is None):
            return replace(self, best=None, waited=0)
        if self.best.by_user == (rule.score is not None):
            return self
        return replace(
            self, best=self.best._replace(score=_score(rescored(self.best.ts)), by_user=not self.best.by_user)
        )

    def slowed(self, ts: TrainState, plateau: Plateau | None) -> tuple[Progress, TrainState | None]:
        """Return the progress and the state to continue from, None if training ends."""
        if plateau is None or self.best is None or self.waited < plateau.patience:
            return self, ts
        now = replace(self, waited=0, decays=self.decays + 1)
        if now.decays >= plateau.stop:
            return replace(now, ended=True), None
        back = jax.tree.map(jnp.copy, self.best.ts).replace(step=ts.step)
        of_picks = plateau.factor if plateau.pick_factor is None else plateau.pick_factor
        return replace(now, rate=self.rate * plateau.factor, pick_rate=self.pick_rate * of_picks), back
