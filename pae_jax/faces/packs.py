"""A pack of labelled faces: one .npz file of encoded images with age in years, gender, and a fixed split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from pae_jax.errors import ArgumentError, DataError
from pae_jax.faces.images import check_sizes, for_all, read_image, to_square

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
      train: to learn from.
      val: to choose by: epochs, sparsity, when to grow.
      test: to report.
    """

    train: FaceSplit
    val: FaceSplit
    test: FaceSplit


def age_group(years: ArrayLike) -> np.ndarray:
    """Return the numbers of eight age groups like Adience's: 0-2, 3-6, 7-13, 14-20, 21-32, 33-43, 44-53, 54 and over.

    Args:
      years: ages, at least 0, of any shape; a fraction of a year counts as the years that are full.

    Returns:
      int32, 0..7, of the same shape; `AGE_GROUPS` has their names.

    Raises:
      DataError: an age below 0, or NaN.

    Example:
      >>> age_group([0, 2.9, 3, 53, 54, 110]).tolist()
      [0, 0, 1, 6, 7, 7]

    Source: Eidinger et al. 2014 (Adience), whose groups have gaps; the edges here close them.
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

    The file holds `bytes` uint8 and `offsets` int64 (n + 1,): image i is `bytes[offsets[i]:offsets[i + 1]]`, encoded as
    JPEG, PNG or another format of `read_image`; and for each image an integer `age` in years, `gender` 0 male or
    1 female, and `split` 0 train, 1 validation or 2 test.

    Args:
      path: the .npz file.
      size: height and width of the images; 182 leaves room for random crops of 160. All of a pack of 10,000 at 182
        take 1 GB of memory.
      crop: height and width of the middle part to take before scaling to `size`; None takes all.
      limit: at most so many faces of each split, or of train, val and test; evenly spread over the file, so that
        nothing is drawn and no class of a sorted file is lost. None takes all.
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
    arrays = _read(Path(path))
    parts = []
    for number, (split, most) in enumerate(zip(SPLITS, limits, strict=True)):
        rows = np.flatnonzero(arrays["split"] == number)
        if not len(rows):
            raise DataError(f"{path}: no face has split {number} ({split}); all three splits are needed.")
        if most is not None and most < len(rows):
            rows = rows[np.arange(most) * len(rows) // most]
        images = _images(Path(path), arrays, rows, size, crop, progress)
        parts.append(FaceSplit(images, arrays["age"][rows].astype(np.int32), arrays["gender"][rows].astype(np.int32)))
    return FacePack(*parts)


def _limits(limit: int | tuple[int, int, int] | None) -> tuple[int | None, ...]:
    limits = limit if isinstance(limit, (tuple, list)) else (limit,) * 3
    for most in limits:
        if most is not None and (isinstance(most, bool) or not isinstance(most, (int, np.integer)) or most < 1):
            limits = ()
    if len(limits) != 3:
        raise ArgumentError(f"limit must be None, a positive integer, or one such for each split, found {limit!r}")
    return tuple(limits)


def _images(
    path: Path, arrays: dict[str, np.ndarray], rows: np.ndarray, size: int, crop: int | None, progress: bool
) -> np.ndarray:
    images = np.empty((len(rows), size, size, 3), np.uint8)
    encoded, offsets = arrays["bytes"], arrays["offsets"]

    def read(number: int) -> None:
        row = int(rows[number])
        place = f"{path}, image {row}"
        data = encoded[offsets[row] : offsets[row + 1]].tobytes()
        images[number] = to_square(read_image(data, name=place), size, crop, place)

    for_all(read, len(rows), progress)
    return images


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        # np.load leaves a file open that it opened itself and found damaged.
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            missing = [name for name in ("bytes", "offsets", *_RANGES) if name not in file]
            if missing:
                raise DataError(f"{path}: lacks {', '.join(missing)}; found {', '.join(file.files) or 'nothing'}.")
            arrays = {name: file[name] for name in ("bytes", "offsets", *_RANGES)}
    except DataError:
        raise
    except Exception as error:  # damaged archives raise OSError, ValueError, EOFError, BadZipFile, zlib.error, ...
        raise DataError(f"{path}: cannot be read as an .npz file of arrays ({error}).") from error
    _check(path, arrays)
    return arrays


def _check(path: Path, arrays: dict[str, np.ndarray]) -> None:
    encoded, offsets = arrays["bytes"], arrays["offsets"]
    if encoded.dtype != np.uint8 or encoded.ndim != 1:
        raise DataError(f"{path}: bytes is {encoded.dtype}{list(encoded.shape)}, expected uint8 (total length,)")
    whole = offsets.dtype.kind in "iu" and offsets.ndim == 1 and len(offsets) > 1
    if not whole or offsets[0] != 0 or offsets[-1] != len(encoded) or (offsets[1:] < offsets[:-1]).any():
        raise DataError(
            f"{path}: offsets is {offsets.dtype}{list(offsets.shape)}, expected integers (images + 1,) that rise from "
            f"0 to the length of bytes, {len(encoded):,}"
        )
    for name, (low, high, meaning) in _RANGES.items():
        labels = arrays[name]
        if labels.dtype.kind not in "iu" or labels.shape != (len(offsets) - 1,):
            raise DataError(
                f"{path}: {name} is {labels.dtype}{list(labels.shape)}, expected integers, one for each of "
                f"{len(offsets) - 1:,} images"
            )
        wrong = np.flatnonzero((labels < low) | (labels > high))
        if wrong.size:
            raise DataError(
                f"{path}: {name} is {labels[wrong[0]]} for image {wrong[0]}, expected {low}..{high} ({meaning}); "
                f"{wrong.size:,} such labels"
            )


_RANGES = {
    "age": (0, OLDEST, "years"),
    "gender": (0, 1, "male, female"),
    "split": (0, 2, "train, validation, test"),
}
