"""Image classification tasks: superclasses of CIFAR-100, or data sets of tensorflow-datasets by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pretrained_encoder import Task

from pae_jax import data

SUPERCLASSES = (
    "aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables", "household_electrical_devices",
    "household_furniture", "insects", "large_carnivores", "large_man-made_outdoor_things",
)  # fmt: skip
"""The first ten superclasses in alphabetical order."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much of the data is used: most images per part of a task; None takes all of the test part.

    Attributes:
      size: pixels of a side of the images from tensorflow-datasets; those of CIFAR-100 stay 32 x 32.
    """

    train: int = 500
    val: int = 250
    test: int | None = None
    size: int = 96


def cifar_tasks(pack: Path | None, names: Sequence[str], limits: Limits, seed: int) -> dict[str, Task]:
    """Return superclasses of CIFAR-100 as tasks of uint8 images (n, 32, 32, 3); validation is held out of training."""
    images = data.load_cifar100(pack, superclasses=list(names))
    tasks = {}
    for name in names:
        coarse = images.coarse_names.index(name)
        classes = np.unique(images.train.fine[images.train.coarse == coarse])
        rng = np.random.default_rng((seed, coarse))
        parts = []
        for part in (images.train, images.test):
            rows = rng.permutation(np.flatnonzero(part.coarse == coarse))
            parts.append((part.images[rows], np.searchsorted(classes, part.fine[rows]).astype(np.int32)))
        (x, y), test = parts
        split = [slice(limits.val), slice(limits.val, limits.val + limits.train)]
        val, train = ((x[rows], y[rows]) for rows in split)
        tasks[name] = Task(name, len(classes), train, val, tuple(array[: limits.test] for array in test))
    return tasks


def tfds_task(name: str, limits: Limits, seed: int) -> Task:
    """Return a data set of tensorflow-datasets as a task, such as "oxford_flowers102" or "cars196"; it is downloaded.

    Validation is its own part if it has one, and held out of the training part if not.
    """
    builder = _builder(name)
    own_val = "validation" in builder.info.splits
    first = 0 if own_val else limits.val
    train = _read(builder, "train", slice(first, first + limits.train), limits.size, seed)
    val = _read(builder, "validation" if own_val else "train", slice(limits.val), limits.size, seed)
    test = _read(builder, "test", slice(limits.test), limits.size, seed)
    return Task(name, builder.info.features["label"].num_classes, train, val, test)


def _builder(name: str) -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise SystemExit(f'{name} needs tensorflow-datasets: pip install "pae-jax[data]" ({error})') from None
    try:
        builder: Any = tfds.builder(name, file_format="array_record")
    except ValueError as error:
        known = "a superclass of CIFAR-100 or a data set of tensorflow-datasets"
        raise SystemExit(f"--tasks: {name!r} is not {known} ({str(error).splitlines()[0]})") from None
    _require(name, "field", ("image", "label"), builder.info.features or ())
    builder.download_and_prepare()
    _require(name, "part", ("train", "test"), builder.info.splits)
    return builder


def _require(name: str, kind: str, wanted: Sequence[str], found: Sequence[str]) -> None:
    missing = [part for part in wanted if part not in found]
    if missing:
        raise SystemExit(f"{name} has no {kind} {missing[0]!r}; take labelled images with a training and a test part")


def _read(builder: Any, split: str, rows: slice, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return some images of a part, drawn; one seed draws one order, so that two slices share no image."""
    from PIL import Image

    source = builder.as_data_source(split=split)
    examples = [source[int(row)] for row in np.random.default_rng(seed).permutation(len(source))[rows]]
    # One colour or three; Pillow takes one without its axis.
    images = [Image.fromarray(np.asarray(e["image"]).squeeze()).convert("RGB").resize((size, size)) for e in examples]
    labels = [e["label"] for e in examples]
    return np.stack([np.asarray(image) for image in images]), np.asarray(labels, np.int32)


def made_task(name: str, counts: Sequence[int], seed: int) -> Task:
    """Return images of noise in which the brightest third of the rows tells the class; for trials without data."""
    rng = np.random.default_rng([seed, *name.encode()])
    order, parts = rng.permutation(3), []
    for count in counts:
        y = rng.integers(0, 3, count).astype(np.int32)
        x = rng.integers(0, 160, (count, 12, 12, 3))
        for image, label in zip(x, order[y], strict=True):
            image[4 * label : 4 * label + 4] += 90
        parts.append((x.astype(np.uint8), y))
    return Task(name, 3, *parts)
