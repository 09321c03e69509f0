"""CIFAR-100 and its twenty superclasses as twenty tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from pae_jax.data.decoding import decode_rgb
from pae_jax.data.image_pack import read_pack
from pae_jax.data.optional import require
from pae_jax.data.splits import Splits, class_incremental
from pae_jax.errors import ArgumentError, DataError

SIDE = 32
PARTS = {"train": 0, "test": 2}


class LabelledPart(NamedTuple):
    """Images of one part, with both labels.

    Attributes:
      images: uint8 (n, 32, 32, 3).
      fine: int32 (n,), the class.
      coarse: int32 (n,), the superclass.
    """

    images: np.ndarray
    fine: np.ndarray
    coarse: np.ndarray


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """CIFAR-100, or the requested superclasses of it.

    Attributes:
      train: the training images, in the official order.
      test: the test images.
      fine_names: name of each fine label, 100.
      coarse_names: name of each coarse label, 20.
    """

    train: LabelledPart
    test: LabelledPart
    fine_names: tuple[str, ...]
    coarse_names: tuple[str, ...]


def load_cifar100(
    pack: str | Path | None = None, *, superclasses: Sequence[str] | int | None = None, progress: bool = True
) -> LabelledImages:
    """Load CIFAR-100 from a pack file, or through tensorflow-datasets.

    A pack is a file of `numpy.savez`, see `read_pack`, with the labels `split`, 0 train and 2 test, `fine` and
    `coarse`, and the names `fine_names` and `coarse_names`.

    Args:
      pack: the pack file; None downloads the official file once, which needs internet but not TensorFlow.
      superclasses: decode the images of these superclasses only: their names, or a number of them in alphabetical
        order; None decodes all, which takes about ten seconds.
      progress: show a progress bar while decoding.

    Returns:
      The images with their labels.

    Raises:
      DataError: the pack is missing, truncated, inconsistent or not a pack; an image cannot be decoded or has another
        size; the download failed; or packages are missing.
      ArgumentError: an unknown superclass.

    Example:
      >>> load_cifar100("nowhere.npz")
      Traceback (most recent call last):
        ...
      pae_jax.errors.DataError: nowhere.npz: cannot be read (No such file or directory); expected an .npz file of...

    Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. Ten of its images are in both
    the training and the test part.
    """
    parts, fine_names, coarse_names = _downloaded() if pack is None else _packed(Path(pack))
    wanted = [coarse_names.index(name) for name in _choose(superclasses, coarse_names)]
    chosen = {name: part.only(np.isin(part.coarse, wanted)) for name, part in parts.items()}
    with tqdm(
        total=sum(len(part.fine) for part in chosen.values()),
        desc="decode CIFAR-100",
        unit="image",
        disable=not progress,
        leave=False,
    ) as bar:
        train, test = (chosen[name].decode(bar.update) for name in PARTS)
    return LabelledImages(train, test, fine_names, coarse_names)


def superclass_tasks(
    images: LabelledImages, tasks: Sequence[str] | int | None = None, *, val_fraction: float = 0.1, seed: int = 0
) -> Splits:
    """Split CIFAR-100 into one task per superclass, which classifies its five classes.

    Tasks and the labels inside them are in alphabetical order of the names, as in the published table. Validation is
    held out of the training part; mean and standard deviation are computed from the training images of each task. See
    `class_incremental`.

    Args:
      images: from `load_cifar100`.
      tasks: names of superclasses in the order wanted, or how many of the first ones; None takes all that are loaded.
      val_fraction: share of each class's training images held out for validation, between 0 and 1; 0.1 is 50 of 500.
      seed: seed of the held-out part, at least 0.

    Returns:
      A sequence of `Split`, each created on access: 2,250 train, 250 validation and 500 test images by default.

    Raises:
      DataError: a class belongs to two superclasses, or has too few images.
      ArgumentError: an unknown superclass, or one that is not loaded; other arguments out of range.

    Example:
      >>> labels = np.repeat(np.arange(4), 10).astype(np.int32)
      >>> part = LabelledPart(np.zeros((40, 32, 32, 3), np.uint8), labels, labels // 2)
      >>> images = LabelledImages(part, part, ("rose", "oak", "palm", "elm"), ("trees", "flowers"))
      >>> superclass_tasks(images, ["trees"])[0].classes
      ('oak', 'rose')

    Source: S. C. Y. Hung et al., "Compacting, Picking and Growing for Unforgetting Continual Learning", NeurIPS 2019,
    which validates on the test part; here the test part is for reporting only.
    """
    loaded = tuple(images.coarse_names[c] for c in np.unique(images.train.coarse))
    names = _choose(tasks, loaded)
    groups = []
    for name in names:
        members = np.unique(images.train.fine[images.train.coarse == images.coarse_names.index(name)])
        groups.append(sorted(map(int, members), key=lambda c: images.fine_names[c]))
    members, times = np.unique(np.concatenate(groups), return_counts=True)
    doubled = [images.fine_names[c] for c in members[times > 1]]
    if doubled:
        raise DataError(f"images: the classes {doubled} belong to more than one superclass, expected exactly one.")
    return class_incremental(
        images.train.images,
        images.train.fine,
        groups,
        test=(images.test.images, images.test.fine),
        names=names,
        class_names=images.fine_names,
        val_fraction=val_fraction,
        seed=seed,
    )


class _Encoded(NamedTuple):
    """Images of one part before decoding; `read` returns the encoded image of an index, and `place` its name."""

    numbers: np.ndarray
    fine: np.ndarray
    coarse: np.ndarray
    read: Callable[[int], bytes]
    place: str

    def only(self, chosen: np.ndarray) -> _Encoded:
        return self._replace(numbers=self.numbers[chosen], fine=self.fine[chosen], coarse=self.coarse[chosen])

    def decode(self, update: Callable[[], Any]) -> LabelledPart:
        images = np.empty((len(self.numbers), SIDE, SIDE, 3), np.uint8)
        for row, number in zip(images, self.numbers.tolist(), strict=True):
            place = f"{self.place}, image {number}"
            image = decode_rgb(self.read(number), place)
            if image.shape != row.shape:
                raise DataError(f"{place}: found {image.shape[0]} x {image.shape[1]} pixels, expected {SIDE} x {SIDE}.")
            row[:] = image
            update()
        return LabelledPart(images, self.fine.astype(np.int32), self.coarse.astype(np.int32))


Source = tuple[dict[str, _Encoded], tuple[str, ...], tuple[str, ...]]


def _downloaded() -> Source:
    builders = require("pae_jax.data.builders", "Downloading CIFAR-100")
    records, fine_names, coarse_names = builders.cifar100_records()
    parts = {}
    for name in PARTS:
        rows = [records[name][i] for i in range(len(records[name]))]
        rows.sort(key=lambda row: row["id"])  # the stored order differs from the official one
        fine, coarse = (np.asarray([row[key] for row in rows]) for key in ("label", "coarse_label"))
        read = lambda number, rows=rows: rows[number]["image"]  # noqa: E731
        parts[name] = _Encoded(np.arange(len(rows)), fine, coarse, read, f"CIFAR-100, {name}")
    return parts, tuple(fine_names), tuple(coarse_names)


def _packed(path: Path) -> Source:
    labels = {"split": (0, 2, "0 train, 2 test"), "fine": "fine_names", "coarse": "coarse_names"}
    pack = read_pack(path, labels, ("fine_names", "coarse_names"))
    split = pack.labels["split"]
    if not set(np.unique(split).tolist()) == set(PARTS.values()):
        raise DataError(f"{path}: split has the values {np.unique(split).tolist()}, expected 0 (train) and 2 (test).")
    parts = {
        name: _Encoded(numbers, pack.labels["fine"][numbers], pack.labels["coarse"][numbers], pack.encoded, str(path))
        for name, numbers in ((name, np.flatnonzero(split == value)) for name, value in PARTS.items())
    }
    return parts, pack.names["fine_names"], pack.names["coarse_names"]


def _choose(wanted: Sequence[str] | int | None, known: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the superclasses that an argument selects."""
    names = sorted(known)
    if wanted is None:
        return tuple(names)
    if isinstance(wanted, (int, np.integer)):
        if not 1 <= wanted <= len(names):
            raise ArgumentError(f"superclasses: found {wanted}, expected 1 to {len(names)}, or names.")
        return tuple(names[:wanted])
    chosen = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    unknown = [name for name in chosen if name not in names]
    if not chosen or unknown or len(set(chosen)) != len(chosen):
        raise ArgumentError(f"superclasses: found {chosen}, expected different ones of {', '.join(names)}.")
    return chosen
