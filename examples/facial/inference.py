"""Measure one task of a finished network on a folder of images: accuracy and sizes as a CSV row, results as a picture.

Command:   python examples/facial/inference.py STAGE --task age --data adience/age/test_fold_is_0/test
           python examples/facial/inference.py STAGE --task face --data lfw_mtcnnpy_160 --pairs pairs.txt
Needs:     pip install "pae-jax[faces,plot]"
STAGE:     a stage of facial_modules.py, such as runs/facial_modules/03-gender/frozen, or a bundle file of it
Data:      of a task of classes: FOLDER/<class>/<image>, classes in the order of the run's results.json, else sorted;
           of an age in years (--metric mae): FOLDER/<years>/<image>;
           of the face task: FOLDER/<person>/<person>_0001.jpg and a pairs file
Writes:    OUT/TASK.csv, one more row for each call, with the columns of PAE's result files; OUT/TASK.png

It does the work of the authors' inference_*.sh, validation.py and validate_on_lfw.py. "Pruned rate" is free / (free +
own) of this very stage, "nan" if there is neither; "Epoch No." is known for the newest task of a stage only.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from facial_modules import FACE, network
from facial_modules_csv import authors_row
from facial_modules_data import BATCH, FaceSet
from facial_modules_files import read_json
from facial_modules_folders import Middle
from facial_modules_presets import PRESETS, Preset

import pae_jax as pae
from pae_jax.checks import check_count
from pae_jax.errors import ArgumentError, CheckpointError, DataError, PaeError
from pae_jax.faces.images import load_images, read_image, standardise_fixed
from pae_jax.faces.losses import AgeError, FeatureHead, expected_age
from pae_jax.faces.pairs import find_images, read_pairs
from pae_jax.reports import Picture
from pae_jax.storage import open_any

AGES = tuple(float(age) for age in range(1, 101))  # what the outputs of the authors' task of apparent age stand for


@dataclasses.dataclass(frozen=True, eq=False)
class ClassFolder:
    """Labelled images of one folder, read batch by batch.

    Attributes:
      classes: names of the class folders; label i means `classes[i]`.
      files: the images, folder by folder.
      labels: int32 class numbers, or float32 years.
    """

    classes: tuple[str, ...]
    files: tuple[Path, ...]
    labels: np.ndarray
    middle: Middle

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(self.files), BATCH):
            rows = slice(start, start + BATCH)
            yield standardise_fixed(self.images(self.files[rows])), self.labels[rows]

    def images(self, files: Sequence[Path]) -> np.ndarray:
        """Return images as the network sees them, before they are standardised: uint8 (n, size, size, 3)."""
        return np.stack([self.middle(read_image(file)) for file in files])


def class_folder(root: Path, middle: Middle, years: bool) -> ClassFolder:
    """List the images of `root/<class>/<image>`; hidden entries are ignored."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected FOLDER/<class>/<image>.")
    folders = [entry for entry in sorted(root.iterdir()) if not entry.name.startswith(".")]
    wrong = [entry for entry in folders if not entry.is_dir()]
    if wrong or not folders:
        found = f"the file {wrong[0].name!r}" if wrong else "nothing"
        raise DataError(f"{root}: found {found}, expected folders of classes only. Is it FOLDER of FOLDER/<class>/..?")
    files = [[file for file in sorted(folder.iterdir()) if not file.name.startswith(".")] for folder in folders]
    for folder, inside in zip(folders, files, strict=True):
        if not inside:
            raise DataError(f"{folder}: found no images, expected at least 1. Remove an empty class from the folder.")
    values = [_age(folder) for folder in folders] if years else list(range(len(folders)))
    labels = np.repeat(np.asarray(values, np.float32 if years else np.int32), [len(inside) for inside in files])
    return ClassFolder(tuple(f.name for f in folders), tuple(itertools.chain(*files)), labels, middle)


def _age(folder: Path) -> float:
    try:
        age = float(folder.name)
    except ValueError:
        age = math.nan
    if not 0 <= age <= 150:
        raise DataError(f"{folder}: is no age in years. With --metric mae a folder is named by an age, as 31 or 31.0.")
    return age


