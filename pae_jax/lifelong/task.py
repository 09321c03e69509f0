"""`Task`: the data and settings of a task; `Metric`: how its result is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.checks import check_choice, check_flag, check_kind, check_name, takes
from pae_jax.core import State, find
from pae_jax.errors import ArgumentError, found_at, kind_of
from pae_jax.nets import Net, examples, heads
from pae_jax.training import (
    EVAL_BATCH,
    Augment,
    Batch,
    Evaluation,
    Feed,
    Form,
    Loss,
    LossPer,
    Objective,
    accuracy,
    class_numbers,
    evaluate_state,
    feed,
    form,
    in_training,
    kinds_of,
    objective,
    predict,
    require_apart,
)
from pae_jax.trees import abstract

Measure = Callable[[Net, State, str, Any], float]
_WHOLE = 2**31 - 1


@dataclass(frozen=True)
class Metric:
    """The metric of a task, used for goals and for the choice of epochs and pruning ratios.

    Attributes:
      name: name of the metric in tables.
      measure: `(net, state, task, data) -> float`; None takes the accuracy of class numbers. It must not keep a
        reference to the state.
      higher_is_better: False for errors such as a mean absolute error.

    Raises:
      ArgumentError: an accuracy with `higher_is_better=False`, or a measure that is no function of four values.

    Example:
      >>> import pae_jax as pae
      >>> pae.Metric().name
      'accuracy'
    """

    name: str = "accuracy"
    measure: Measure | None = None
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ArgumentError(f"name of a metric must be a non-empty string, found {self.name!r}")
        check_flag("higher_is_better", self.higher_is_better)
        if self.measure is not None and not (callable(self.measure) and takes(self.measure, 4)):
            raise ArgumentError(
                f"measure of metric {self.name!r} must be a function (net, state, task, data) -> float, found "
                f"{kind_of(self.measure)}; a function (outputs, y) -> values goes into pae.MeanOf"
            )
        if self.measure is None and not self.higher_is_better:
            raise ArgumentError("without `measure` the metric is the accuracy, of which more is better")

    def reaches(self, value: float, goal: float, tolerance: float) -> bool:
        """Return whether a value is as good as a goal, or worse by at most the tolerance."""
        rounding = 1e-9 * abs(goal)  # 0.06 + 0.01 is a little less than 0.07
        return self.score(value) + tolerance >= self.score(goal) - rounding

    def score(self, value: float) -> float:
        """Return a score for which higher is better; NaN gives the lowest."""
        if math.isnan(value):
            return -math.inf
        return value if self.higher_is_better else -value


@dataclass(frozen=True)
class MeanOf:
    """A measure that averages one number per example, for `Metric(measure=)`.

    Attributes:
      values: `(outputs, y) -> array (batch,)`. The number of an example depends on no other example, unless the loss
        of the task is of the batch; a measure of all examples together is a function for `Metric(measure=)`.

    Raises:
      ArgumentError: `values` is no function of two values.
      DataError: `values` compares outputs with the labels of other examples, when it is called.

    Example:
      >>> import jax.numpy as jnp, pae_jax as pae
      >>> error = lambda logits, y: jnp.abs(logits[:, 0] - y)
      >>> pae.Metric("mean absolute error", pae.MeanOf(error), higher_is_better=False).name
      'mean absolute error'
    """

    values: Callable[[Any, Any], jax.Array]

    def __post_init__(self) -> None:
        if not (callable(self.values) and takes(self.values, 2)):
            raise ArgumentError(
                f"values of MeanOf must be a function (outputs, y) -> array (batch,), found {kind_of(self.values)}"
            )

    def __call__(self, net: Net, state: State, task: str, data: Any) -> float:
        """Return the mean over data as for `pae.evaluate`."""
        return self.mean(net, state, task, data, "example")

    def mean(self, net: Net, state: State, task: str, data: Any, per: LossPer) -> float:
        """Return the mean over data; `per` says whether numbers of examples may depend on the batch."""
        entry = find(state, task)
        total, count, known = 0.0, 0, []
        # Arrays are passed as one batch, which `predict` splits, so that the task's weights are selected only once.
        for x, y in feed(data, form(net, entry.width, entry.head_spec, False), _WHOLE).epoch(0, None):
            out = predict(net, state, task, x, batch_size=EVAL_BATCH)
            if per == "example" and kinds_of((x, y)) not in known:
                require_apart("MeanOf(values)", self.values, abstract(out), abstract(y))
                known.append(kinds_of((x, y)))
            found = np.asarray(self.values(out, y))
            size = examples(x)
            self.check(found.shape, size)
            total, count = total + float(found.astype(np.float64).sum()), count + size
        return total / count

    def check(self, shape: tuple[int, ...], count: int) -> None:
        """Raise `ArgumentError` unless this is the shape of one number for each of so many examples."""
        if shape != (count,):
            raise ArgumentError(
                f"MeanOf(values) must return one number per example, shape ({count},); found shape {shape}"
            )


@dataclass(frozen=True)
class Task:
    """One task of a lifelong network.

    Attributes:
      name: used once per network.
      head: number of classes, or a Flax module called on the features.
      train: training data, as for `pae.fit`.
      val: validation data, used for every choice; None if no choice is needed.
      test: test data; only for reporting, never for choices.
      loss: as for `pae.fit`; None takes the softmax cross-entropy.
      metric: metric for goals and choices; default accuracy.
      augment: as for `pae.fit`, applied to training batches on the device.
      loss_per: as for `pae.fit`.

    Raises:
      ArgumentError: an empty name, or a metric that is no `Metric`.

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
    loss_per: LossPer = "example"

    def __post_init__(self) -> None:
        check_name(self.name)
        wanted = f"of type Metric for task {self.name!r}: pae.Metric(name, measure)"
        check_kind("metric", self.metric, Metric, wanted)
        check_choice("loss_per", self.loss_per, ("example", "batch"))

    def __repr__(self) -> str:
        parts = ", ".join(part for part in ("train", "val", "test") if getattr(self, part) is not None) or "no"
        return f"Task({self.name!r}, head {self.head!r}, {parts} data, metric {self.metric.name!r})"


