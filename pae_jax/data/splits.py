"""Streams of classification tasks from one labelled set: a few classes per task, validation held out of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np

from pae_jax.errors import ArgumentError, DataError

Examples = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class Split:
    """A task: classify a few classes.

    Attributes:
      name: name of the task.
      classes: names of the classes; label i means `classes[i]`.
      train: inputs float32 (n, ..., channels), normalised by `mean` and `std`, and labels int32 (n,).
      val: the same for validation: choosing epochs, sparsity and when to expand.
      test: the same for reporting.
      mean: float32 (channels,), the mean of the training inputs; of uint8 images on the scale 0..1.
      std: float32 (channels,), their standard deviation; 1 for a channel that is constant.
    """

    name: str
    classes: tuple[str, ...]
    train: Examples
    val: Examples
    test: Examples
    mean: np.ndarray
    std: np.ndarray


@dataclass(frozen=True, eq=False)
class Splits(Sequence[Split]):
    """A sequence of `Split` that creates each on access; made by `class_incremental`.

    Until then the inputs stay in their original dtype, so a stream of tasks needs no more memory than its uint8 images.
    A split that is accessed twice is created twice, with the same bits.

    Attributes:
      names: names of the tasks.
      groups: class ids of each task.
      class_names: name of each class id.
      val_fraction: share of each class's training examples held out for validation.
      seed: seed of the held-out part.
    """

    names: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    class_names: dict[int, str]
    val_fraction: float
    seed: int
    _train: Examples = field(repr=False)
    _test: Examples = field(repr=False)

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, index: int) -> Split: ...
    @overload
    def __getitem__(self, index: slice) -> Splits: ...
    def __getitem__(self, index: int | slice) -> Split | Splits:
        if isinstance(index, slice):
            rest = (self.class_names, self.val_fraction, self.seed, self._train, self._test)
            return Splits(self.names[index], self.groups[index], *rest)
        group = self.groups[index]
        x, y = self._train
        val = np.concatenate([_held_out(y, c, self.val_fraction, self.seed) for c in group])
        belongs = np.isin(y, group)
        train = belongs.copy()
        train[val] = False
        mean, std = channel_statistics(x[train])

        def part(x: np.ndarray, y: np.ndarray, chosen: np.ndarray) -> Examples:
            labels = (y[chosen, None] == np.asarray(group)).argmax(axis=1)
            return normalised(x[chosen], mean, std), labels.astype(np.int32)

        return Split(
            self.names[index],
            tuple(self.class_names[c] for c in group),
            part(x, y, train),
            part(x, y, belongs & ~train),
            part(*self._test, np.isin(self._test[1], group)),
            mean.astype(np.float32),
            std.astype(np.float32),
        )


def class_incremental(
    x: Any,
    y: Any,
    groups: Sequence[Sequence[int]] | int,
    *,
    test: tuple[Any, Any],
    names: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
) -> Splits:
    """Split a labelled set into tasks of a few classes each.

    Of the n training examples of each class, `max(1, round(val_fraction * n))`, drawn by a generator of `seed` and the
    class id, are used for validation and never for training. The choice does not depend on the groups, so a single task
    of all classes (joint training) holds out the same examples. Every task is normalised by the mean and standard
    deviation per channel of its training examples. The order of the examples is kept.

    Args:
      x: training inputs (n, ..., channels): uint8, taken as 0..1 after a division by 255, or floats.
      y: their class ids (n,), integers of at least 0.
      groups: the class ids of each task; label i of a task means its i-th class id. Or a number of tasks: all class
        ids in ascending order, cut into that many groups of equal size.
      test: test inputs and class ids in the same form. They are normalised like the rest and otherwise unchanged.
      names: names of the tasks; default "task_1", "task_2", and so on.
      class_names: the name of each class id, from id 0; default the ids themselves.
      val_fraction: share of each class's training examples held out for validation, between 0 and 1.
      seed: seed of the held-out part, at least 0.

    Returns:
      A sequence with one `Split` per group, each created on access.

    Raises:
      DataError: x, y and test do not fit each other, inputs hold NaN or infinity, examples have no label (below 0),
        or a class lacks training or test examples.
      ArgumentError: groups, names, `val_fraction` or `seed` are outside their range.

    Example:
      >>> x = np.random.default_rng(0).integers(0, 256, (60, 4, 4, 3), np.uint8)
      >>> y = np.arange(60) % 6
      >>> stream = class_incremental(x, y, 3, test=(x, y), class_names=list("abcdef"))
      >>> len(stream), stream.names
      (3, ('task_1', 'task_2', 'task_3'))
      >>> split = stream[1]
      >>> split.classes, split.train[0].shape, split.val[1]
      (('c', 'd'), (18, 4, 4, 3), array([1, 0], dtype=int32))
    """
    train, held = _examples(x, y, "x and y"), _examples(*test, "test")
    if train[0].shape[1:] != held[0].shape[1:] or train[0].dtype != held[0].dtype:
        raise DataError(
            f"test: found {held[0].dtype} inputs of shape {held[0].shape[1:]}, expected {train[0].dtype} of shape "
            f"{train[0].shape[1:]} as in training."
        )
    if not isinstance(val_fraction, (int, float)) or not 0.0 < val_fraction < 1.0:
        raise ArgumentError(f"val_fraction: found {val_fraction!r}, expected a share between 0 and 1, both excluded.")
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ArgumentError(f"seed: found {seed!r}, expected an integer of at least 0.")
    ids = _groups(groups, train[1])
    names = tuple(names) if names is not None else tuple(f"task_{i + 1}" for i in range(len(ids)))
    if len(names) != len(ids) or len(set(names)) != len(names):
        raise ArgumentError(f"names: found {list(names)}, expected {len(ids)} different names, one per group.")
    titles = {c: str(c) for group in ids for c in group}
    if class_names is not None:
        if max(titles) >= len(class_names):
            raise ArgumentError(
                f"class_names: found {len(class_names)} names, expected one for class id {max(titles)}."
            )
        titles = {c: str(class_names[c]) for c in titles}
    for c, title in titles.items():
        trains, tests = int((train[1] == c).sum()), int((held[1] == c).sum())
        if trains - _validates(trains, val_fraction) < 1 or tests < 1:
            raise DataError(
                f"class {c} ({title}) has {trains} training and {tests} test examples; it needs at least 1 to train, "
                f"1 to validate (val_fraction {val_fraction}) and 1 to test."
            )
    return Splits(names, ids, titles, float(val_fraction), int(seed), train, held)


def normalised(images: np.ndarray, mean: Any, std: Any) -> np.ndarray:
    """Return `(x - mean) / std` per channel, where uint8 images are first divided by 255.

    Args:
      images: (..., channels), uint8 or floats.
      mean: mean of each channel; of uint8 images on the scale 0..1.
      std: standard deviation of each channel, positive; on the same scale.

    Returns:
      float32 array of the same shape.

    Raises:
      DataError: neither uint8 nor floats, or NaN or infinity.
      ArgumentError: not one mean and one positive standard deviation per channel.

    Example:
      >>> normalised(np.full((1, 2, 2, 1), 255, np.uint8), [0.5], [0.25])[0, 0, 0]
      array([2.], dtype=float32)
    """
    images = np.asarray(images)
    _require_dtype(images, "images")
    _require_finite(images, "images")
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    if not mean.shape == std.shape == images.shape[-1:] or not (std > 0).all():
        raise ArgumentError(
            f"mean and std: found {mean} and {std}, expected {images.shape[-1:]} numbers each, std positive."
        )
    x = images.astype(np.float32)
    if images.dtype == np.uint8:
        x /= np.float32(255)
    x -= mean
    x /= std
    return x


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each channel over all examples and pixels.

    `std = sqrt(mean((x - mean)^2))`; uint8 images count as 0..1, exactly, by a histogram.

    Args:
      images: (n, ..., channels), uint8 or floats, at least one.

    Returns:
      float64 arrays (channels,); the standard deviation of a constant channel is returned as 1, so that the channel
      normalises to 0.

    Raises:
      DataError: neither uint8 nor floats, NaN or infinity, or no images.

    Example:
      >>> mean, std = channel_statistics(np.array([[[[0, 9]]], [[[255, 9]]]], np.uint8))
      >>> mean.round(3).tolist(), std.tolist()
      ([0.5, 0.035], [0.5, 1.0])
    """
    images = np.asarray(images)
    _require_dtype(images, "images")
    if images.ndim < 2 or not images.size:
        raise DataError(f"images: found shape {images.shape}, expected (n, ..., channels) with at least one entry.")
    _require_finite(images, "images")
    if images.dtype == np.uint8:
        channels = images.reshape(-1, images.shape[-1])
        counts = np.stack([np.bincount(values, minlength=256) for values in channels.T])
        levels = np.arange(256) / 255
        mean = counts @ levels / len(channels)
        std = np.sqrt((counts * (levels[None] - mean[:, None]) ** 2).sum(axis=1) / len(channels))
    else:
        axes = tuple(range(images.ndim - 1))
        mean, std = images.mean(axes, dtype=np.float64), images.std(axes, dtype=np.float64)
    # A deviation in the last digits of float32 is rounding error, and dividing by it would amplify that error.
    return mean, np.where(std > 1e-6 * np.abs(mean), std, 1.0)


