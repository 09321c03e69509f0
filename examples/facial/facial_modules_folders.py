"""The folders of the paper for facial_modules.py: VGGFace2, LFW, and Adience's age and gender, as class folders."""

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
from pae_jax.faces.pairs import find_images, generate_pairs, read_pairs

FACES, LFW = "vggface2_mtcnn_182", "lfw_mtcnnpy_160"
CLASSES = {"age": 8, "gender": 2}
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


def folders(preset: Any, root: Path, fold: int, pairs: Path | None, cache: Path, batch: int, key: jax.Array) -> Sources:
    """Open the paper's folders: VGGFace2 for retraining, LFW for measurement, Adience's age and gender of one fold.

    The last identities of VGGFace2 choose the pruning ratio, so that LFW is used for no choice.
    """
    size, middle = preset.size, Middle(preset.stored, preset.size)
    groups = {name: root / name / f"test_fold_is_{fold}" for name in CLASSES}
    for name, count in CLASSES.items():
        check_classes(groups[name], count)
    check_classes(root / FACES, preset.val_identities + 2, ("train",), at_least=True)
    # Errors of the verification set are raised before anything is stored.
    lfw = read_pairs(pairs or root / "pairs.txt")
    lfw, files = find_images(lfw, root / LFW)
    test = FaceSet(load_images(files, size, progress=True), lfw)
    keys = jax.random.split(key, 4)

    def stream(source: Any, key: jax.Array) -> Any:
        return Epochs(data.batches(source, min(batch, len(source)), key_or_seed=key, transform=Stored(preset.stored)))

    def labelled(name: str, key: jax.Array) -> Labelled:
        found = data.image_folder(groups[name], cache_dir=cache)
        rest = (data.in_order(found[split], BATCH, transform=Standard(middle)) for split in ("val", "test"))
        return Labelled(found.classes, stream(found["train"], key), *rest)

    age, gender = labelled("age", keys[0]), labelled("gender", keys[1])
    source = data.image_folder(root / FACES, cache_dir=cache, splits=("train",))["train"]
    people = len(source.classes) - preset.val_identities
    starts = [first_of(source, label) for label in range(people, len(source.classes) + 1)]
    chosen = [range(a, min(b, a + SHOTS)) for a, b in itertools.pairwise(starts)]
    images = [middle(source[i]["image"]) for rows in chosen for i in rows]
    identities = np.repeat(np.arange(len(chosen)), [len(rows) for rows in chosen])
    training = Part(source, starts[0])
    some = np.linspace(0, starts[0] - 1, min(preset.sample, starts[0])).astype(int)
    return Sources(
        faces=stream(training, keys[2]),
        view=View(size),
        loss=Retraining(people, 1.0, 0.0, 5e-4),
        val=FaceSet(np.stack(images), generate_pairs(identities, key=keys[3], folds=min(10, len(chosen) // 2))),
        test=test,
        age=age,
        gender=gender,
        sample=np.stack([middle(source[int(i)]["image"]) for i in some]),
        facts={
            "verification": f"VGGFace2: {people} identities retrain, {len(chosen)} choose; LFW is measured, "
            f"{len(lfw.same)} pairs, {len(lfw.skipped)} skipped",
            "labels": f"Adience, fold {fold}",
            "retraining": f"{len(training)} images of {people} identities",
        },
        checksum=zlib.crc32(repr((source.classes, starts, lfw.images, age.classes, gender.classes)).encode()),
    )


def check_classes(
    root: Path, count: int, splits: Sequence[str] = ("train", "val", "test"), at_least: bool = False
) -> None:
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
        raise DataError(f"{root}: found {len(every)} classes {sorted(every)[:10]}, expected {wanted}.")


def first_of(source: Any, label: int) -> int:
    """Return the position of the first image whose label is at least this, of a source sorted by label."""
    low, high = 0, len(source)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if source[middle]["label"] < label else (low, middle)
    return low


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """The first examples of a source."""

    source: Any
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return self.source[index]


@dataclasses.dataclass(frozen=True, eq=False)
class Epochs:
    """Batches with a limit per epoch; every epoch is shuffled anew."""

    batches: Any
    steps: int = STEPS

    def __len__(self) -> int:
        return min(len(self.batches), self.steps)

    def __call__(self, epoch: int) -> Iterator[Any]:
        return itertools.islice(self.batches(epoch), self.steps)
