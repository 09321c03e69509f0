"""Metrics of a sequence of tasks, from one matrix of accuracies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pae_jax.checks import check_mapping
from pae_jax.errors import ArgumentError, UnknownTaskError, kind_of


class AccuracyMatrix:
    """R[i, j]: accuracy on task j measured after task i was learned.

    Entries that were not measured are NaN. The arguments are never modified, and metrics that the matrix does not
    define are NaN, never 0.

    Args:
      tasks: names in order of learning.
      values: (T, T) accuracies in [0, 1] to start from; None starts empty.

    Raises:
      ArgumentError: a repeated name, another shape, or a value that is no number in [0, 1].

    Example:
      >>> import pae_jax as pae
      >>> matrix = pae.metrics.AccuracyMatrix(["a", "b"])
      >>> matrix.record(after="a", on="a", accuracy=0.9)
      >>> matrix.record(after="b", on="a", accuracy=0.8)
      >>> matrix.record(after="b", on="b", accuracy=0.7)
      >>> round(matrix.average_accuracy(), 3), round(matrix.backward_transfer(), 3), round(matrix.forgetting(), 3)
      (0.75, -0.1, 0.1)
    """

    def __init__(self, tasks: Sequence[str], values: Any = None):
        self.tasks = tuple(tasks)
        if len(set(self.tasks)) != len(self.tasks) or not self.tasks:
            raise ArgumentError(f"tasks must be distinct names, at least one; found {list(self.tasks)}")
        shape = (len(self.tasks), len(self.tasks))
        self._values = _accuracies("values", np.full(shape, np.nan) if values is None else values, shape)

    @property
    def values(self) -> np.ndarray:
        """A copy of R, float64 (T, T)."""
        return self._values.copy()

    def record(self, after: str, on: str, accuracy: float) -> None:
        """Enter the accuracy in [0, 1] on task `on`, measured after task `after` was learned."""
        self._values[self._index(after), self._index(on)] = _accuracies("accuracy", accuracy, ())

    def average_accuracy(self) -> float:
        """`mean_j R[T-1, j]`: accuracy over all tasks at the end (Lopez-Paz and Ranzato, 2017)."""
        return float(self._values[-1].mean())

    def learning_accuracy(self) -> float:
        """`mean_j R[j, j]`: accuracy on each task when it was learned."""
        return float(np.diag(self._values).mean())

    def backward_transfer(self) -> float:
        """BWT, `mean_{j<T-1} (R[T-1, j] - R[j, j])`; NaN for one task (Lopez-Paz and Ranzato, 2017)."""
        return _mean((self._values[-1] - np.diag(self._values))[:-1])

    def forgetting(self) -> float:
        """`mean_{j<T-1} (max_{l<T-1} R[l, j] - R[T-1, j])`, negative if tasks got better (Chaudhry et al., 2018).

        The maximum is over the rows before the last in which task j was measured; NaN for one task.
        """
        best = [_max(self._values[:-1, j]) for j in range(len(self.tasks) - 1)]
        return _mean(np.asarray(best) - self._values[-1, :-1])

    def forward_transfer(self, random_init: Mapping[str, float] | None = None) -> float:
        """FWT, `mean_{j>=1} (R[j-1, j] - b_j)` (Lopez-Paz and Ranzato, 2017).

        A task with its own head cannot be measured before it is packed, so with a head per task R[j-1, j] is NaN and so
        is FWT. `random_init` holds b_j, the accuracies at random initialisation, by task.
        """
        if random_init is None:
            return math.nan
        _require_tasks("random_init", random_init, self.tasks[1:])
        above = np.diag(self._values, k=1)
        return _mean(above - np.asarray([random_init[task] for task in self.tasks[1:]]))

    def intransigence(self, single_task: Mapping[str, float]) -> float:
        """`mean_j (a*_j - R[j, j])`, with a*_j the accuracy of the task's own network (Chaudhry et al., 2018).

        Args:
          single_task: a*_j in [0, 1] by task; all tasks must be there.
        """
        _require_tasks("single_task", single_task, self.tasks)
        return float(np.mean([single_task[task] for task in self.tasks]) - self.learning_accuracy())

    def __str__(self) -> str:
        width = max(8, *(len(task) for task in self.tasks))
        head = " " * (width + 6) + " ".join(f"{task:>{width}}" for task in self.tasks)
        rows = [
            f"after {task:<{width}}" + " ".join(f"{'.' if np.isnan(v) else format(v, '.3f'):>{width}}" for v in row)
            for task, row in zip(self.tasks, self._values, strict=True)
        ]
        return "\n".join([head, *rows])

    def plot(self) -> Any:
        """Return a matplotlib figure of the matrix; needs the `plot` extra."""
        from pae_jax.reports import Picture

        size = 1.6 + 0.55 * len(self.tasks)
        figure = Picture(size + 0.8, size)
        axes = figure.subplots()
        image = axes.imshow(self._values, vmin=0.0, vmax=1.0, cmap="viridis")
        for (i, j), value in np.ndenumerate(self._values):
            if not np.isnan(value):
                colour = "white" if value < 0.6 else "black"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
        ticks = range(len(self.tasks))
        axes.set_xticks(ticks, self.tasks, rotation=45, ha="right")
        axes.set_yticks(ticks, self.tasks)
        axes.set(xlabel="accuracy on", ylabel="after learning")
        figure.colorbar(image, ax=axes, shrink=0.8)
        return figure

    def _index(self, task: str) -> int:
        if task not in self.tasks:
            raise UnknownTaskError(task, list(self.tasks), "the matrix")
        return self.tasks.index(task)


def _accuracies(name: str, given: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return numbers in [0, 1], or NaN, of a shape; raise `ArgumentError` for any other."""
    try:
        values = np.array(given, np.float64)
    except (TypeError, ValueError):
        raise ArgumentError(f"{name} must be numbers of shape {shape}, found {kind_of(given)}") from None
    if values.shape != shape:
        raise ArgumentError(f"{name} must have shape {shape}, found {values.shape}")
    outside = values[~np.isnan(values) & ~((values >= 0.0) & (values <= 1.0))]
    if outside.size:
        raise ArgumentError(f"accuracies lie in [0, 1], found {float(outside.ravel()[0])}")
    return values


def _require_tasks(name: str, accuracies: Mapping[str, float], tasks: Sequence[str]) -> None:
    known = check_mapping(name, accuracies, "{task: accuracy}")
    missing = [task for task in tasks if task not in known]
    if missing:
        raise ArgumentError(f"{name} lacks {missing}")
    _accuracies(name, [known[task] for task in tasks], (len(tasks),))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else math.nan


def _max(values: np.ndarray) -> float:
    measured = values[~np.isnan(values)]
    return float(measured.max()) if measured.size else math.nan
