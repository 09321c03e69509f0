"""A pack of labelled faces: one .npz file of encoded images with age in years, gender, and a fixed split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from pae_jax.data import ImagePack, read_pack
from pae_jax.errors import ArgumentError, DataError
from pae_jax.faces.images import check_sizes, read_image, stacked, to_square

AGE_EDGES = (0, 3, 7, 14, 21, 33, 44, 54)
AGE_GROUPS = ("0-2", "3-6", "7-13", "14-20", "21-32", "33-43", "44-53", "54+")
GENDERS = ("male", "female")
OLDEST = 130
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class FaceSplit:
    """One split of a pack; row i of each array is face i.

    Attributes:
      images: uint8 (n, size, size, 3), RGB.
      age: int32 (n,), in years.
      gender: int32 (n,), 0 male, 1 female.
    """

    images: np.ndarray
    age: np.ndarray
    gender: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, eq=False)
class FacePack:
    """Labelled faces in their splits.

    Attributes:
      train: for training.
      val: for choices: epochs, sparsity, when to expand.
      test: for reported results.
    """

    train: FaceSplit
    val: FaceSplit
    test: FaceSplit


def age_group(years: ArrayLike) -> np.ndarray:
    """Return the numbers of eight age groups like Adience's: 0-2, 3-6, 7-13, 14-20, 21-32, 33-43, 44-53, 54 and over.

    Args:
      years: ages, at least 0, of any shape; fractions of a year are rounded down.

    Returns:
      int32, 0..7, of the same shape; `AGE_GROUPS` has their names.

    Raises:
      DataError: an age below 0, or NaN.

    Example:
      >>> age_group([0, 2.9, 3, 53, 54, 110]).tolist()
      [0, 0, 1, 6, 7, 7]

    Source: Eidinger et al. 2014 (Adience), whose groups have gaps; the edges here close these gaps.
    """
    ages = np.asarray(years)
    if ages.dtype.kind not in "iuf" or not (ages >= 0).all():
        raise DataError(f"years: found {ages.ravel()[:8].tolist()}..., expected numbers of at least 0")
    return (np.searchsorted(AGE_EDGES, ages, side="right") - 1).astype(np.int32)


def load_face_pack(
    path: str | Path,
    *,
    size: int = 182,
    crop: int | None = None,
    limit: int | tuple[int, int, int] | None = None,
    progress: bool = False,
) -> FacePack:
    """Read a pack of labelled faces.

    The file is a pack, see `pae.data.read_pack`, with three integers for each image: `age` in years, `gender` 0 male
    or 1 female, and `split` 0 train, 1 validation or 2 test.

    Args:
      path: the .npz file.
      size: height and width of the images; 182 leaves room for random crops of 160. A whole pack of 10,000 images at
        182 takes 1 GB of memory.
      crop: height and width of the middle part to take before scaling to `size`; None takes all.
      limit: largest number of faces of each split, or of train, val and test. They are evenly spread over the file, so
        that the choice is not random and keeps all classes of a sorted file. None takes all.
      progress: show a progress bar.

    Returns:
      The faces; each split in the order of the file.

    Raises:
      DataError: no such pack: arrays missing, of wrong shape or out of range, a split without faces, images that
        cannot be decoded; says which.
      ArgumentError: `size`, `crop` or `limit` is out of range.

    Example:
      >>> import tempfile
      >>> image = np.frombuffer(b"P5 2 2 255 " + bytes(4), np.uint8)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder) / "faces.npz"
      ...     np.savez(path, bytes=np.tile(image, 3), offsets=np.arange(4) * len(image),
      ...              age=[30, 4, 71], gender=[0, 1, 1], split=[0, 1, 2])
      ...     pack = load_face_pack(path, size=160)
      >>> pack.train.images.shape, pack.test.age.tolist()
      ((1, 160, 160, 3), [71])
    """
    check_sizes(size, crop)
    limits = _limits(limit)
    pack = read_pack(path, _RANGES)
    parts = []
    for number, (split, most) in enumerate(zip(SPLITS, limits, strict=True)):
        rows = np.flatnonzero(pack.labels["split"] == number)
        if not len(rows):
            raise DataError(f"{path}: no face has split {number} ({split}); all three splits are needed.")
        if most is not None and most < len(rows):
            rows = rows[np.arange(most) * len(rows) // most]
        age, gender = (pack.labels[name][rows].astype(np.int32) for name in ("age", "gender"))
        parts.append(FaceSplit(_images(pack, rows, size, crop, progress), age, gender))
    return FacePack(*parts)


def _limits(limit: int | tuple[int, int, int] | None) -> tuple[int | None, ...]:
    limits = limit if isinstance(limit, (tuple, list)) else (limit,) * 3
    for most in limits:
        if most is not None and (isinstance(most, bool) or not isinstance(most, (int, np.integer)) or most < 1):
            limits = ()
    if len(limits) != 3:
        raise ArgumentError(f"limit must be None, a positive integer, or one such for each split, found {limit!r}")
    return tuple(limits)


def _images(pack: ImagePack, rows: np.ndarray, size: int, crop: int | None, progress: bool) -> np.ndarray:
    def image(number: int) -> np.ndarray:
        row = int(rows[number])
        return to_square(read_image(pack.encoded(row), name=pack.place(row)), size, crop, pack.place(row))

    return stacked(image, len(rows), size, progress)


_RANGES = {
    "age": (0, OLDEST, "years"),
    "gender": (0, 1, "male, female"),
    "split": (0, 2, "train, validation, test"),
}
