"""Check user data and cut it into batches: arrays, factories of batches, or iterables such as Grain datasets."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.caching import Cache
from pae_jax.checks import check_count, takes
from pae_jax.errors import ArgumentError, DataError, kind_of
from pae_jax.nets import Net, examples, heads, owned, read_inputs, refuse_masks, require_range, task_function
from pae_jax.trees import Tree, flatten, sketch

Batch = tuple[Tree, Tree]
Augment = Callable[..., Any]
"""`(key, x) -> x` or `(key, x, y) -> (x, y)`, compiled into the step."""
_LABELS = ("label", "labels")
_WEIGHTS = {"weight", "weights", "sample_weight", "sample_weights", "mask"}
_OUTPUTS = Cache(64)


class Feed(NamedTuple):
    """Checked data.

    Attributes:
      epoch: `(epoch, key) -> iterator of (x, y)`; with key None the batches are in order and complete.
      steps: batches per epoch of training, None if unknown.
      arrays: `(x, y)` if the data is arrays, None otherwise.
      order: with arrays, `(epoch, key) -> positions (steps, batch)` of the batches that `epoch` gives.
    """

    epoch: Callable[[int, jax.Array | None], Iterator[Batch]]
    steps: int | None
    arrays: Batch | None = None
    order: Callable[[int, jax.Array], np.ndarray] | None = None

    def size(self, batch_size: int) -> int:
        """Return the batch size for training: the requested one, at most the number of examples."""
        return batch_size if self.arrays is None else min(batch_size, examples(self.arrays))


class Form(NamedTuple):
    """What a batch must look like.

    Attributes:
      net: the network, for the shapes and dtypes that inputs must have.
      width: its width.
      head: the task's head, for the shape and range of labels.
      classes: whether labels must be class numbers (the default loss needs them).
      augment: `(key, x, y) -> (x, y)`; its output must fit the network; the raw batch may have any form.
      keeps_labels: whether the augmentation does not change the labels.
    """

    net: Net
    width: float
    head: Any
    classes: bool
    augment: Augment | None = None
    keeps_labels: bool = True

    def output(self, x: Tree, train: bool = False) -> Tree:
        """Return the task's abstract output for inputs; a user's head may return more in training."""
        shapes = jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, s.dtype), x, self.net.sample)

        def make() -> Tree:
            layout, (variables, _) = self.net.layout(self.width), heads.layout(self.net, self.head, self.width)
            apply = task_function(self.net, self.width, self.head, train)
            return jax.eval_shape(apply, layout.shared, layout.local, variables, shapes)

        train = train and not isinstance(self.head, int)
        sizes = [leaf.shape for leaf in jax.tree.leaves(shapes)]
        return _OUTPUTS.get((self.net, self.width, heads.key_of(self.head), sizes, train), make)

    def trained(self, batch: Batch) -> Batch:
        """Return what the loss gets of an abstract batch in training: outputs, and labels after the augmentation."""
        x, y = batch if self.augment is None else jax.eval_shape(self.augment, jax.random.key(0), *batch)
        return self.output(x, train=True), y


def form(net: Net, width: float, head: Any, classes: bool, augment: Augment | None = None) -> Form:
    """Return the form of a task's batches."""
    if augment is None:
        return Form(net, width, head, classes)
    if takes(augment, 2):
        return Form(net, width, head, classes, _InputsAlone(augment))
    if takes(augment, 3):
        return Form(net, width, head, classes, augment, False)
    raise ArgumentError(f"augment must be (key, x) -> x or (key, x, y) -> (x, y), found {kind_of(augment)}")


@dataclass(frozen=True)
class _InputsAlone:
    """An augmentation `(key, x) -> x` as `(key, x, y) -> (x, y)`."""

    augment: Augment

    def __call__(self, key: jax.Array, x: Tree, y: Tree) -> Batch:
        augment: Any = self.augment
        return augment(key, x), y


def feed(data: Any, form: Form, batch_size: int) -> Feed:
    """Turn data into batches.

    Args:
      data: arrays `(x, y)` or `{"image": x, "label": y}`; a factory `epoch -> iterator of batches`; an iterable of
        batches that can be read again for each epoch, such as a list or a Grain dataset; or a `Feed`, which is returned
        unchanged.
      form: what a batch must look like.
      batch_size: examples per batch; ready-made batches keep their size.

    Raises:
      DataError: empty data, x and y of different lengths, NaN or infinity, labels outside the head's range.
      StructureError: inputs of a wrong shape or dtype.
    """
    if isinstance(data, Feed):
        return data
    batch_size = check_count("batch_size", batch_size, 1)
    if _is_arrays(data):
        x, y = jax.tree.map(np.asarray, _checked(form, data, "data"))
        return _array_feed(x, y, batch_size)
    make: Callable[[int], Iterable[Any]]
    if callable(data):
        if not takes(data, 1):
            raise DataError(
                f"data: {kind_of(data)} must take the number of the epoch and return its batches: lambda epoch: ..."
            )
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
        # The data has its own order; for evaluation, a stream of ours that drops a remainder yields all examples.
        complete = getattr(data, "complete", None) if key is None else None
        empty, batches = True, make(index) if complete is None else complete()(index)
        if not isinstance(batches, Iterable):
            raise DataError(f"data gave {kind_of(batches)} in epoch {index}, expected an iterable of batches")
        for number, batch in enumerate(batches):
            empty = False
            # A source may write its next batch into the same arrays.
            yield owned(_checked(form, batch, f"batch {number} of epoch {index}"))
        if empty:
            read_before = index or key is None
            hint = "; an iterator can be read only once: pass a factory `epoch -> iterator`" if read_before else ""
            raise DataError(f"data gave no batch in epoch {index}{hint}")

    return Feed(epoch, _length(data))


