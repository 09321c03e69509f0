"""Data of lfw.py: the pairs of LFW, faces to match the unpruned network on, and the packs of three tasks."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import facial_modules_data as sources
import jax
import numpy as np
from facial_modules_expressions import load_expressions

import pae_jax as pae
from pae_jax import data
from pae_jax.errors import DataError
from pae_jax.faces.images import read_image, standardise_fixed, to_square
from pae_jax.faces.losses import WeightedSoftmax, class_weights
from pae_jax.faces.packs import AGE_GROUPS, GENDERS, age_group, load_face_pack
from pae_jax.faces.pairs import Pairs, find_images, read_pairs
from pae_jax.faces.verification import flip_concat


@dataclasses.dataclass(frozen=True, eq=False)
class Lfw:
    """The images of LFW's pairs, decoded when they are needed.

    Attributes:
      pairs: the pairs; their rows are the images.
      image: row to RGB image, uint8 (height, width, 3).
      size: height and width of the network's images.
    """

    pairs: Pairs
    image: Callable[[int], np.ndarray]
    size: int

    def __len__(self) -> int:
        return len(self.pairs.images)

    def batch(self, rows: Sequence[int]) -> np.ndarray:
        """Return images as the network sees them, float32 (n, size, size, 3)."""
        return standardise_fixed(np.stack([to_square(self.image(row), self.size, None, f"{row}") for row in rows]))


def open_lfw(images: Path, pairs: Path, size: int) -> Lfw:
    """Open LFW: a pack with `names` such as Zoe_0001, or a folder of Zoe/Zoe_0001.jpg."""
    listed = read_pairs(pairs)
    if images.is_dir():
        listed, files = find_images(listed, images)
        return Lfw(listed, lambda row: read_image(files[row]), size)
    pack = data.read_pack(images, {}, ("names",))
    numbers = {name: number for number, name in enumerate(pack.names["names"])}
    wanted = [image.split("/")[1] for image in listed.images]
    missing = [name for name in wanted if name not in numbers]
    if missing:
        raise DataError(
            f"{images}: lacks {len(missing):,} of {len(wanted):,} images of the pairs file, such as {missing[0]}. "
            "Is it the file of these images?"
        )
    place = [numbers[name] for name in wanted]
    return Lfw(listed, lambda row: read_image(pack.encoded(place[row]), name=pack.place(place[row])), size)


def views(
    counts: tuple[int, int, int], stored: int, size: int, paths: tuple[Path, Path, Path | None], key: jax.Array
) -> np.ndarray:
    """Return faces that are in no pair of LFW, each randomly cropped and flipped once: uint8 (n, size, size, 3).

    Args:
      counts: training faces of the pack of ages and of the pack of expressions; people of ORL.
      stored: height and width before the crop.
      size: height and width after it.
      paths: the two packs, and the folder of ORL.
      key: random key of the crops.
    """
    people = data.load_orl(paths[2]).images[: counts[2]]
    pictures = [
        load_face_pack(paths[0], size=stored, limit=(counts[0], 1, 1)).train.images,
        load_expressions(paths[1], size=stored, limit=(counts[1], 1, 1)).train.images,
        sources.enlarged(people.reshape(-1, *people.shape[2:]), stored),
    ]
    keys = jax.random.split(key, len(pictures))
    return np.concatenate([sources.cropped(part, size, one) for part, one in zip(pictures, keys, strict=True)])


def choosing_people(first: int, size: int, orl: Path | None, key: jax.Array) -> sources.FaceSet:
    """Return the people of ORL from number `first` on, who choose how much is pruned."""
    return sources.face_set(data.load_orl(orl).images[first:], size, key)


def tasks(
    limit: tuple[int, int, int], stored: int, size: int, labelled: Path, expressions: Path, batch: int, seed: int
) -> list[pae.Task]:
    """Return age groups, gender and expression, the last with class weights."""
    pack = load_face_pack(labelled, size=stored, limit=limit)
    faces = load_expressions(expressions, size=stored, limit=limit)
    weights = class_weights(np.bincount(faces.train.label, minlength=len(faces.names)).tolist())

    def task(name: str, classes: int, parts: Any, of: Callable[[Any], np.ndarray], loss: Any = None) -> pae.Task:
        train = sources.Shuffled(parts.train.images, of(parts.train), batch, (seed,))
        val, test = (sources.Examples(part.images, of(part), size) for part in (parts.val, parts.test))
        return pae.Task(name, classes, train, val, test, loss, augment=sources.View(size))

    return [
        task("age", len(AGE_GROUPS), pack, lambda part: age_group(part.age)),
        task("gender", len(GENDERS), pack, lambda part: part.gender),
        task("expression", len(faces.names), faces, lambda part: part.label, WeightedSoftmax(weights)),
    ]


def checksum(*files: Path) -> dict[str, int]:
    """Return the CRC-32 of files by name; of a folder, that of the names in it."""
    found = {}
    for file in files:
        content = repr(sorted(entry.name for entry in file.iterdir())).encode() if file.is_dir() else file.read_bytes()
        found[file.name] = zlib.crc32(content)
    return found


def embed(net: pae.Net, state: pae.State, x: np.ndarray) -> np.ndarray:
    """Return embeddings of faces and their mirror images, as the protocol compares them: float32 (n, 1024)."""
    return flip_concat(lambda faces: pae.features(net, state, "face", faces, batch_size=sources.BATCH), x)
