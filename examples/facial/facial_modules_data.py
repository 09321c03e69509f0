"""Data of facial_modules.py from packs: identities of the ORL faces; age group, gender and expression."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from facial_modules_expressions import load_expressions
from facial_modules_presets import ORDER
from PIL import Image

import pae_jax as pae
from pae_jax import data
from pae_jax.faces.images import standardise_fixed
from pae_jax.faces.losses import WeightedSoftmax, class_weights, prelogits_norm, softmax
from pae_jax.faces.packs import AGE_GROUPS, GENDERS, age_group, load_face_pack
from pae_jax.faces.pairs import Pairs, generate_pairs
from pae_jax.faces.scores import Verification
from pae_jax.faces.verification import flip_concat, verify_pairs

BATCH = 50  # evaluation batch; always one size, so that embeddings are bit-identical whenever they are computed
STRANGER = -1  # label of a face whose identity is unknown


@dataclasses.dataclass(frozen=True)
class View:
    """Training images of a task: a random crop and flip of the stored ones, standardised, on the device.

    Attributes:
      size: height and width of the network's input; None leaves the images unchanged.
    """

    size: int | None = None

    def __call__(self, key: jax.Array, x: jax.Array) -> jax.Array:
        """Return float32 images."""
        return standardise_fixed(x if self.size is None else data.random_crop_to(self.size)(key, x))


@dataclasses.dataclass(frozen=True, eq=False)
class Shuffled:
    """Stored training images, uint8: `epoch -> batches`, in an order drawn from the epoch's number."""

    images: np.ndarray
    labels: np.ndarray
    batch: int
    seed: tuple[int, ...]

    def __len__(self) -> int:
        return max(1, len(self.labels) // self.batch)

    def __call__(self, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        order = np.random.default_rng((*self.seed, epoch)).permutation(len(self.labels))
        for start in range(0, len(self) * self.batch, self.batch):
            rows = order[start : start + self.batch]
            yield self.images[rows], self.labels[rows]


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Labelled images for evaluation, standardised batch by batch."""

    images: np.ndarray
    labels: np.ndarray
    size: int

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(self.labels), BATCH):
            rows = slice(start, start + BATCH)
            yield standardise_fixed(data.centre_crop(self.images[rows], self.size)), self.labels[rows]


@dataclasses.dataclass(frozen=True, eq=False)
class FaceSet:
    """Faces and the pairs of them to compare.

    As data of a task it gives images of identities that the head does not know, with label -1.

    Attributes:
      images: uint8 (n, size, size, 3).
      pairs: the pairs of the ten-fold protocol.
      every: pairs for the area under the curve: all possible pairs, or None for those of the protocol.
    """

    images: np.ndarray
    pairs: Pairs
    every: Pairs | None = None

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(self.images), BATCH):
            x = standardise_fixed(self.images[start : start + BATCH])
            yield x, np.full(len(x), STRANGER, np.float32)

    def embeddings(self, net: pae.Net, state: pae.State, task: str = "face") -> np.ndarray:
        """Return the embeddings of faces: features of image and mirror image, each of length 1."""

        def embed(x: Any) -> Any:
            return pae.features(net, state, task, x, batch_size=BATCH)

        return np.concatenate([flip_concat(embed, x) for x, _ in self])

    def verify(self, embeddings: np.ndarray) -> Verification:
        """Return verification by the protocol."""
        return _compare(embeddings, self.pairs, True, "published")

    def curve(self, embeddings: np.ndarray) -> Verification:
        """Return the comparison of every pair at unmodified distances, for the curve and its area."""
        return _compare(embeddings, self.every or self.pairs, self.every is None, "published")

    def threshold(self, embeddings: np.ndarray) -> float:
        """Return the distance below which two pictures show one person, chosen on these pairs."""
        return float(_compare(embeddings, self.pairs, False, "exact").thresholds.mean())


def _compare(embeddings: np.ndarray, pairs: Pairs, subtract_mean: bool, thresholds: Any) -> Verification:
    a, b = embeddings[pairs.first], embeddings[pairs.second]
    options: Any = {"subtract_mean": subtract_mean, "thresholds": thresholds, "skipped": pairs.skipped}
    return verify_pairs(a, b, pairs.same, pairs.folds, **options)


def area(net: pae.Net, state: pae.State, task: str, faces: FaceSet) -> float:
    """Measure of the face task: area under the ROC curve."""
    return faces.curve(faces.embeddings(net, state, task)).auc


@dataclasses.dataclass(frozen=True)
class Retraining:
    """Loss of the face task while it is pruned; needs `FeatureHead`, or no head where there are no classes.

    `identity · CE + matching · |f / |f| - t|² + prelogits · sum |f_i|`, where the first term counts only if the
    identity is known, and t is the direction of the unpruned network's features. In evaluation, without features, only
    the first term counts.

    Attributes:
      classes: identities; 0 learns from targets alone.
      identity: weight of the softmax cross-entropy of identities.
      matching: weight of the distance from the unpruned network; 0 takes labels without targets.
      prelogits: weight of the prelogits norm; 5e-4 in PAE.
    """

    classes: int
    identity: float
    matching: float
    prelogits: float = 0.0

    def __call__(self, out: jax.Array, y: jax.Array) -> jax.Array:
        """Return the loss of each example; y is the label, or label and target."""
        losses = jnp.zeros(len(out), jnp.float32)
        if self.classes:
            labels = (y if y.ndim == 1 else y[:, 0]).astype(jnp.int32)
            known = labels != STRANGER
            entropy = softmax(out[:, : self.classes], jnp.where(known, labels, 0))
            losses = self.identity * jnp.where(known, entropy, 0.0)
        features = out[:, self.classes :]
        if not features.shape[-1]:
            return losses
        if self.matching and y.ndim > 1:
            unit = features / jnp.sqrt(jnp.maximum(jnp.square(features).sum(-1, keepdims=True), 1e-10))
            losses += self.matching * jnp.square(unit - y[:, 1:]).sum(-1)
        return losses + self.prelogits * prelogits_norm(features) if self.prelogits else losses


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled:
    """A task of classes, as for `pae.Task`: its name, its classes by name, its data and its loss."""

    name: str
    classes: tuple[str, ...]
    train: Any
    val: Any
    test: Any
    loss: Any = None

    def task(self, size: int) -> pae.Task:
        """Return the task for images of a size."""
        return pae.Task(self.name, len(self.classes), self.train, self.val, self.test, self.loss, augment=View(size))


@dataclasses.dataclass(frozen=True, eq=False)
class Sources:
    """All data of a run.

    Attributes:
      faces: training data of the face task: images and labels, without the targets of `Retraining`.
      view: converts them to network inputs.
      loss: of the face task.
      val: people that choose the pruning ratio; in no gradient.
      test: people that are only measured.
      tasks: the tasks after the face task, in order.
      sample: uint8 (n, size, size, 3), training faces to measure activations on.
      facts: description and counts of the loaded data.
      checksum: of images and labels, so that a run is only resumed with its own data.
    """

    faces: Any
    view: View
    loss: Retraining
    val: FaceSet
    test: FaceSet
    tasks: tuple[Labelled, ...]
    sample: np.ndarray
    facts: dict[str, Any]
    checksum: int


def local(preset: Any, file: Path, expressions: Path | None, folder: Path | None, key: jax.Array) -> Sources:
    """Load the ORL faces, a pack of faces with age and gender, and a pack of expressions if the experiment has them.

    The first people of ORL are for training, the next for choices, the last only for measurement. The training faces of
    the first pack are also used, without labels, for matching the unpruned network's embeddings.
    """
    orl = data.load_orl(folder).images
    pack = load_face_pack(file, size=preset.stored, limit=preset.faces, progress=True)
    size, (train, val) = preset.size, preset.people
    view_key, crop_key, val_key, test_key, order_key = jax.random.split(key, 5)
    seed = tuple(np.asarray(jax.random.key_data(order_key)).tolist())
    batch = preset.recipe.batch_size

    known = enlarged(orl[:train].reshape(-1, *orl.shape[2:]), round(1.05 * size))
    known, labels = (np.repeat(part, preset.views, 0) for part in (known, np.repeat(np.arange(train), orl.shape[1])))
    images = np.concatenate([cropped(known, size, view_key), cropped(pack.train.images, size, crop_key)])
    labels = np.concatenate([labels, np.full(len(pack.train), STRANGER)]).astype(np.float32)

    def labelled(name: str, classes: Sequence[str], parts: Any, of: Any, loss: Any = None) -> Labelled:
        train = Shuffled(parts.train.images, of(parts.train), batch, seed)
        val, test = (Examples(part.images, of(part), size) for part in (parts.val, parts.test))
        return Labelled(name, tuple(classes), train, val, test, loss)

    tasks = {
        "age": labelled("age", AGE_GROUPS, pack, lambda part: age_group(part.age)),
        "gender": labelled("gender", GENDERS, pack, lambda part: part.gender),
    }
    checked = [orl, *(part for s in (pack.train, pack.val, pack.test) for part in (s.images, s.age, s.gender))]
    facts = {
        "verification": f"ORL: {train} people retrain, {val} choose, {len(orl) - train - val} are measured",
        "labels": _counts(file, pack),
        "retraining": f"{len(images)} views: identities of {train} people, unpruned features of all",
    }
    if expressions is not None:
        faces = load_expressions(expressions, size=preset.stored, limit=preset.expressions)
        weights = class_weights(np.bincount(faces.train.label, minlength=len(faces.names)).tolist())
        loss = WeightedSoftmax(weights)
        tasks["expression"] = labelled("expression", faces.names, faces, lambda part: part.label, loss)
        checked += [part for s in (faces.train, faces.val, faces.test) for part in (s.images, s.label)]
        facts["expressions"] = _counts(expressions, faces)
    return Sources(
        faces=Shuffled(images, labels, batch, seed),
        view=View(),
        loss=Retraining(train, preset.identity, 1.0),
        val=face_set(orl[train : train + val], size, val_key),
        test=face_set(orl[train + val :], size, test_key),
        tasks=tuple(tasks[name] for name in ORDER[preset.experiment]),
        sample=data.centre_crop(pack.train.images[: preset.sample], size),
        facts=facts,
        checksum=_checksum(*checked),
    )


def _counts(file: Path, pack: Any) -> str:
    return f"pack {file.name}: {len(pack.train)} train, {len(pack.val)} validation, {len(pack.test)} test"


def _checksum(*arrays: np.ndarray) -> int:
    found = 0
    for array in arrays:
        found = zlib.crc32(np.ascontiguousarray(array).data, found)
    return found


def enlarged(faces: np.ndarray, size: int) -> np.ndarray:
    """Return grey faces (n, height, width) as RGB images (n, size, size, 3)."""
    large = [np.asarray(Image.fromarray(face).resize((size, size), Image.Resampling.BILINEAR)) for face in faces]
    return np.repeat(np.stack(large)[..., None], 3, axis=-1)


def cropped(images: np.ndarray, size: int, key: jax.Array) -> np.ndarray:
    """Return one random crop and flip of each image, drawn once."""
    crop = jax.jit(data.random_crop_to(size))
    drawn = []
    for start in range(0, len(images), BATCH):
        drawn.append(crop(jax.random.fold_in(key, start), jnp.asarray(images[start : start + BATCH])))
    return np.concatenate(drawn)


def face_set(images: np.ndarray, size: int, key: jax.Array) -> FaceSet:
    """Return people (people, shots, height, width) with pairs drawn for the folds, and all pairs for the curve."""
    people, shots = images.shape[:2]
    identities = np.repeat(np.arange(people), shots)
    first, second = np.triu_indices(len(identities), 1)
    same = identities[first] == identities[second]
    folds = np.zeros(len(same), np.int64)
    for kind in (same, ~same):
        folds[kind] = np.arange(kind.sum()) % 2
    pairs = generate_pairs(identities, key=key, folds=people // 2)
    return FaceSet(enlarged(images.reshape(-1, *images.shape[2:]), size), pairs, Pairs(first, second, same, folds))