def _length(data: Any) -> int | None:
    """Return the number of batches; None if data does not know it, as a stream of unknown length."""
    if not isinstance(data, Sized):
        return None
    try:
        count = len(data)
    except TypeError as error:
        if "infinite" not in str(error):  # as tf.data says it
            return None
        count = sys.maxsize
    if count == sys.maxsize:
        raise DataError("data repeats for ever, so no epoch would end; pass it without repeat()")
    return count


def kinds_of(batch: Batch) -> list[Any]:
    """Return what of a batch decides whether loss and metrics fit it: shapes but for the batch axis, and dtypes."""
    return [(leaf.shape[1:], leaf.dtype) for leaf in jax.tree.leaves(batch)]


def pad(batch: Batch, size: int) -> tuple[Tree, Tree, np.ndarray]:
    """Pad a batch to a size by repeating its first example; return x, y and weights, 0 for the padding."""
    count = examples(batch)
    index = np.concatenate([np.arange(count), np.zeros(max(size - count, 0), np.int64)])
    weights = (np.arange(len(index)) < count).astype(np.float32)
    x, y = jax.tree.map(lambda leaf: np.asarray(leaf)[index], batch)
    return x, y, weights


def _is_arrays(data: Any) -> bool:
    if isinstance(data, Mapping):
        return True
    if not isinstance(data, tuple) or len(data) not in (2, 3):
        return False
    return len(data) == 2 or not all(isinstance(part, (tuple, list, Mapping)) for part in data)


def _array_feed(x: Tree, y: Tree, batch_size: int) -> Feed:
    count = examples((x, y))
    size = min(batch_size, count)
    steps = count // size

    def order(index: int, key: jax.Array) -> np.ndarray:
        # Full batches only: a smaller last one would compile the train step again. The permutation differs between
        # epochs, so no example is always left out.
        seed = np.asarray(jax.random.key_data(jax.random.fold_in(key, index)))
        return np.random.default_rng(seed).permutation(count)[: steps * size].reshape(steps, size)

    def epoch(index: int, key: jax.Array | None) -> Iterator[Batch]:
        if key is None:
            batches: Iterable[Any] = (slice(start, start + size) for start in range(0, count, size))
        else:
            batches = order(index, key)
        for chosen in batches:
            yield jax.tree.map(lambda leaf: leaf[chosen], (x, y))  # noqa: B023

    return Feed(epoch, steps, (x, y), order)


def _checked(form: Form, batch: Any, where: str) -> Batch:
    x, y = _pair(form.net, batch, where)
    x = x if isinstance(form.net.sample, list) else _stacked(x)
    y = _labels(y, form.classes, f"{where}: y")
    if form.augment is None:
        seen = x = jax.tree.map(_native, read_inputs(form.net, x))
    else:
        x = jax.tree.map(lambda leaf: _numbers(leaf, f"{where}: x"), x)
        given = jax.tree.map(_abstract, (x, y))
        try:
            made = jax.eval_shape(form.augment, jax.random.key(0), *given)
        except (TypeError, ValueError, IndexError) as error:
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"{where}: augment fails on x {sketch(given[0])} and y {sketch(given[1])}: {cause}. It is compiled "
                "into the step, so it computes with jax.numpy; what NumPy or Python has to do belongs into the data."
            ) from error
        if not isinstance(made, (tuple, list)) or len(made) != 2:
            raise ArgumentError(f"augment (key, x, y) must return (x, y), found {sketch(made)}")
        seen = made[0]
        read_inputs(form.net, seen)
    for path, leaf in flatten(y).items():
        if np.ndim(leaf) < 1:
            raise DataError(f"{where}: y {path} must have a leading batch axis, found a scalar".replace("  ", " "))
    named = {f"x {path}".strip(): leaf for path, leaf in flatten(x).items()}
    named |= {f"y {path}".strip(): leaf for path, leaf in flatten(y).items()}
    lengths = {name: len(leaf) for name, leaf in named.items()}
    first, *others = lengths
    for name in others:
        if lengths[name] != lengths[first]:
            found = f"{lengths[first]} examples and {name} has {lengths[name]}"
            raise DataError(f"{where}: {first} has {found}; they must be equal")
    if not lengths[first]:
        raise DataError(f"{where}: no examples; at least 1 is needed")
    for name, leaf in named.items():
        _require_finite(leaf, f"{where}: {name}")
    if form.classes and form.keeps_labels:
        _check_classes(y, form.output(seen), where)
    return x, y


