"""`Task`: what there is to learn; `Metric`: how well it was learned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax import heads
from pae_jax.batching import feed
from pae_jax.errors import ArgumentError
from pae_jax.evaluation import EVAL_BATCH, evaluate, predict
from pae_jax.network import Net
from pae_jax.state import State, find
from pae_jax.training import Augment, Loss

Measure = Callable[[Net, State, str, Any], float]
_WHOLE = 2**31 - 1


@dataclass(frozen=True)
class Metric:
    """What counts as doing a task well; goals and the choice of epochs and ratios go by it.

    Attributes:
      name: as it stands in tables.
      measure: `(net, state, task, data) -> float`; None takes the accuracy of `pae.evaluate`. It must not keep the
        state.
      higher_is_better: False for errors such as a mean absolute error.

    Raises:
      ArgumentError: an accuracy of which less is better.

    Example:
      >>> import pae_jax as pae
      >>> pae.Metric().name
      'accuracy'
    """

    name: str = "accuracy"
    measure: Measure | None = None
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if self.measure is None and not self.higher_is_better:
            raise ArgumentError("without `measure` the metric is the accuracy, of which more is better")

    def of(self, net: Net, state: State, task: str, data: Any, loss: Loss | None) -> float:
        """Measure a task on data."""
        if self.measure is not None:
            return float(self.measure(net, state, task, data))
        scores = evaluate(net, state, task, data, loss=loss)
        if "accuracy" not in scores:
            raise ArgumentError(_no_accuracy(task))
        return scores["accuracy"]

    def reaches(self, value: float, goal: float, tolerance: float) -> bool:
        """Say whether a value is as good as a goal, or worse by no more than the tolerance."""
        rounding = 1e-9 * abs(goal)  # 0.06 + 0.01 is a little less than 0.07
        return self.score(value) + tolerance >= self.score(goal) - rounding

    def score(self, value: float) -> float:
        """Return a value such that higher is better; NaN is worst."""
        if math.isnan(value):
            return -math.inf
        return value if self.higher_is_better else -value


@dataclass(frozen=True)
class MeanOf:
    """A measure that averages a number per example, for `Metric(measure=)`.

    Attributes:
      values: `(logits, y) -> array (batch,)`.

    Example:
      >>> import jax.numpy as jnp, pae_jax as pae
      >>> error = lambda logits, y: jnp.abs(logits[:, 0] - y)
      >>> pae.Metric("mean absolute error", pae.MeanOf(error), higher_is_better=False).name
      'mean absolute error'
    """

    values: Callable[[jax.Array, jax.Array], jax.Array]

    def __call__(self, net: Net, state: State, task: str, data: Any) -> float:
        """Return the mean over data as for `pae.evaluate`."""
        entry = find(state, task)
        _, logits = heads.layout(net, entry.head_spec, entry.width)
        total, count = 0.0, 0
        # Arrays come as one batch, which `predict` cuts: it selects the task's weights once for all of them.
        for x, y in feed(net, data, logits, _WHOLE, class_labels=False).epoch(0, None):
            found = np.asarray(self.values(predict(net, state, task, x, batch_size=EVAL_BATCH), y))
            if found.shape != (len(y),):
                raise ArgumentError(
                    f"MeanOf(values) must return one number per example, shape ({len(y)},); found shape {found.shape}"
                )
            total, count = total + float(found.astype(np.float64).sum()), count + len(y)
        return total / count


@dataclass(frozen=True)
class Task:
    """One task of a lifelong network.

    Attributes:
      name: used once per network.
      head: number of classes, or a Flax module called on the features.
      train: training data, as for `pae.fit`.
      val: validation data, which every choice is made by; None if nothing is to be chosen.
      test: test data; only ever measured, never chosen by.
      loss: as for `pae.fit`; None takes the softmax cross-entropy.
      metric: what goals and choices go by.
      augment: `(key, x) -> x`, applied to training batches on the device.

    Raises:
      ArgumentError: an empty name.

    Example:
      >>> import numpy as np, pae_jax as pae
      >>> x, y = np.zeros((8, 4), np.float32), np.zeros(8, np.int32)
      >>> pae.Task("age", head=8, train=(x, y), val=(x, y)).metric.name
      'accuracy'
    """

    name: str
    head: Any
    train: Any
    val: Any = None
    test: Any = None
    loss: Loss | None = None
    metric: Metric = Metric()
    augment: Augment | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ArgumentError(f"a task's name is a non-empty string, found {self.name!r}")

    def check_accuracy(self, data: Any, logits: Any) -> None:
        """Raise `ArgumentError` where arrays `(x, y)` have no accuracy and the metric takes it."""
        y = data.get("label") if isinstance(data, dict) else data[1] if isinstance(data, tuple) else None
        if self.metric.measure is not None or y is None:
            return
        labels = y if hasattr(y, "dtype") else np.asarray(y)
        classes = jnp.issubdtype(labels.dtype, jnp.integer) or labels.dtype == jnp.bool_
        if not classes or labels.shape[1:] != logits.shape[1:-1]:
            raise ArgumentError(_no_accuracy(self.name))


def _no_accuracy(task: str) -> str:
    return f"task {task!r} has labels without an accuracy; give it a Metric with `measure`, such as MeanOf"
