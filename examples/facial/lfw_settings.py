"""Settings of lfw.py, phase by phase: `local`, `full`, `tiny`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from facial_modules_presets import local

import pae_jax as pae
from pae_jax import recipes
from pae_jax.faces import graphdef

# An inference graph has no means of its norms, so norms are not trained.
RUNG = recipes.Phase(1, recipes.Rate(5e-5, cosine=True), recipes.Adam(), parts=("shared",))


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a run.

    Attributes:
      build: `width -> Linen module`.
      weights: pretrained weights where --weights names none; None starts from random ones.
      size: height and width of the network's images.
      stored: height and width of the faces of which training images are cropped.
      matched: faces on which the unpruned network is matched: of the pack of ages, and of the pack of expressions.
      people: people of ORL that are matched too; the others choose how much is pruned.
      limit: largest numbers of training, validation and test faces of age, gender and expression.
      rungs: fractions to free, one after the other.
      measured: those of them that are measured on LFW.
      epochs: of training one of the three tasks, and of each with its weights pruned.
      again: of how many images the embeddings are computed once more after the three tasks, to compare their bits; None
        takes all, and measures them.
    """

    build: Callable[[float], Any] = pae.models.InceptionResnetV1
    weights: str | None = graphdef.PACKAGE
    size: int = 160
    stored: int = 182
    matched: tuple[int, int] = (2400, 600)
    people: int = 20
    limit: tuple[int, int, int] = (1500, 400, 1500)
    rungs: tuple[float, ...] = (0.15, 0.3, 0.4, 0.5, 0.6, 0.7)
    measured: tuple[float, ...] = (0.5, 0.3, 0.7)
    epochs: tuple[int, int] = (3, 2)
    again: int | None = None

    @property
    def recipe(self) -> pae.Recipe:
        """Recipe of the tasks; its `first` prunes the face task."""
        # The area under the curve of the choosing people may fall by a quarter of a point.
        ladder = recipes.Ladder(self.rungs, RUNG, ramp=0.5, every=5)
        first = pae.Recipe(
            "face", recipes.Phase(0, recipes.Rate(0.0), recipes.Adam()), ladder=ladder, goal=0.0, tolerance=0.0025
        )
        later = local(epochs=self.epochs[0], rungs=(0.4,)).recipe
        assert later.ladder is not None
        phase = dataclasses.replace(later.ladder.phase, epochs=self.epochs[1])
        ladder = dataclasses.replace(later.ladder, phase=phase, choose="best_accuracy", misses=None)
        return dataclasses.replace(later, ladder=ladder, goal=None, first=first)

    @property
    def phases(self) -> dict[str, dict[str, Any]]:
        """What decides the results of each phase beyond its files; those of later ones may change before they begin."""
        recipe, first = self.recipe, self.recipe.first
        assert first is not None
        later = dataclasses.replace(recipe, first=None)
        matched = {"stored": self.stored, "matched": self.matched, "people": self.people, "batch": recipe.batch_size}
        return {
            "unpruned": {"size": self.size},
            "retraining": {**matched, "recipe": first.to_json()},
            "tasks": {"limit": self.limit, "recipe": later.to_json()},
        }


LOCAL = Settings(
    matched=(1300, 300),
    limit=(700, 200, 400),
    rungs=(0.3, 0.5, 0.7),
    epochs=(2, 1),
    again=500,
)
TINY = Settings(
    build=lambda width: pae.models.SmallCNN(width=width, channels=(8, 16), stem=4),
    weights=None,
    size=32,
    stored=36,
    matched=(16, 16),
    people=4,
    limit=(32, 32, 32),
    rungs=(0.5,),
    measured=(0.5,),
    epochs=(1, 2),
)
PRESETS = {"local": LOCAL, "full": Settings(), "tiny": TINY}