def open_network(preset: Preset, place: Path) -> tuple[pae.Net, pae.State, dict[str, Any]]:
    """Read a stage or a bundle; return the network, its state and what the stage says of its newest task."""
    net, (info, known) = network(preset), open_any(place)
    kernels = {name: entry.head["params"].get("kernel") for name, entry in known.tasks.items() if entry.head}
    for name, kernel in kernels.items():
        if kernel is None:
            raise DataError(f"{place}: task {name!r} has no linear head. Measure a network of facial_modules.py.")
    modules = {name: FeatureHead(kernels[name].shape[-1]) for name in kernels if name == FACE}
    modules = {name: head for name, head in modules.items() if not isinstance(known.tasks[name].head_spec, int)}
    read = pae.load if place.is_dir() else pae.read_bundle
    return net, read(net, place, heads=modules), info.get("metadata", {}).get("record", {})


def pruned_rate(state: pae.State, task: str) -> float:
    """Return free / (free + own) over all shared weights; NaN if there is neither."""
    owners, number = [np.asarray(leaf) for leaf in jax.tree.leaves(state.owner)], state.tasks[task].id
    free, own = (sum(np.count_nonzero(ids == one) for ids in owners) for one in (0, number))
    return free / (free + own) if free + own else math.nan


def trained_classes(place: Path, task: str) -> tuple[str, ...] | None:
    """Return the names of a task's classes in the order of its outputs, from the run of the stage, if known."""
    results = place.parent.parent / "results.json"
    if not (place.is_dir() and results.exists()):
        return None
    names = read_json(results)["classes"].get(task)
    return None if names is None or isinstance(names, int) else tuple(names)


def in_order_of(found: ClassFolder, state: pae.State, task: str, trained: tuple[str, ...] | None) -> ClassFolder:
    """Return a folder with labels in the order of the task's outputs; raise if its classes are not the task's."""
    outputs = state.tasks[task].head["params"]["bias"].shape[-1]
    if len(found.classes) != outputs:
        raise DataError(f"task {task!r} has {outputs} outputs, found the classes {found.classes[:10]} in the folder.")
    if trained is None:
        return found
    if set(trained) != set(found.classes):
        raise DataError(f"task {task!r} was trained on the classes {trained}, found {found.classes[:10]}.")
    places = np.asarray([trained.index(name) for name in found.classes], np.int32)
    return dataclasses.replace(found, classes=trained, labels=places[found.labels])


def measure(net: pae.Net, state: pae.State, task: str, data: ClassFolder, mae: bool) -> dict[str, float]:
    """Return the columns of the measured values."""
    if not mae:
        return {"Acc": pae.evaluate(net, state, task, data)["accuracy"]}
    nearest = AgeError(AGES).nearest_class

    def right(logits: jax.Array, years: jax.Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1) == nearest(years)

    found = pae.evaluate(net, state, task, data, loss=AgeError(AGES), metrics={"Acc": right})
    return {"MAE": found["loss"], "Acc": found["Acc"]}


def verified(net: pae.Net, state: pae.State, options: Any, size: int) -> tuple[dict[str, float], Picture]:
    """Return the columns of verification, and a picture of some pairs."""
    if options.pairs is None:
        raise ArgumentError("the face task is measured on pairs of images: pass --pairs FILE, as LFW's pairs.txt")
    pairs, files = find_images(read_pairs(options.pairs), options.data)
    faces = FaceSet(load_images(files, size), pairs)
    found = faces.verify(faces.embeddings(net, state))
    rows = spread(len(pairs.same), options.pictures)
    shown = [np.concatenate([faces.images[pairs.first[i]], faces.images[pairs.second[i]]], axis=1) for i in rows]
    limits = found.thresholds[found.folds]  # one for each fold, chosen on the others
    texts = [_verdict(float(found.distances[i]), float(limits[i]), bool(pairs.same[i])) for i in rows]
    return {"Acc Mean": found.accuracy, "Acc Std": found.accuracy_std}, drawn(shown, texts)