def _accuracy_of_classes(logits: Any, labels: Any) -> jax.Array:
    """Return the accuracy of each example, or raise if labels are not class numbers, as a custom loss allows."""
    if not class_numbers(labels) or labels.shape != logits.shape[:-1]:
        raise TypeError("labels without an accuracy; give the task a Metric with `measure`, such as MeanOf")
    return accuracy(logits, labels)


def _one_number(task: Task, value: Any) -> float:
    """Return what a measure has returned as a float, or raise `ArgumentError`."""
    try:
        if np.size(value) == 1 and not isinstance(value, str):
            return float(np.asarray(value).item())
    except (TypeError, ValueError):
        pass
    found = f"shape {np.shape(value)}" if isinstance(value, (np.ndarray, jax.Array)) else kind_of(value)
    raise ArgumentError(
        f"the measure of metric {task.metric.name!r} of task {task.name!r} must return one number, found {found}; "
        "return for example float(values.mean())"
    )


def _fed(task: Task, part: str, form: Form, batch_size: int, how: str = "") -> Feed | None:
    """Return a part of a task's data in batches, whose errors name task and part, and how it is read."""
    data, place = getattr(task, part), f"task {task.name!r}, {part}{how}"
    if data is None:
        return None
    with found_at(place):
        batches = feed(data, form, batch_size)

    def epoch(index: int, key: jax.Array | None) -> Iterator[Batch]:
        with found_at(place):
            yield from batches.epoch(index, key)

    return batches._replace(epoch=epoch)


def require_task(task: Any, name: str = "task") -> None:
    """Raise unless this is a `Task`."""
    check_kind(name, task, Task, "of type Task: pae.Task(name, head, train, val, test)")


