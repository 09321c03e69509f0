"""A pack of facial expressions, such as FER2013: one .npz file of encoded faces with a class and a fixed split."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from pae_jax import data
from pae_jax.errors import DataError
from pae_jax.faces.images import read_image, stacked, to_square

SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True, eq=False)
class ExpressionSplit:
    """One split of a pack; row i of both arrays is face i.

    Attributes:
      images: uint8 (n, size, size, 3), RGB.
      label: int32 (n,), number of the class.
    """

    images: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.label)


@dataclasses.dataclass(frozen=True, eq=False)
class ExpressionPack:
    """Faces in their splits, and the names of the classes."""

    train: ExpressionSplit
    val: ExpressionSplit
    test: ExpressionSplit
    names: tuple[str, ...]


def load_expressions(
    path: Path, *, size: int, limit: tuple[int | None, int | None, int | None] = (None, None, None)
) -> ExpressionPack:
    """Read a pack, see `pae.data.read_pack`, with `label` 0, 1, ..., `label_names`, and `split` 0, 1, 2.

    Args:
      path: the .npz file.
      size: height and width of the images; grey values are repeated.
      limit: largest number of faces of each split, spread evenly over the file; None takes all.

    Raises:
      DataError: no such pack, or a class without training faces; says which.
    """
    pack = data.read_pack(path, {"label": "label_names", "split": (0, 2, "train, validation, test")}, ("label_names",))
    names, parts = pack.names["label_names"], {}
    for number, (split, most) in enumerate(zip(SPLITS, limit, strict=True)):
        rows = np.flatnonzero(pack.labels["split"] == number)
        if not len(rows):
            raise DataError(f"{path}: no face has split {number} ({split}); all three splits are needed.")
        if most is not None and most < len(rows):
            rows = rows[np.arange(most) * len(rows) // most]

        def face(i: int, rows: np.ndarray = rows) -> np.ndarray:
            place = pack.place(int(rows[i]))
            return to_square(read_image(pack.encoded(int(rows[i])), name=place), size, None, place)

        label = pack.labels["label"][rows].astype(np.int32)
        parts[split] = ExpressionSplit(stacked(face, len(rows), size, progress=False), label)
    empty = [name for i, name in enumerate(names) if not (parts["train"].label == i).any()]
    if empty:
        raise DataError(f"{path}: no training face shows {', '.join(empty)}. Take more faces, or another file.")
    return ExpressionPack(**parts, names=names)
