"""The folders of the paper for facial_modules.py: VGGFace2, LFW, and both experiments' tasks, as class folders."""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from facial_modules_data import BATCH, FaceSet, Labelled, Retraining, Sources, View

from pae_jax import data
from pae_jax.errors import DataError
from pae_jax.faces.images import load_images, standardise_fixed
from pae_jax.faces.losses import WeightedSoftmax, class_weights
from pae_jax.faces.pairs import find_images, generate_pairs, read_pairs

FACES, LFW = "vggface2_mtcnn_182", "lfw_mtcnnpy_160"
# Folder and number of classes of a task, by experiment.
_AGE, _EXPRESSION = ("age/test_fold_is_{fold}", 8), ("emotion", 7)
_FOTW = ("chalearn/gender", 3)
TASKS = {
    1: {"age": _AGE, "gender": ("gender/test_fold_is_{fold}", 2)},
    2: {"expression": _EXPRESSION, "gender": _FOTW},
    "cpg": {"gender": _FOTW, "expression": _EXPRESSION, "age": _AGE},
}
HELD_OUT = 10  # of a task without test images, every tenth training image validates, and the val folder is measured
SHOTS = 20  # images of each validation identity
STEPS = 1000  # batches of an epoch at most, as in the paper's scripts


@dataclasses.dataclass(frozen=True)
class Stored:
    """One image for training, at the size before the crop on the device."""

    size: int

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return a uint8 image."""
        return data.resized(image, self.size)


@dataclasses.dataclass(frozen=True)
class Middle:
    """One image for evaluation: the middle of the stored one."""

    stored: int
    size: int

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return a uint8 image."""
        return data.centre_crop(data.resized(image, self.stored)[None], self.size)[0]