@dataclass(frozen=True)
class CheckedTask:
    """A task with checked data.

    Attributes:
      net: the network description.
      task: the task.
      objective: its loss and metrics.
      train, val, test: its data in batches; None if there is none.
      plain: the training data without the augmentation, as a floor measures it; None if that is `train`.
      facts: what its objects and its recipe held when it was checked, for the settings of a run.
    """

    net: Net
    task: Task
    objective: Objective
    train: Feed | None
    val: Feed | None
    test: Feed | None
    plain: Feed | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, net: Net, task: Task, width: float, batch_size: int, floored: bool = False) -> CheckedTask:
        """Check the data of a task; `floored` says whether its metric will be measured on the training data."""
        task = replace(task, head=heads.check_head(task.head))
        wanted = objective(task.loss, task.loss_per, None)
        if task.metric.measure is None and task.loss is not None:
            wanted = replace(wanted, metrics=(("accuracy", _accuracy_of_classes),))
        shape = form(net, width, task.head, task.loss is None, task.augment)
        plain = form(net, width, task.head, task.loss is None)
        train = _fed(task, "train", shape, batch_size)
        val, test = (_fed(task, part, plain, EVAL_BATCH) for part in ("val", "test"))
        measured = None
        if floored and task.augment is not None and isinstance(task.metric.measure, (MeanOf, type(None))):
            measured = _fed(task, "train", plain, batch_size, " without its augmentation, as a floor measures it")
        return cls(net, task, wanted, train, val, test, measured)

    @property
    def training_data(self) -> Feed:
        """The training data; a task that is only measured has none."""
        if self.train is None:
            raise ArgumentError(f"task {self.task.name!r} has no training data")
        return self.train

    def form(self, width: float) -> Form:
        """Return the form of training batches at a width."""
        return form(self.net, width, self.task.head, self.task.loss is None, self.task.augment)

    def check_objective(self, width: float, batch_size: int) -> None:
        """Raise `DataError` if the loss or the metric does not fit the data in arrays."""
        shape = self.form(width)
        plain = shape._replace(augment=None)
        for part, data in (("val", self.val), ("test", self.test)):
            if data is not None and data.arrays is not None:
                with found_at(f"task {self.task.name!r}, {part}"):
                    Evaluation(plain, self.objective).check(data)
                    self._check_measure(plain, data.arrays)
        if self.train is not None and self.train.arrays is not None:
            rows = slice(self.train.size(batch_size))
            batch = abstract(jax.tree.map(lambda leaf: leaf[rows], self.train.arrays))
            with found_at(f"task {self.task.name!r}, train"):
                in_training(shape, self.objective).check(*shape.trained(batch), train=True)

    def _check_measure(self, plain: Form, arrays: Batch) -> None:
        """Raise if a `MeanOf` can be traced, and does not return one number per example, or mixes examples."""
        measure = self.task.metric.measure
        if not isinstance(measure, MeanOf):
            return
        x, y = abstract(arrays)
        try:
            out = plain.output(x)
            found = jax.eval_shape(measure.values, out, y)
        except Exception:  # a function of NumPy arrays
            return
        measure.check(jnp.shape(found), examples(x))
        if self.task.loss_per == "example":
            require_apart(f"the metric {self.task.metric.name!r}", measure.values, out, y)

    def check_accuracy(self, part: Feed | None, width: float) -> None:
        """Raise `ArgumentError` if the metric is the accuracy but the data in arrays has none."""
        if self.task.metric.measure is not None or part is None or part.arrays is None:
            return
        x, y = part.arrays
        output = self.form(width)._replace(augment=None).output(x) if self.task.augment is None else None
        classes = class_numbers(y)
        if not classes or (output is not None and y.shape[1:] != getattr(output, "shape", (0,))[1:-1]):
            raise ArgumentError(
                f"task {self.task.name!r} has labels without an accuracy; give it a Metric with `measure`, such as "
                "MeanOf"
            )
        if self.task.loss is not None and output is not None and y.size:
            low, high, outputs = int(y.min()), int(y.max()), output.shape[-1]
            if low < 0 or high >= outputs:
                raise ArgumentError(
                    f"task {self.task.name!r} has labels in {low}..{high} and {outputs} outputs, so the accuracy "
                    "counts some labels as wrong whatever the outputs; give it a Metric with `measure`, such as MeanOf"
                )

    def measured(self, state: State, part: str) -> float:
        """Return the metric of the task on "train", "val" or "test" data."""
        task, data = self.task, getattr(self, part)
        if part == "train" and self.plain is not None:
            data = self.plain
        if task.metric.measure is None:
            return evaluate_state(self.net, state, task.name, data, self.objective)["accuracy"]
        if isinstance(task.metric.measure, MeanOf):
            return task.metric.measure.mean(self.net, state, task.name, data, task.loss_per)
        return _one_number(task, task.metric.measure(self.net, state, task.name, getattr(task, part)))