def _verdict(distance: float, limit: float, same: bool) -> str:
    says, is_so = ("same" if one else "different" for one in (distance < limit, same))
    return f"{says} ({distance:.3f})\ntrue: {is_so}"


def classified(net: pae.Net, state: pae.State, task: str, data: ClassFolder, mae: bool, number: int) -> Picture:
    """Return a picture of some images with the answer and the truth."""
    rows = spread(len(data.files), number)
    images = data.images([data.files[i] for i in rows])
    logits = pae.predict(net, state, task, standardise_fixed(images))
    if mae:
        years = np.asarray(expected_age(logits, AGES))
        texts = [f"{years[n]:.1f}\ntrue: {data.labels[i]:.0f}" for n, i in enumerate(rows)]
    else:
        best = np.argmax(logits, axis=-1)
        texts = [f"{data.classes[best[n]]}\ntrue: {data.classes[data.labels[i]]}" for n, i in enumerate(rows)]
    return drawn(list(images), texts)


def spread(count: int, number: int) -> np.ndarray:
    """Return the positions of a few examples, spread evenly over all."""
    return np.linspace(0, count - 1, min(count, number)).astype(int)


def drawn(images: Sequence[np.ndarray], texts: Sequence[str]) -> Picture:
    """Return images in rows of four, each with a text."""
    rows = -(-len(images) // 4)
    figure = Picture(9, 2.6 * rows)
    panels = figure.subplots(rows, 4, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    for axes, image, text in zip(panels, images, texts, strict=False):
        axes.imshow(image)
        axes.set_title(text, fontsize=8)
    return figure


def append(path: Path, row: dict[str, str]) -> None:
    """Add a row to a CSV file, which is made if there is none."""
    if path.exists():
        with path.open(newline="") as file:
            columns = next(csv.reader(file), [])
        if columns != list(row):
            raise CheckpointError(f"{path}: has other columns than a row of this call; pass another --out.")
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        table = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            table.writeheader()
        table.writerow(row)


def infer(options: argparse.Namespace) -> dict[str, str]:
    """Measure a task; write and return the row."""
    check_count("--pictures", options.pictures, 1)
    preset = PRESETS[options.preset]()
    net, state, record = open_network(preset, options.stage)
    if options.task not in state.tasks:
        raise ArgumentError(f"{options.stage} has the tasks {sorted(state.tasks)}, found --task {options.task}")
    own = record if record.get("task") == options.task else {}
    mae = own.get("metric") == "MAE" if options.metric is None else options.metric == "mae"
    if options.task == FACE:
        values, picture = verified(net, state, options, preset.size)
    else:
        data = class_folder(options.data, Middle(preset.stored, preset.size), mae)
        if not mae:
            data = in_order_of(data, state, options.task, trained_classes(options.stage, options.task))
        values = measure(net, state, options.task, data, mae)
        picture = classified(net, state, options.task, data, mae, options.pictures)
    row = authors_row(state, options.task, pruned_rate(state, options.task), values, str(own.get("kept_epoch", "")))
    append(options.out / f"{options.task}.csv", row)
    picture.savefig(options.out / f"{options.task}.png", dpi=110)
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure a task and print its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", type=Path, help="a stage or a bundle file")
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of the images")
    parser.add_argument("--pairs", type=Path, help="pairs file, for the task 'face'")
    parser.add_argument("--metric", choices=("accuracy", "mae"), help="default: as the stage says, else accuracy")
    parser.add_argument("--preset", choices=PRESETS, default="local", help="the preset that the stage was made with")
    parser.add_argument("--out", type=Path, default=Path("runs/inference"))
    parser.add_argument("--pictures", type=int, default=8, help="how many results the picture shows")
    options = parser.parse_args(arguments)
    try:
        row = infer(options)
    except PaeError as error:
        raise SystemExit(f"inference: {error}") from error
    print("\n".join(f"{name}: {value}" for name, value in row.items()))
    print(f"\n{options.out / options.task}.csv and .png")


if __name__ == "__main__":
    main()
