"""Losses of face tasks, each usable as `loss=` of `fit` and `evaluate`; equal settings compare equal.

Plain softmax cross-entropy is the default loss of `pae.fit`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.errors import ArgumentError, DataError, StructureError
from pae_jax.faces.angular import AngularHead as AngularHead
from pae_jax.faces.angular import ASoftmax as ASoftmax
from pae_jax.training import Loss
from pae_jax.training import softmax_cross_entropy as softmax


def class_weights(counts: Sequence[int]) -> tuple[float, ...]:
    """Weight classes by inverse frequency: w_c = (T - n_c) / n_c, with T the sum of all n_c.

    Args:
      counts: training examples of each class, n_c, at least 1 each, 2 classes or more.

    Returns:
      One weight per class; 1 for a class that makes up half of the examples.

    Raises:
      DataError: a class without examples, or fewer than 2 classes.

    Example:
      >>> class_weights([50, 25, 25])
      (1.0, 3.0, 3.0)

    Source: Hung et al., ICMR 2019 (PAE), expression task.
    """
    numbers = np.asarray(counts)
    if numbers.ndim != 1 or len(numbers) < 2 or not (np.isfinite(numbers) & (numbers > 0)).all():
        raise DataError(f"counts: found {list(counts)}, expected the examples of 2 classes or more, none of them empty")
    return tuple(float(weight) for weight in (numbers.sum() - numbers) / numbers)


@dataclass(frozen=True)
class WeightedSoftmax:
    """Softmax cross-entropy, each example weighted by its class.

    With normalise="batch" the loss of a batch is mean(w_y · CE), as PAE has it: rare classes make the loss larger. With
    normalise="weights" it is sum(w_y · CE) / sum(w_y) over the batch, as torch and CPG have it; `evaluate`, which
    takes the loss of one example at a time, then gives the plain cross-entropy.

    Attributes:
      weights: one per class, each at least 0 and not all 0; `class_weights` makes some.
      normalise: divisor of the sum over the batch: "batch" its size, "weights" the sum of its weights.

    Raises:
      ArgumentError: weights or normalise out of range.

    Example:
      >>> loss = WeightedSoftmax(class_weights([50, 25, 25]))
      >>> [round(float(value), 3) for value in loss(jnp.zeros((2, 3)), jnp.array([0, 2]))]
      [1.099, 3.296]

    Source: Hung et al., ICMR 2019 (PAE); Hung et al., NeurIPS 2019 (CPG).
    """

    weights: tuple[float, ...]
    normalise: Literal["batch", "weights"] = "batch"

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
        if not all(0 <= weight < math.inf for weight in self.weights) or not sum(self.weights) > 0:
            raise ArgumentError(f"weights must be finite, at least 0 and not all 0, found {self.weights}")
        if self.normalise not in ("batch", "weights"):
            raise ArgumentError(f"normalise must be 'batch' or 'weights', found {self.normalise!r}")

    def __call__(self, logits: jax.Array, y: jax.Array) -> jax.Array:
        """Return the weighted loss of each example, or the weighted mean of all for normalise="weights"."""
        _require_outputs("WeightedSoftmax", logits, len(self.weights))
        weights = jnp.asarray(self.weights, jnp.float32)[y.astype(jnp.int32)]
        losses = weights * softmax(logits, y)
        if self.normalise == "batch":
            return losses
        total = weights.sum()
        return losses.sum() / jnp.where(total > 0, total, 1.0)


def prelogits_norm(features: jax.Array) -> jax.Array:
    """Return sum_i | |e_i| + 1e-4 | of each example's features e, (batch, n) to (batch,).

    Args:
      features: input of the head, before any normalisation.

    Returns:
      float32 (batch,).

    Example:
      >>> round(float(prelogits_norm(jnp.array([[3.0, -4.0]]))[0]), 4)
      7.0002

    Source: D. Sandberg's facenet (prelogits_norm_p = 1); used by PAE while pruning the face task.
    """
    return (jnp.abs(features.astype(jnp.float32)) + 1e-4).sum(axis=-1)


class FeatureHead(nn.Dense):
    """A linear head that also passes the features to the loss: in training its output is [logits, features].

    This holds only in training: `predict` and `evaluate` get the plain logits, so accuracy and label checks work as for
    any head. Its variables are those of the default head. Give it to `pack`: `head=FeatureHead(8631)`; loading a
    stage needs it again: `pae.load(net, path, heads={"face": FeatureHead(8631)})`.

    Args:
      features: number of classes (the name comes from `flax.linen.Dense`).

    Example:
      >>> head = FeatureHead(10)
      >>> variables = head.init(jax.random.key(0), jnp.ones((2, 512)), train=False)
      >>> [head.apply(variables, jnp.ones((2, 512)), train=train).shape for train in (True, False)]
      [(2, 522), (2, 10)]
    """

    def __call__(self, inputs: jax.Array, train: bool = False) -> Any:
        """Return the logits, and in training the inputs after them."""
        logits = super().__call__(inputs)
        return jnp.concatenate([logits, inputs.astype(logits.dtype)], axis=-1) if train else logits


@dataclass(frozen=True)
class PrelogitsNorm:
    """A loss of the logits plus weight · `prelogits_norm` of the features; needs `FeatureHead`.

    In `evaluate` the head returns only logits, and the loss is computed without the norm. `fit` refuses a head that
    returns only logits in training, because it would train without the norm.

    Attributes:
      classes: outputs of the head.
      weight: of the norm; 5e-4 in PAE while the face task is pruned.
      loss: of logits and labels; its default is softmax cross-entropy.

    Raises:
      ArgumentError: a weight below 0.
      StructureError: in training, when there are no features.

    Example:
      >>> loss = PrelogitsNorm(classes=2, weight=0.5)
      >>> out = jnp.array([[0.0, 0.0, 3.0, -4.0]])  # two logits, two features
      >>> round(float((loss(out, jnp.array([0])) - softmax(out[:, :2], jnp.array([0])))[0]), 3)
      3.5
    """

    classes: int
    weight: float = 5e-4
    loss: Loss = softmax

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ArgumentError(f"weight must be finite and at least 0, found {self.weight!r}")

    def __call__(self, logits: jax.Array, y: jax.Array) -> jax.Array:
        """Return the loss of each example; of plain logits without the norm."""
        if logits.shape[-1] < self.classes:
            _require_outputs("PrelogitsNorm", logits, self.classes)
        losses = self.loss(logits[..., : self.classes], y)
        features = logits[..., self.classes :]
        return losses + self.weight * prelogits_norm(features) if features.shape[-1] else losses

    def check_training(self, logits: Any) -> None:
        """Raise `StructureError` if a head returns no features in training."""
        if logits.shape[-1] <= self.classes:
            hint = f"Pack the task with head=FeatureHead({self.classes})."
            raise StructureError("PrelogitsNorm", "", "a batch of logits alone", "logits and features", hint)


def expected_age(logits: jax.Array, ages: Sequence[float]) -> jax.Array:
    """Return the mean of the ages under the softmax of the logits, sum_j ages_j · p_j.

    Args:
      logits: (batch, n).
      ages: age in years that each output stands for, n of them; 1, 2, ..., 100 in PAE.

    Returns:
      float32 (batch,), in years.

    Raises:
      StructureError: not as many logits as ages.

    Example:
      >>> expected_age(jnp.zeros((1, 3)), [10, 20, 60]).tolist()
      [30.0]

    Source: Rothe et al. 2015 (DEX); Hung et al., ICMR 2019 (PAE).
    """
    _require_outputs("expected_age", logits, len(ages))
    return (jax.nn.softmax(logits.astype(jnp.float32), axis=-1) * jnp.asarray(ages, jnp.float32)[None]).sum(axis=-1)


@dataclass(frozen=True)
class AgeError:
    """Absolute error of the expected age, in years: `evaluate(..., loss=AgeError(ages))["loss"]` is the MAE.

    Labels are class numbers j, which stand for ages_j, if they are integers; floats are the true ages in years.

    Attributes:
      ages: age in years that each output stands for, rising.

    Raises:
      ArgumentError: ages that do not rise.

    Example:
      >>> AgeError((10, 20, 60))(jnp.zeros((2, 3)), jnp.array([1, 2])).tolist()
      [10.0, 30.0]
    """

    ages: tuple[float, ...] = tuple(float(age) for age in range(1, 101))

    def __post_init__(self) -> None:
        object.__setattr__(self, "ages", tuple(float(age) for age in self.ages))
        if not np.isfinite(self.ages).all() or len(self.ages) < 2 or not (np.diff(self.ages) > 0).all():
            raise ArgumentError(f"ages must be 2 or more rising values, found {self.ages}")

    def __call__(self, logits: jax.Array, y: jax.Array) -> jax.Array:
        """Return |expected age - true age| of each example, float32 (batch,)."""
        return jnp.abs(expected_age(logits, self.ages) - self.true_age(y))

    def true_age(self, y: jax.Array) -> jax.Array:
        """Return labels in years."""
        if jnp.issubdtype(y.dtype, jnp.floating):
            return y.astype(jnp.float32)
        return jnp.asarray(self.ages, jnp.float32)[y.astype(jnp.int32)]

    def nearest_class(self, y: jax.Array) -> jax.Array:
        """Return labels as output indices; of two equally near ages, the lower."""
        if not jnp.issubdtype(y.dtype, jnp.floating):
            return y.astype(jnp.int32)
        ages = jnp.asarray(self.ages, jnp.float32)
        return jnp.argmin(jnp.abs(ages[None] - y.astype(jnp.float32)[:, None]), axis=-1)


@dataclass(frozen=True)
class ExpectedAge(AgeError):
    """Softmax cross-entropy plus weight · |expected age - true age|, per example.

    Labels as for `AgeError`; the class of a true age is the nearest of `ages`.

    Attributes:
      ages: age in years that each output stands for, rising; default 1, 2, ..., 100.
      weight: of the absolute error, in 1 / years; 1 in PAE.

    Raises:
      ArgumentError: ages that do not rise, or a weight below 0.

    Example:
      >>> round(float(ExpectedAge((10, 20, 60))(jnp.zeros((1, 3)), jnp.array([1]))[0]), 3)
      11.099

    Source: Hung et al., ICMR 2019 (PAE), with ages in years in place of folder numbers.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weight < math.inf:
            raise ArgumentError(f"weight must be finite and at least 0, found {self.weight!r}")

    def __call__(self, logits: jax.Array, y: jax.Array) -> jax.Array:
        """Return the loss of each example, float32 (batch,)."""
        return softmax(logits, self.nearest_class(y)) + self.weight * super().__call__(logits, y)


def _require_outputs(what: str, logits: jax.Array, expected: int) -> None:
    if logits.shape[-1] != expected:
        raise StructureError(what, "", f"{logits.shape[-1]} outputs of the head", f"{expected}")