def _require_dtype(images: np.ndarray, place: str) -> None:
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise DataError(
            f"{place}: found {images.dtype}, expected uint8 images or floats; whether other numbers are scaled is "
            "yours to decide, so convert them."
        )


def _require_finite(images: np.ndarray, place: str) -> None:
    """Refuse NaN and infinity, because one such image would spread through the mean to all images."""
    if images.dtype == np.uint8 or np.isfinite(images).all():
        return
    bad = np.flatnonzero(~np.isfinite(images).reshape(len(images), -1).all(axis=1))
    raise DataError(
        f"{place}: found NaN or infinity in {len(bad):,} of {len(images):,} examples, first in example {bad[0]}, "
        "expected finite numbers. Repair these examples or leave them out."
    )


def _examples(x: Any, y: Any, place: str) -> Examples:
    try:
        x, y = np.asarray(x), np.asarray(y)
    except ValueError as error:
        raise DataError(f"{place}: found inputs of different shapes ({error}). Give all of them one shape.") from error
    if x.ndim < 2 or y.shape != x.shape[:1]:
        raise DataError(
            f"{place}: found inputs of shape {x.shape} and labels of shape {y.shape}, expected (n, ..., channels) and "
            "(n,)."
        )
    _require_dtype(x, place)
    _require_finite(x, place)
    if not np.issubdtype(y.dtype, np.integer):
        raise DataError(f"{place}: found labels of dtype {y.dtype}, expected class ids: integers of at least 0.")
    unlabelled = np.flatnonzero(y < 0)
    if unlabelled.size:
        raise DataError(
            f"{place}: found {unlabelled.size:,} labels below 0, first {y[unlabelled[0]]} for example "
            f"{unlabelled[0]}, expected class ids of at least 0. Leave unlabelled examples out: x[y >= 0], y[y >= 0]."
        )
    return x, y


