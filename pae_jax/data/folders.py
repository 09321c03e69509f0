"""The user's own images: one folder per split, in it one folder per class."""

from __future__ import annotations

import hashlib
import operator
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

from pae_jax.data.decoding import decode_rgb
from pae_jax.data.optional import require
from pae_jax.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from pae_jax.data.builders import File

LAYOUT = 1  # of the stored records; another number stores them anew
SHOWN = 10


@dataclass(frozen=True, eq=False)
class ImageSource(Sequence[dict[str, Any]]):
    """Images with random access, decoded when they are asked for; what a Grain data loader takes.

    Item i is a dict: `image` uint8 (height, width, 3), `label` int, `file` "class/name". The order is that of the
    sorted classes, and in each of the sorted file names.

    Attributes:
      split: name of the split.
      classes: names of the classes; label i means `classes[i]`.
    """

    split: str
    classes: tuple[str, ...]
    _records: Any = field(repr=False)

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = operator.index(index)
        place = place + len(self) if place < 0 else place
        if not 0 <= place < len(self):
            raise IndexError(f"{self.split} has {len(self)} images; found index {operator.index(index)}")
        record = self._records[place]
        name = record["file"].decode()
        return {"image": decode_rgb(record["image"], name), "label": int(record["label"]), "file": name}


@dataclass(frozen=True, eq=False)
class ImageFolders(Mapping[str, ImageSource]):
    """The splits of an image folder by name; made by `image_folder`.

    Attributes:
      classes: names of the classes, sorted, the same in every split; label i means `classes[i]`.
    """

    classes: tuple[str, ...]
    _sources: dict[str, ImageSource] = field(repr=False)

    def __getitem__(self, split: str) -> ImageSource:
        return self._sources[split]

    def __iter__(self):
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def image_folder(
    root: str | Path, *, cache_dir: str | Path, splits: Sequence[str] = ("train", "val", "test")
) -> ImageFolders:
    """Open class folders of images, `root/<split>/<class>/<image>`, for reading in any order.

    The first time, every image is checked by decoding it, and all are stored as they are encoded in one ArrayRecord
    data set of tensorflow-datasets under `cache_dir`; TensorFlow is not needed. Later calls use what is stored as long
    as names, sizes and modification times of all files are the same; otherwise the images are stored anew beside it,
    and the older data set may be deleted by hand. Hidden files and folders are left out.

    Images come as RGB, whatever they are stored as: grey, palette and CMYK images are converted, transparency is
    dropped, and an orientation in the EXIF data is applied.

    Args:
      root: the folder of the splits.
      cache_dir: folder for the stored data sets, about as large as the images.
      splits: names of the folders in `root` to open, made of letters, digits and underscores.

    Returns:
      A mapping from split to `ImageSource`, with the names of the classes.

    Raises:
      DataError: a folder is missing or empty; a class is in one split and not in another; an entry is not what its
        place says; images are empty or cannot be decoded, named up to the tenth; or packages are missing.
      ArgumentError: `splits` names none, one twice, or one that cannot be a name.

    Example:
      >>> import tempfile
      >>> from PIL import Image
      >>> root = Path(tempfile.mkdtemp())
      >>> for split in ("train", "val"):
      ...     for shade, name in ((9, "dark"), (200, "light")):
      ...         (root / split / name).mkdir(parents=True)
      ...         Image.new("L", (8, 6), shade).save(root / split / name / "1.png")
      >>> folders = image_folder(root, cache_dir=root / "cache", splits=("train", "val"))  # doctest: +ELLIPSIS
      Downloading and preparing dataset ...
      >>> folders.classes, len(folders["train"]), folders["val"][1]["image"].shape, folders["val"][1]["file"]
      (('dark', 'light'), 2, (6, 8, 3), 'light/1.png')
    """
    builders = require("pae_jax.data.builders", "Reading image folders")
    root = Path(root)
    splits = tuple(splits)
    if not splits or len(set(splits)) != len(splits) or not all(re.fullmatch(r"[A-Za-z]\w*", name) for name in splits):
        raise ArgumentError(f"splits: found {splits}, expected different names of letters, digits and underscores.")
    folders = {split: _class_folders(root, split) for split in splits}
    classes = _common_classes(folders)
    digest = hashlib.sha256(repr((LAYOUT, splits, classes)).encode())
    listing: dict[str, list[File]] = {}
    empty: list[str] = []
    for split in splits:
        listing[split] = files = []
        for label, name in enumerate(classes):
            for path, status in _image_files(folders[split][name]):
                if not status.st_size:
                    empty.append(str(path))
                digest.update(repr((split, label, path.name, status.st_size, status.st_mtime_ns)).encode())
                files.append(builders.File(path.absolute(), label, f"{name}/{path.name}"))
    if empty:
        raise DataError(_several(root, empty, "empty (0 bytes)"))
    records = builders.folder_records(
        listing,
        classes,
        Path(cache_dir) / digest.hexdigest()[:16],
        lambda problems: _several(root, problems, "not readable"),
    )
    return ImageFolders(classes, {split: ImageSource(split, classes, records[split]) for split in splits})


def _class_folders(root: Path, split: str) -> dict[str, Path]:
    """Return the class folders of a split by name."""
    if not (root / split).is_dir():
        found = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else "no such folder"
        raise DataError(
            f"{root / split}: no such folder; {root} holds {found}. Expected root/<split>/<class>/<image>; name the "
            "splits you have with splits=."
        )
    folders = {}
    for entry in _entries(root / split):
        if not entry.is_dir():
            raise DataError(f"{entry.path}: found a file, expected folders of classes only. Move it elsewhere.")
        folders[entry.name] = Path(entry.path)
    if not folders:
        raise DataError(f"{root / split}: found no class folder, expected root/<split>/<class>/<image>.")
    return folders


def _common_classes(folders: dict[str, dict[str, Path]]) -> tuple[str, ...]:
    every = sorted(set().union(*folders.values()))
    lacking = {split: [name for name in every if name not in classes] for split, classes in folders.items()}
    if any(lacking.values()):
        listing = "; ".join(f"{split} lacks {names}" for split, names in lacking.items() if names)
        raise DataError(
            f"the splits have different classes: {listing}. Every class needs a folder with images in every split."
        )
    return tuple(every)


def _image_files(folder: Path) -> list[tuple[Path, os.stat_result]]:
    files = []
    for entry in _entries(folder):
        if entry.is_dir():
            raise DataError(f"{entry.path}: found a folder inside a class, expected images only.")
        try:
            files.append((Path(entry.path), entry.stat()))
        except OSError as error:  # a link to nothing
            raise DataError(f"{entry.path}: cannot be read ({error.strerror}). Remove or repair it.") from error
    if not files:
        raise DataError(f"{folder}: found no images, expected at least 1. Fill or remove the class in every split.")
    return files


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _several(root: Path, places: list[str], what: str) -> str:
    shown = "\n  ".join(places[:SHOWN])
    more = f"\n  and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
    return f"{root}: {len(places)} images are {what}:\n  {shown}{more}\nRemove or replace them; nothing was stored."