def _pair(net: Net, batch: Any, where: str) -> Batch:
    """Return `(x, y)` of a user's batch."""
    if isinstance(batch, Mapping):
        found = f"found {sorted(map(str, batch))}"
        labels = [name for name in _LABELS if name in batch]
        if len(labels) != 1:
            raise DataError(f"{where}: a dict needs 'image' and 'label', {found}")
        rest = {name: leaf for name, leaf in batch.items() if name not in labels}
        inputs = net.sample if isinstance(net.sample, dict) else {}
        unused = sorted(_WEIGHTS & rest.keys() - inputs.keys()) if len(rest) > 1 else []
        for name in unused:
            raise DataError(
                f"{where}: {name!r} would not be used. Pass weights and masks with the labels, 'label': (y, {name}), "
                f"and a loss (outputs, y, {name}) -> losses"
            )
        if isinstance(net.sample, dict) and net.sample.keys() <= rest.keys():
            return {name: rest[name] for name in net.sample}, batch[labels[0]]
        if "image" not in rest and len(rest) != 1:
            raise DataError(f"{where}: a dict needs 'image' and 'label', or the inputs by their names, {found}")
        return rest.get("image", next(iter(rest.values()))), batch[labels[0]]
    if isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        return batch[0], batch[1] if len(batch) == 2 else tuple(batch[1:])
    raise DataError(f"{where}: expected (x, y) or a dict with 'image' and 'label', found {sketch(batch)}")


def _labels(y: Tree, classes: bool, name: str) -> Tree:
    """Return labels as arrays: a list is one array, dicts and tuples contain several.

    Where they are classes, bool is a class number.
    """
    if isinstance(y, Mapping):
        return {key: _labels(part, classes, name) for key, part in y.items()}
    if isinstance(y, tuple) and not hasattr(y, "_fields"):
        return tuple(_labels(part, classes, name) for part in y)
    if isinstance(y, list):
        return _labels(_as_one(y, "y"), classes, name)
    counted = lambda leaf: leaf.astype(np.int32) if classes and leaf.dtype == np.bool_ else leaf  # noqa: E731
    return jax.tree.map(lambda leaf: counted(_numbers(leaf, name)), y)


def _stacked(x: Tree) -> Tree:
    return _as_one(x, "x") if isinstance(x, list) and x and not isinstance(x[0], (dict, tuple)) else x


def _as_one(parts: list[Any], name: str) -> np.ndarray:
    try:
        return np.asarray(parts)
    except ValueError as error:
        raise DataError(f"{name} is a {sketch(parts)}, which are of different shapes and make no array") from error


def _native(leaf: Any) -> Any:
    """Return an array in this machine's byte order."""
    return leaf if leaf.dtype.isnative else leaf.astype(leaf.dtype.newbyteorder("="))


def _numbers(leaf: Any, name: str) -> Any:
    """Return an array in this machine's byte order; raise `DataError` for what JAX would not take as it is."""
    refuse_masks(leaf, name)
    array = leaf if isinstance(leaf, (np.ndarray, jax.Array)) else np.asarray(leaf)
    if array.dtype.kind in "OSUMm":
        raise DataError(f"{name} is an array of dtype {array.dtype}; convert it to numbers, such as class numbers")
    require_range(array, jax.dtypes.canonicalize_dtype(array.dtype), name)
    return _native(array)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))


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


def _check_classes(y: Tree, output: Tree, where: str) -> None:
    """Raise `DataError` unless labels are class numbers of an output, as the default loss needs them."""
    if not hasattr(y, "dtype") or not hasattr(output, "shape") or len(output.shape) < 2:
        found = f"labels {sketch(y)} and outputs {sketch(output)}"
        raise DataError(
            f"{where}: the default loss takes one array of class numbers and one of logits, found {found}; pass loss="
        )
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise DataError(f"{where}: labels must be integers for the default loss, found {y.dtype}; pass loss= else")
    if y.shape[1:] != output.shape[1:-1]:
        wanted = "".join(f", {size}" for size in output.shape[1:-1]) or ","
        raise DataError(f"{where}: labels have shape {y.shape}, expected (batch{wanted})")
    low, high, classes = int(y.min()), int(y.max()), output.shape[-1]
    if low < 0 or high >= classes:
        raise DataError(
            f"{where}: labels lie in {low}..{high}, but the head has {classes} outputs, so 0..{classes - 1} is valid. "
            "Renumber the labels, pack the task with a larger head, or pass a loss of your own."
        )
