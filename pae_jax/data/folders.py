"""Image folders: one folder per split, with one subfolder per class."""

from __future__ import annotations

import hashlib
import operator
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

from pae_jax.data.decoding import decode_rgb
from pae_jax.data.files import require_inside
from pae_jax.data.optional import require
from pae_jax.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from pae_jax.data.builders import File

LAYOUT = 1  # version of the stored records; a new version stores them again
SHOWN = 10


@dataclass(frozen=True, eq=False)
class ImageSource(Sequence[dict[str, Any]]):
    """Images with random access, decoded on access; a data source for a Grain data loader.

    Item i is a dict: `image` uint8 (height, width, 3), `label` int, `file` "class/name". Images are ordered by sorted
    class, then by sorted file name.

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
    root: str | Path,
    *,
    cache_dir: str | Path,
    splits: Sequence[str] = ("train", "val", "test"),
    follow_links: bool = False,
) -> ImageFolders:
    """Open class folders of images, `root/<split>/<class>/<image>`, for reading in any order.

    The first call checks every image by decoding it, and stores all encoded images in one ArrayRecord data set of
    tensorflow-datasets under `cache_dir`; TensorFlow is not needed. Later calls use the stored data set if the path of
    `root` and names, sizes and modification times of all files are unchanged. Otherwise the images are stored in a new
    data set, and you may delete the older one. Hidden files and folders are ignored.

    Images are always RGB: grey, palette and CMYK images are converted, transparency is dropped, and EXIF orientation is
    applied.

    Args:
      root: the folder of the splits.
      cache_dir: folder for the stored data sets, about as large as the images.
      splits: names of the folders in `root` to open, made of letters, digits and underscores.
      follow_links: whether symbolic links may lead out of `root`; otherwise such a link is refused.

    Returns:
      A mapping from split to `ImageSource`, with the names of the classes.

    Raises:
      DataError: a folder is missing or empty; a class is in one split and not in another; an entry is of the wrong
        kind, is a link that leads out of `root`, or has a name that is not UTF-8; images are empty or cannot be decoded
        (see `decode_rgb`; the first ten are named); or packages are missing.
      ArgumentError: `splits` is empty, repeats a name or has an invalid name.

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
    inside = None if follow_links else root
    folders = {split: _class_folders(root, split, inside) for split in splits}
    classes = _common_classes(folders)
    # Copies of a folder may hold other images of the same names, sizes and times.
    digest = hashlib.sha256(repr((LAYOUT, str(root.resolve()), splits, classes)).encode())
    listing: dict[str, list[File]] = {}
    empty: list[str] = []
    for split in splits:
        listing[split] = files = []
        for label, name in enumerate(classes):
            for path, status in _image_files(folders[split][name], inside):
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


def _class_folders(root: Path, split: str, inside: Path | None) -> dict[str, Path]:
    """Return the class folders of a split by name."""
    if not (root / split).is_dir():
        found = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else "no such folder"
        raise DataError(
            f"{root / split}: no such folder; {root} holds {found}. Expected root/<split>/<class>/<image>; name the "
            "splits you have with splits=."
        )
    if inside is not None:
        require_inside(root / split, inside)
    folders = {}
    for entry in _entries(root / split, inside):
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


def _image_files(folder: Path, inside: Path | None) -> list[tuple[Path, os.stat_result]]:
    files = []
    for entry in _entries(folder, inside):
        if entry.is_dir():
            raise DataError(f"{entry.path}: found a folder inside a class, expected images only.")
        try:
            status = entry.stat()
        except OSError as error:  # a broken link
            raise DataError(f"{entry.path}: cannot be read ({error.strerror}). Remove or repair it.") from error
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{entry.path}: found a FIFO, socket or device, expected images only. Move it elsewhere.")
        files.append((Path(entry.path), status))
    if not files:
        raise DataError(f"{folder}: found no images, expected at least 1. Fill or remove the class in every split.")
    return files


def _entries(folder: Path, inside: Path | None) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, sorted and without hidden ones; links may only lead inside `inside`."""
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}). Is it yours to read?") from error
    for entry in found:
        if any("\ud800" <= letter <= "\udfff" for letter in entry.name):
            raise DataError(f"{folder}: the name {entry.name!r} is not UTF-8, so it cannot be stored. Rename the file.")
        if inside is not None and entry.is_symlink():
            require_inside(Path(entry.path), inside)
    return found


def _several(root: Path, places: list[str], what: str) -> str:
    shown = "\n  ".join(places[:SHOWN])
    more = f"\n  and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
    return f"{root}: {len(places)} images are {what}:\n  {shown}{more}\nRemove or replace them; nothing was stored."
