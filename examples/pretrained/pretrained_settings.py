"""What all ways of learning a task share: how long and at what rate they train, and what is measured."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import optax


@dataclasses.dataclass(frozen=True)
class Settings:
    """Training of a task, the same for all ways.

    Attributes:
      rate: learning rate of heads, biases, norms, new units and sparse adapters.
      lora_rate: learning rate of low-rank adapters and their heads.
      full_rate: learning rate where the whole network is trained.
      room_rate: learning rate of kernels in room that pruning made.
      pick_rate: learning rate of the scores of picks.
    """

    epochs: int = 3
    batch_size: int = 32
    rate: float = 2e-3
    lora_rate: float = 2e-3
    full_rate: float = 2e-4
    room_rate: float = 2e-3
    pick_rate: float = 1e-4
    warmup: float = 0.1
    weight_decay: float = 1e-4

    def steps(self, examples: int) -> int:
        """Return the steps of a training."""
        return self.epochs * max(examples // self.batch_size, 1)

    def optimizer(self, examples: int, kind: str = "") -> optax.GradientTransformation:
        """Return AdamW with warm-up and cosine; one object per number of steps, so that tasks share compiled steps.

        Args:
          examples: of the training data.
          kind: "lora", "full", "room" or "picked" trains all or a part at a rate of its own; scores do not decay.
        """
        steps, rate = self.steps(examples), {"lora": self.lora_rate, "full": self.full_rate}.get(kind, self.rate)
        tx = _adamw(rate, steps, self.warmup, self.weight_decay)
        if kind == "room":
            return _except_for("shared", _adamw(self.room_rate, steps, self.warmup, self.weight_decay), tx)
        if kind == "picked":
            return _except_for("pick", _adamw(self.pick_rate, steps, self.warmup, 0.0), tx)
        return tx


@functools.cache
def _adamw(rate: float, steps: int, warmup: float, weight_decay: float) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(int(warmup * steps), 1), max(steps, 2))
    return optax.adamw(schedule, weight_decay=weight_decay)


@functools.cache
def _except_for(
    part: str, its: optax.GradientTransformation, others: optax.GradientTransformation
) -> optax.GradientTransformation:
    return optax.partition({True: its, False: others}, lambda params: {name: name == part for name in params})


@dataclasses.dataclass
class Result:
    """What a way reached on a task.

    Attributes:
      accuracy: on the test part, with the weights as they are delivered.
      val: best accuracy on the validation part, over the epochs.
      trained: numbers that were trained, the head included.
      stored: bytes that the task adds to what is delivered, the head included.
      seconds: of training, with validation and compilation.
      notes: further facts.
    """

    task: str
    accuracy: float
    val: float
    trained: int
    stored: int
    seconds: float
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
