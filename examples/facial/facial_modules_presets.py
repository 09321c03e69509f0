"""Protocols of facial_modules.py: `local`, `paper`, `tiny`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pae_jax as pae
from pae_jax.faces import graphdef
from pae_jax.lifelong.recipes import Adam, Ladder, Phase, Rate, Recipe

HEAD = Phase(3, Rate(1e-2), keep="last", parts=("head",))  # as in the paper's baselines


@dataclasses.dataclass(frozen=True)
class Preset:
    """A protocol.

    Attributes:
      build: `width -> Linen module`.
      weights: pretrained weights where --weights names none; None starts from random ones.
      size: height and width of the network's images.
      stored: height and width of the stored images, which are cropped for training.
      recipe: of age and gender; its `first` is that of the face task.
      own: of the separate networks, which set the goals of age and gender.
      faces: largest numbers of training, validation and test faces of the pack; None takes all.
      people: of ORL: how many for retraining and how many for choices; the others are measured.
      views: random crops of each image of these people.
      identity: weight of the identity loss relative to matching the unpruned network.
      sample: training faces on which the lost means of batch norms are measured.
      val_identities: of VGGFace2: how many are used for choices.
    """

    name: str
    build: Callable[[float], Any]
    weights: str | None
    size: int
    stored: int
    recipe: Recipe
    own: Recipe
    faces: tuple[int | None, int | None, int | None] = (None, None, None)
    people: tuple[int, int] = (20, 10)
    views: int = 2
    identity: float = 0.1
    sample: int = 512
    val_identities: int = 100


def local(
    build: Callable[[float], Any] = pae.models.InceptionResnetV1,
    epochs: int = 3,
    rungs: tuple[float, ...] = (0.4, 0.6),
) -> Preset:
    """Return the protocol for a CPU: fewer and smaller faces, short training, small steps of the pretrained network."""
    # Norms are not trained: their running statistics, with momentum 0.995, would not converge in so few steps.
    parts = ("shared", "head")
    train = Phase(epochs, Rate(2e-4, cosine=True), Adam(), parts=parts)
    # At a rate of 2e-4 the first two steps take the network further from the unpruned one than pruning does.
    face_rung = Phase(1, Rate(3e-5, cosine=True), Adam(), parts=parts)
    # The area under the curve on the validation people may fall by a quarter of a point.
    ladder = Ladder((0.2, 0.4, 0.5), face_rung, ramp=0.5, every=5, misses=1)
    head = dataclasses.replace(HEAD, optimizer=Adam())
    face = Recipe("face", head, ladder=ladder, goal=0.0, tolerance=0.0025)
    own = Recipe("finetune", train, head_first=dataclasses.replace(HEAD, epochs=2))
    recipe = dataclasses.replace(
        own,
        name="pae",
        ladder=Ladder(rungs, Phase(2, Rate(5e-5, cosine=True), Adam(), parts=parts), ramp=0.5, every=5, misses=2),
        goal="baseline",
        tolerance=0.005,
        local_init="newest",
        first=face,
    )
    return Preset("local", build, graphdef.PACKAGE, 128, 146, recipe, own, faces=(1200, None, None))


def paper() -> Preset:
    """Return the published protocol: the most accurate rung on validation data, no expansion in experiment 1."""
    recipe = pae.recipes.pae()
    assert recipe.ladder is not None
    ladder = dataclasses.replace(recipe.ladder, choose="best_accuracy")
    head = dataclasses.replace(HEAD, optimizer=recipe.train.optimizer)
    face = Recipe("face", dataclasses.replace(head, epochs=1), batch_size=recipe.batch_size, ladder=ladder)
    return Preset(
        "paper",
        pae.models.InceptionResnetV1,
        graphdef.PACKAGE,
        160,
        182,
        dataclasses.replace(recipe, ladder=ladder, expansion=None, first=face),
        Recipe("finetune", recipe.train, recipe.batch_size, head_first=head),
    )


def tiny() -> Preset:
    """Return the protocol of `local` for a small network without pretrained weights, for tests."""
    preset = local(lambda width: pae.models.SmallCNN(width=width, channels=(8, 16), stem=4), 2, (0.5,))
    first = preset.recipe.first
    assert first is not None and first.ladder is not None
    face = dataclasses.replace(
        first,
        train=dataclasses.replace(first.train, epochs=1),
        ladder=dataclasses.replace(first.ladder, rungs=(0.4, 0.6)),
    )
    return dataclasses.replace(
        preset,
        name="tiny",
        weights=None,
        size=32,
        stored=36,
        recipe=dataclasses.replace(preset.recipe, first=face),
        faces=(64, 32, 32),
        people=(4, 4),
        sample=32,
        val_identities=4,
    )


PRESETS: dict[str, Callable[[], Preset]] = {"local": local, "paper": paper, "tiny": tiny}
