"""Data as users have it, checked and cut into batches: arrays, factories of batches, iterables such as Grain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax import trees
from pae_jax.errors import DataError
from pae_jax.network import Net, check_batch_size, check_inputs
from pae_jax.trees import Tree

Batch = tuple[Tree, Any]


class Feed(NamedTuple):
    """Checked data.

    Attributes:
      epoch: `(epoch, key) -> iterator of (x, y)`; with key None the batches come in order and none is left out.
      steps: batches per epoch of training, None if unknown.
      arrays: `(x, y)` where the data is arrays, None otherwise.
      order: with arrays, `(epoch, key) -> positions (steps, batch)` of the batches that `epoch` gives.
    """

    epoch: Callable[[int, jax.Array | None], Iterator[Batch]]
    steps: int | None
    arrays: Batch | None = None
    order: Callable[[int, jax.Array], np.ndarray] | None = None

    def size(self, batch_size: int) -> int:
        """Return the examples of a training batch where so many are asked for: no more than there are."""
        return batch_size if self.arrays is None else min(batch_size, len(self.arrays[1]))


def feed(
    net: Net,
    data: Any,
    logits: Any,
    batch_size: int,
    class_labels: bool,
    augment: Callable[[jax.Array, Tree], Tree] | None = None,
) -> Feed:
    """Turn data into batches.

    Args:
      net: the network, for the shapes and dtypes that inputs must have.
      data: arrays `(x, y)` or `{"image": x, "label": y}`; a factory `epoch -> iterator of batches`; or an iterable
        of batches that can be read again for each epoch, such as a list or a Grain dataset.
      logits: abstract output of the head, for the shape and range of labels.
      batch_size: examples per batch; batches that the data brings are taken as they are.
      class_labels: whether labels must be class numbers (the default loss needs them).
      augment: `(key, x) -> x`; what it makes of a batch must fit the network, whatever the batch is.

    Raises:
      DataError: empty data, x and y of different lengths, NaN or infinity, labels outside the head's range.
      StructureError: inputs of a wrong shape or dtype.
    """
    batch_size = check_batch_size(batch_size)

    def check(batch: Any, where: str) -> Batch:
        return _checked(net, batch, logits, class_labels, where, augment)

    if _is_arrays(data):
        x, y = check(data, "data")
        return _array_feed(jax.tree.map(np.asarray, x), np.asarray(y), batch_size)
    make: Callable[[int], Iterable[Any]]
    if callable(data):
        make = cast("Callable[[int], Iterable[Any]]", data)
    elif isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
        if iter(data) is data:
            raise DataError(
                "data is an iterator, which can be read only once. Pass a factory `epoch -> iterator` or an iterable."
            )
        make = lambda epoch: iter(data)  # noqa: E731
    else:
        raise DataError(f"data must be (x, y) arrays, a factory of batches or an iterable, found {type(data).__name__}")

    def epoch(index: int, key: jax.Array | None) -> Iterator[Batch]:
        del key  # the data orders itself
        empty = True
        for number, batch in enumerate(make(index)):
            empty = False
            yield check(batch, f"batch {number} of epoch {index}")
        if empty:
            raise DataError(f"data gave no batch in epoch {index}")

    return Feed(epoch, len(data) if isinstance(data, Sized) else None)


def pad(batch: Batch, size: int) -> tuple[Tree, np.ndarray, np.ndarray]:
    """Fill a batch up to a size by repeating its first example; return x, y and weights, 0 for the filling."""
    x, y = jax.tree.map(np.asarray, batch)
    count = len(y)
    index = np.concatenate([np.arange(count), np.zeros(max(size - count, 0), np.int64)])
    weights = (np.arange(len(index)) < count).astype(np.float32)
    return jax.tree.map(lambda leaf: leaf[index], x), y[index], weights


def _is_arrays(data: Any) -> bool:
    if isinstance(data, dict):
        return True
    return isinstance(data, tuple) and len(data) == 2 and not callable(data[0]) and hasattr(data[1], "__len__")


def _array_feed(x: Tree, y: np.ndarray, batch_size: int) -> Feed:
    count = len(y)
    size = min(batch_size, count)
    steps = count // size

    def order(index: int, key: jax.Array) -> np.ndarray:
        # Full batches only: a ragged last one would compile the train step again. The permutation differs from epoch
        # to epoch, so no example stays out.
        seed = np.asarray(jax.random.key_data(jax.random.fold_in(key, index)))
        return np.random.default_rng(seed).permutation(count)[: steps * size].reshape(steps, size)

    def epoch(index: int, key: jax.Array | None) -> Iterator[Batch]:
        if key is None:
            batches: Iterable[Any] = (slice(start, start + size) for start in range(0, count, size))
        else:
            batches = order(index, key)
        for chosen in batches:
            yield jax.tree.map(lambda leaf: leaf[chosen], x), y[chosen]  # noqa: B023

    return Feed(epoch, steps, (x, y), order)


def _checked(net: Net, batch: Any, logits: Any, class_labels: bool, where: str, augment: Any) -> Batch:
    if isinstance(batch, dict):
        missing = {"image", "label"} - batch.keys()
        if missing:
            raise DataError(f"{where}: a dict needs 'image' and 'label', found {sorted(map(str, batch))}")
        x, y = batch["image"], batch["label"]
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        x, y = batch
    else:
        raise DataError(f"{where}: expected (x, y) or a dict with 'image' and 'label', found {type(batch).__name__}")
    x, y = jax.tree.map(_array, x), _array(y)
    if y.ndim < 1:
        raise DataError(f"{where}: y must have a leading batch axis, found a scalar")
    check_inputs(net, x if augment is None else jax.eval_shape(augment, jax.random.key(0), x))
    for path, leaf in trees.flatten(x).items():
        place = f"{where}: x{' ' + path if path else ''}"
        if len(leaf) != len(y):
            raise DataError(f"{place} has {len(leaf)} examples and y has {len(y)}; they must be equal")
        _require_finite(leaf, place)
    if len(y) == 0:
        raise DataError(f"{where}: no examples; at least 1 is needed")
    _require_finite(y, f"{where}: y")
    _check_labels(y, logits, class_labels, where)
    return x, y.astype(np.int32) if y.dtype == np.bool_ else y


def _array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, (np.ndarray, jax.Array)) else np.asarray(leaf)


def _require_finite(leaf: Any, place: str) -> None:
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return
    if leaf.dtype == np.float64:  # the network computes in float32 at most
        with np.errstate(over="ignore"):
            leaf = np.asarray(leaf, np.float32)
    module = jnp if isinstance(leaf, jax.Array) else np
    if bool(module.isfinite(leaf).all()):
        return
    flat = np.asarray(leaf).reshape(len(leaf), -1)
    first = int(np.flatnonzero(~np.isfinite(flat.astype(np.float32)).all(axis=1))[0])
    raise DataError(f"{place} holds NaN or infinity, first in example {first}; remove or repair such examples")


def _check_labels(y: Any, logits: Any, class_labels: bool, where: str) -> None:
    integer = jnp.issubdtype(y.dtype, jnp.integer) or y.dtype == jnp.bool_
    if not integer:
        if class_labels:
            raise DataError(f"{where}: labels must be integers for the default loss, found {y.dtype}; pass loss= else")
        return
    if y.shape[1:] != logits.shape[1:-1]:
        if class_labels:
            wanted = "".join(f", {size}" for size in logits.shape[1:-1]) or ","
            raise DataError(f"{where}: labels have shape {y.shape}, expected (batch{wanted})")
        return
    low, high, classes = int(y.min()), int(y.max()), logits.shape[-1]
    if low < 0 or high >= classes:
        raise DataError(
            f"{where}: labels lie in {low}..{high}, but the head has {classes} outputs, so 0..{classes - 1} is valid. "
            "Renumber the labels, pack the task with a larger head, or pass targets that are no classes as floats."
        )