def _groups(groups: Sequence[Sequence[int]] | int, y: np.ndarray) -> tuple[tuple[int, ...], ...]:
    known = np.unique(y)
    if isinstance(groups, (int, np.integer)):
        if groups < 1 or len(known) < groups or len(known) % groups:
            raise ArgumentError(
                f"groups: found {groups}, expected a number that cuts the {len(known)} classes into equal groups."
            )
        return tuple(tuple(map(int, part)) for part in known.reshape(groups, -1))
    ids = tuple(tuple(map(int, group)) for group in groups)
    flat = [c for group in ids for c in group]
    if not ids or not all(ids) or len(set(flat)) != len(flat):
        raise ArgumentError(f"groups: found {ids}, expected class ids for each task, no class twice.")
    missing = sorted(set(flat) - set(known.tolist()))
    if missing:
        raise DataError(f"groups: the classes {missing} have no training examples; known are {known.tolist()}.")
    return ids


def _validates(count: int, fraction: float) -> int:
    return max(1, round(fraction * count))


def _held_out(y: np.ndarray, c: int, fraction: float, seed: int) -> np.ndarray:
    """Return the indices of the validation examples of a class."""
    members = np.flatnonzero(y == c)
    return np.random.default_rng((seed, c)).permutation(members)[: _validates(len(members), fraction)]
