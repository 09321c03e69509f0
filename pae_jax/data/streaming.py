"""Batches of data larger than memory, through Grain: shuffled for training, in order for evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.data.optional import require
from pae_jax.errors import ArgumentError, DataError

Batch = tuple[Any, np.ndarray]


@dataclass(frozen=True, eq=False)
class Batches:
    """A factory `epoch -> iterator of (x, y)`, as `fit` and `evaluate` take it; made by `batches` and `in_order`.

    Epoch n always gives the same batches, so interrupted training can resume at any epoch. Its length is the number of
    batches in an epoch.

    Attributes:
      source: examples by index.
      batch_size: examples per batch.
      seed: numbers that seed the shuffling; None keeps the order of the source.
      transform: applied to the input of each example; None leaves it unchanged.
      workers: number of loading processes; 0 loads in threads of this process.
      drop_remainder: whether a last batch that is not full is left out.
    """

    source: Any
    batch_size: int
    seed: tuple[int, ...] | None
    transform: Callable[[Any], Any] | None
    workers: int
    drop_remainder: bool

    def __len__(self) -> int:
        full, rest = divmod(len(self.source), self.batch_size)
        return full + (rest > 0 and not self.drop_remainder)

    def complete(self) -> Batches:
        """Return all examples in order, for evaluation."""
        return replace(self, seed=None, drop_remainder=False)

    def __call__(self, epoch: int) -> Iterator[Batch]:
        """Return an iterator over the batches of an epoch, counted from 0."""
        grain = require("grain", "Streaming data")
        examples = grain.MapDataset.source(self.source)
        examples = examples.map_with_index(_Pair(self.transform))
        if self.seed is not None:
            words = np.random.SeedSequence((*self.seed, epoch)).generate_state(1)
            examples = examples.shuffle(seed=int(words[0]))
        # Batches are formed before the work is divided, so they are the same for any number of threads and workers, and
        # read-ahead is counted in batches.
        batched = examples.batch(self.batch_size, drop_remainder=self.drop_remainder, batch_fn=_stack)
        threads = min(os.cpu_count() or 1, 16) if not self.workers else 1
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        loader = batched.to_iter_dataset(options)
        if self.workers:
            _parse_flags()
            loader = loader.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=2)
            )
        return _closing(iter(loader))


def batches(
    source: Any,
    batch_size: int,
    *,
    key_or_seed: jax.Array | int,
    transform: Callable[[Any], Any] | None = None,
    workers: int = 0,
    drop_remainder: bool = True,
) -> Batches:
    """Stream shuffled batches for training.

    Every epoch gives each example once, in an order drawn from the seed and the epoch number, independent of the number
    of workers. Random augmentation belongs on the device: `fit(augment=...)`.

    Args:
      source: anything with a length and access by index, such as an `ImageSource`, a data source of
        tensorflow-datasets or a Grain MapDataset. An example is `(x, y)` or a dict with `image` and `label`.
      batch_size: examples per batch, at least 1.
      key_or_seed: a JAX random key, or an integer of at least 0.
      transform: applied to x of each example, for instance scaling and normalising an image; all results must have the
        same shape. With workers it is sent to other processes.
      workers: 0 loads in threads of this process, which is enough if most of the time is image decoding. A larger
        number loads in that many processes, which start again for every epoch and take a few seconds. A script that
        uses them needs the guard `if __name__ == "__main__":`.
      drop_remainder: whether to leave out a last batch that is not full; a smaller batch compiles the step once more.

    Returns:
      A factory `epoch -> iterator of (x, y)` to hand to `fit`; its `len` is the number of batches.

    Raises:
      ArgumentError: batch_size, seed or workers outside their range.
      DataError: the source is empty, has no length or index, or is smaller than a batch; Grain is missing. While
        iterating: an example of another form, without a label or with NaN or infinity, or examples of different
        shapes.

    Example:
      >>> source = [{"image": np.full((4, 4, 3), i, np.uint8), "label": i % 2} for i in range(10)]
      >>> train = batches(source, 4, key_or_seed=0, transform=lambda image: image / np.float32(255))
      >>> len(train), [(x.shape, x.dtype.name, y.dtype.name) for x, y in train(0)]
      (2, [((4, 4, 4, 3), 'float32', 'int32'), ((4, 4, 4, 3), 'float32', 'int32')])

    Source: Grain, the data loader of the JAX project.
    """
    return _checked(source, batch_size, _seed(key_or_seed), transform, workers, drop_remainder)


def in_order(
    source: Any, batch_size: int, *, transform: Callable[[Any], Any] | None = None, workers: int = 0
) -> Batches:
    """Stream batches for evaluation: every example once, in the order of the source, the last batch smaller.

    Args:
      source: as for `batches`.
      batch_size: examples per batch, at least 1.
      transform: as for `batches`.
      workers: as for `batches`.

    Returns:
      A factory `epoch -> iterator of (x, y)` to hand to `evaluate` or as `val` to `fit`.

    Raises:
      ArgumentError, DataError: as for `batches`.

    Example:
      >>> source = [(np.ones(3, np.float32), i) for i in range(5)]
      >>> [y.tolist() for _, y in in_order(source, 2)(0)]
      [[0, 1], [2, 3], [4]]
    """
    return _checked(source, batch_size, None, transform, workers, False)


def _checked(
    source: Any,
    batch_size: int,
    seed: tuple[int, ...] | None,
    transform: Callable[[Any], Any] | None,
    workers: int,
    drop_remainder: bool,
) -> Batches:
    require("grain", "Streaming data")
    for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ArgumentError(f"{name}: found {value!r}, expected an integer of at least {least}.")
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        raise DataError(f"source: found {type(source).__name__}, expected something with a length and access by index.")
    count = len(source)
    if not count or (drop_remainder and count < batch_size):
        raise DataError(
            f"source: found {count} examples, expected at least {batch_size if drop_remainder else 1}. "
            "A smaller batch_size, or drop_remainder=False, may help."
        )
    return Batches(source, int(batch_size), seed, transform, int(workers), drop_remainder)


def _seed(key_or_seed: jax.Array | int) -> tuple[int, ...]:
    if isinstance(key_or_seed, (int, np.integer)) and not isinstance(key_or_seed, bool) and key_or_seed >= 0:
        return (int(key_or_seed),)
    if isinstance(key_or_seed, jax.Array) and jnp.issubdtype(key_or_seed.dtype, jax.dtypes.prng_key):
        return tuple(np.asarray(jax.random.key_data(key_or_seed)).ravel().tolist())
    raise ArgumentError(f"key_or_seed: found {key_or_seed!r}, expected a key of jax.random.key or an integer >= 0.")


@dataclass(frozen=True)
class _Pair:
    """Map an example to `(transform(x), y)`; a class, so that it can be sent to worker processes."""

    transform: Callable[[Any], Any] | None

    def __call__(self, index: int, example: Any) -> tuple[Any, np.ndarray]:
        if isinstance(example, dict) and {"image", "label"} <= example.keys():
            x, y = example["image"], example["label"]
        elif isinstance(example, (tuple, list)) and len(example) == 2:
            x, y = example
        else:
            found = sorted(map(str, example)) if isinstance(example, dict) else type(example).__name__
            raise DataError(f"example: found {found}, expected (x, y) or a dict with 'image' and 'label'.")
        if y is None:
            raise DataError(
                f"example {index} has no label. Leave unlabelled examples out, or give them one of your own."
            )
        y = np.asarray(y)
        if np.issubdtype(y.dtype, np.integer):
            y = y.astype(np.int32)
        x = jax.tree.map(np.asarray, x if self.transform is None else self.transform(x))
        for leaf in (*jax.tree.leaves(x), y):
            if np.issubdtype(leaf.dtype, np.inexact) and not np.isfinite(leaf).all():
                raise DataError(f"example {index}: found NaN or infinity. Repair or leave it out.")
        return x, y


def _stack(examples: Any) -> Batch:
    try:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *examples)
    except ValueError as error:
        shapes = sorted({str(jax.tree.map(np.shape, example)) for example in examples})
        raise DataError(
            f"the examples of a batch have different shapes: {', '.join(shapes)}. Give them one with transform=, for "
            "instance pae_jax.data.resized."
        ) from error


def _parse_flags() -> None:
    # Grain's worker processes read absl flags, which raise until a command line is parsed; ours may never be parsed.
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _closing(iterator: Any) -> Iterator[Batch]:
    """Yield from a Grain iterator, and stop its threads and processes after the last batch or when it is closed."""
    try:
        yield from iterator
    finally:
        iterator.close()