@dataclasses.dataclass(frozen=True)
class Standard:
    """A middle, standardised."""

    middle: Middle

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return a float32 image."""
        return standardise_fixed(self.middle(image))


def folders(
    preset: Any,
    root: Path,
    fold: int,
    pairs: Path | None,
    cache: Path,
    batch: int,
    key: jax.Array,
    classifier: int | None = None,
) -> Sources:
    """Open the paper's folders: VGGFace2 for retraining, LFW for measurement, and the tasks of an experiment.

    The last identities of VGGFace2 choose the pruning ratio, so that LFW is used for no choice. A pretrained
    classifier of that many identities must be that of the folder: its outputs are the folder's classes, sorted.
    """
    size, middle = preset.size, Middle(preset.stored, preset.size)
    groups = {
        name: (root / place.format(fold=fold), count) for name, (place, count) in TASKS[preset.experiment].items()
    }
    splits = {name: splits_of(group) for name, (group, _) in groups.items()}
    for name, (group, count) in groups.items():
        check_classes(group, count, splits[name])
    check_classes(root / FACES, preset.val_identities + 2, ("train",), at_least=True)
    if classifier is not None:
        check_classes(root / FACES, classifier, ("train",), hint=" Or pass --new-classifier, which trains another.")
    # Errors of the verification set are raised before anything is stored.
    lfw = read_pairs(pairs or root / "pairs.txt")
    lfw, files = find_images(lfw, root / LFW)
    test = FaceSet(load_images(files, size, progress=True), lfw)
    keys = jax.random.split(key, 2 + len(groups))

    def stream(source: Any, key: jax.Array) -> Any:
        return Epochs(data.batches(source, min(batch, len(source)), key_or_seed=key, transform=Stored(preset.stored)))

    def labelled(name: str, key: jax.Array) -> Labelled:
        found = data.image_folder(groups[name][0], cache_dir=cache, splits=splits[name])
        train, val, test = parts_of(found)
        val, test = (data.in_order(part, BATCH, transform=Standard(middle)) for part in (val, test))
        loss = None
        if name == "expression":
            source = found["train"]
            bounds = [first_of(source, label) for label in range(len(found.classes) + 1)]
            loss = WeightedSoftmax(class_weights(np.diff(bounds).tolist()))
        return Labelled(name, found.classes, stream(train, key), val, test, loss)

    tasks = tuple(labelled(name, key) for name, key in zip(groups, keys[2:], strict=True))
    source = data.image_folder(root / FACES, cache_dir=cache, splits=("train",))["train"]
    people = len(source.classes) - preset.val_identities
    starts = [first_of(source, label) for label in range(people, len(source.classes) + 1)]
    chosen = [range(a, min(b, a + SHOTS)) for a, b in itertools.pairwise(starts)]
    images = [middle(source[i]["image"]) for rows in chosen for i in rows]
    identities = np.repeat(np.arange(len(chosen)), [len(rows) for rows in chosen])
    training = Part(source, range(starts[0]))
    some = np.linspace(0, starts[0] - 1, min(preset.sample, starts[0])).astype(int)
    return Sources(
        faces=stream(training, keys[0]),
        view=View(size),
        loss=Retraining(people if classifier is None else classifier, 1.0, 0.0, 5e-4),
        val=FaceSet(np.stack(images), generate_pairs(identities, key=keys[1], folds=min(10, len(chosen) // 2))),
        test=test,
        tasks=tasks,
        sample=np.stack([middle(source[int(i)]["image"]) for i in some]),
        facts={
            "verification": f"VGGFace2: {people} identities retrain, {len(chosen)} choose; LFW is measured, "
            f"{len(lfw.same)} pairs, {len(lfw.skipped)} skipped",
            "labels": ", ".join(place.format(fold=fold) for place, _ in TASKS[preset.experiment].values()),
            "retraining": f"{len(training)} images of {people} identities",
        },
        checksum=zlib.crc32(repr((source.classes, starts, lfw.images, *(task.classes for task in tasks))).encode()),
    )


def splits_of(root: Path) -> tuple[str, ...]:
    """Return the splits of a task's folder: with a test part, or the two of the paper's experiment 2."""
    return ("train", "val", "test") if (root / "test").is_dir() or "test_fold" in root.name else ("train", "val")


def parts_of(found: Any) -> tuple[Any, Any, Any]:
    """Return images for training, for choices and for measurement.

    The authors' experiment 2 chooses by the images that it reports. Here they are only measured.
    """
    if "test" in found:
        return found["train"], found["val"], found["test"]
    rows = np.arange(len(found["train"]))
    held = rows % HELD_OUT == 0
    return Part(found["train"], rows[~held].tolist()), Part(found["train"], rows[held].tolist()), found["val"]


def check_classes(root: Path, count: int, splits: Sequence[str], at_least: bool = False, hint: str = "") -> None:
    """Raise `DataError` unless all splits of a folder have the same classes, of a given number."""
    found: dict[str, set[str]] = {}
    for split in splits:
        folder = root / split
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; expected {root.name}/<{'|'.join(splits)}>/<class>/<image>.")
        found[split] = {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    every = set().union(*found.values())
    for split, names in found.items():
        if every - names:
            raise DataError(f"{root / split}: lacks the classes {sorted(every - names)[:10]} of the other splits.")
    if len(every) < count or (len(every) > count and not at_least):
        wanted = f"{count} or more" if at_least else str(count)
        raise DataError(f"{root}: found {len(every)} classes {sorted(every)[:10]}, expected {wanted}.{hint}")


def first_of(source: Any, label: int) -> int:
    """Return the position of the first image whose label is at least this, of a source sorted by label."""
    low, high = 0, len(source)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if source[middle]["label"] < label else (low, middle)
    return low


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Some examples of a source."""

    source: Any
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.source[self.rows[index]]


@dataclasses.dataclass(frozen=True, eq=False)
class Epochs:
    """Batches with a limit per epoch; every epoch is shuffled anew."""

    batches: Any
    steps: int = STEPS

    def __len__(self) -> int:
        return min(len(self.batches), self.steps)

    def __call__(self, epoch: int) -> Iterator[Any]:
        return itertools.islice(self.batches(epoch), self.steps)
