"""Which epoch of a training is the best, and when a plateau asks for a lower rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pae_jax.batching import Feed
from pae_jax.errors import ArgumentError
from pae_jax.evaluation import evaluate_feed
from pae_jax.network import Net
from pae_jax.state import State
from pae_jax.training import Carry, Loss, OptStates


@dataclass(frozen=True)
class Plateau:
    """Lower the learning rate when validation stops improving, and stop when that does not help.

    After `patience` epochs without a strictly better score, training goes back to the best epoch, weights and
    optimizer state, with all updates multiplied by `factor`; at the `stop`-th such time in a row it ends. The score is
    that of `pae.fit(score=)`, or validation accuracy, or without labels the negative validation loss.

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
        for name, value in (("patience", self.patience), ("stop", self.stop)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name} must be an integer of at least 1, found {value!r}")
        if isinstance(self.factor, bool) or not isinstance(self.factor, (int, float)) or not 0.0 < self.factor <= 1.0:
            raise ArgumentError(f"factor must lie in (0, 1], found {self.factor!r}")


def _ordered(value: float) -> float:
    """Return a value that can be compared: NaN, which no comparison ranks, is the lowest."""
    return -math.inf if math.isnan(value) else value


class _Snapshot(NamedTuple):
    score: tuple[float, float]
    epoch: int
    state: State
    carry: Carry


@dataclass
class Judge:
    """Measures the epochs, keeps the best and says when to slow down."""

    net: Net
    task: str
    val: Feed | None
    loss: Loss
    score: Callable[[State], float] | None
    keeps: bool
    plateau: Plateau | None
    best: _Snapshot | None = None
    waited: int = 0
    decays: int = 0
    rate: float = 1.0

    def measure(self, state: State) -> dict[str, float]:
        row = {}
        if self.val is not None:
            scores = evaluate_feed(self.net, state, self.task, self.val, self.loss)
            row = {f"val_{name}": value for name, value in scores.items() if name != "count"}
        return row if self.score is None else row | {"score": float(self.score(state))}

    def consider(self, row: dict[str, float], carry: Carry, state: State) -> None:
        """Keep an epoch if it is the best so far."""
        lowest = -row.get("val_loss", 0.0)
        score = _ordered(row.get("score", row.get("val_accuracy", lowest))), _ordered(lowest)
        if self.best is None or score[0] > self.best.score[0]:
            self.waited = self.decays = 0
        else:  # the loss breaks ties in what is kept, but a lower loss alone is no better score
            self.waited += 1
        if self.best is not None and score <= self.best.score:
            return
        # The next step overwrites the arrays in place. The optimizer's state is only gone back to on a plateau.
        kept = carry if self.plateau else carry._replace(opt_state=OptStates(None))
        kept = jax.tree.map(jnp.copy, kept)
        entry = state.tasks[self.task].replace(local=kept.local, head=kept.head, pick=kept.pick)
        state = state.replace(shared=kept.shared, tasks={**state.tasks, self.task: entry})
        self.best = _Snapshot(score, int(row["epoch"]), state, kept)

    def slow_down(self, carry: Carry) -> Carry | None:
        """Return the carry to go on with, or None where training ends."""
        if self.plateau is None or self.best is None or self.waited < self.plateau.patience:
            return carry
        self.waited, self.decays = 0, self.decays + 1
        if self.decays >= self.plateau.stop:
            return None
        self.rate *= self.plateau.factor
        return jax.tree.map(jnp.copy, self.best.carry)._replace(step=carry.step)
