"""Protocols of facial_modules.py: `local`, `paper`, `tiny`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import pae_jax as pae
from pae_jax import recipes
from pae_jax.faces import graphdef

Experiment = Literal[1, 2, "cpg"]
# The tasks after the face task, in order; "cpg" is the experiment with faces of CPG.
ORDER: dict[Experiment, tuple[str, ...]] = {
    1: ("age", "gender"),
    2: ("expression", "gender"),
    "cpg": ("gender", "expression", "age"),
}
HEAD = recipes.Phase(3, recipes.Rate(1e-2), keep="last", parts=("head",))  # as in the paper's baselines


@dataclasses.dataclass(frozen=True)
class Preset:
    """A protocol.

    Attributes:
      build: `width -> Linen module`.
      weights: pretrained weights where --weights names none; None starts from random ones.
      size: height and width of the network's images.
      stored: height and width of the stored images, which are cropped for training.
      recipe: of the tasks after the face task, whose recipe is its `first`.
      own: of the separate networks; where `recipe` has a goal, they set it.
      grown: of the last task, for which the network is first expanded to a size ratio of 1.2; None does not expand.
      keep: which stages stay on disk, as for `pae.Run`; all are measured on test data and reported.
      experiment: of the paper: 1 is face, age, gender; 2 is face, expression, gender; see `ORDER`.
      faces: largest numbers of training, validation and test faces of the pack; None takes all.
      expressions: the same of the pack of expressions.
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
    recipe: pae.Recipe
    own: pae.Recipe
    faces: tuple[int | None, int | None, int | None] = (None, None, None)
    expressions: tuple[int | None, int | None, int | None] = (None, None, None)
    people: tuple[int, int] = (20, 10)
    views: int = 2
    identity: float = 0.1
    sample: int = 512
    val_identities: int = 100
    grown: pae.Recipe | None = None
    experiment: Experiment = 1
    keep: Literal["frozen", "all"] = "frozen"

    @property
    def recipes(self) -> dict[str, pae.Recipe | None]:
        """The recipes by the names of their fields."""
        return {"recipe": self.recipe, "own": self.own, "grown": self.grown}

    def with_classifier(self) -> Preset:
        """Return the protocol for a network whose classifier of identities is kept, so that it is not trained first."""
        first = self.recipe.first
        assert first is not None
        first = dataclasses.replace(first, train=dataclasses.replace(first.train, epochs=0))
        return dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, first=first))


def local(
    experiment: Literal[1, 2] = 1,
    build: Callable[[float], Any] = pae.models.InceptionResnetV1,
    epochs: int = 3,
    rungs: tuple[float, ...] = (0.4, 0.6),
) -> Preset:
    """Return the protocol for a CPU: fewer and smaller faces, short training, small steps of the pretrained network."""
    # Norms are not trained: their running statistics, with momentum 0.995, would not converge in so few steps.
    parts = ("shared", "head")
    train = recipes.Phase(epochs, recipes.Rate(2e-4, cosine=True), recipes.Adam(), parts=parts)
    # At a rate of 2e-4 the first two steps take the network further from the unpruned one than pruning does.
    face_rung = recipes.Phase(1, recipes.Rate(3e-5, cosine=True), recipes.Adam(), parts=parts)
    # The area under the curve on the validation people may fall by a quarter of a point.
    ladder = recipes.Ladder((0.2, 0.4, 0.5), face_rung, ramp=0.5, every=5, misses=1)
    # After SGD at 1e-2 for the head, a separate network tells 0.37 of the validation expressions; after this, 0.53.
    head = dataclasses.replace(HEAD, rate=recipes.Rate(3e-3, cosine=True), optimizer=recipes.Adam())
    face = pae.Recipe("face", head, ladder=ladder, goal=0.0, tolerance=0.0025)
    own = pae.Recipe("finetune", train, head_first=dataclasses.replace(head, epochs=2))
    recipe = dataclasses.replace(
        own,
        name="pae",
        ladder=recipes.Ladder(
            rungs,
            recipes.Phase(2, recipes.Rate(5e-5, cosine=True), recipes.Adam(), parts=parts),
            ramp=0.5,
            every=5,
            misses=2,
        ),
        goal="baseline",
        tolerance=0.005,
        local_init="newest",
        first=face,
    )
    grown = dataclasses.replace(recipe, sharing="first", first=None) if experiment == 2 else None
    preset = Preset("local", build, graphdef.PACKAGE, 128, 146, recipe, own, grown=grown, experiment=experiment)
    # The head of a frozen FaceNet tells 0.26 of the validation expressions by 1,200 faces, 0.40 by 2,400.
    return dataclasses.replace(preset, faces=(1200, None, None), expressions=(3000, 2000, None))


def paper(experiment: Literal[1, 2] = 1) -> Preset:
    """Return the published protocol: all nine rungs, of which the most accurate on validation data is kept.

    The separate networks start from FaceNet, head first, and train at 0.01 in experiment 1 and 0.002 in experiment 2.
    """
    recipe = recipes.pae(experiment=experiment)
    head = dataclasses.replace(HEAD, optimizer=recipe.train.optimizer)
    own = recipe.train if experiment == 1 else dataclasses.replace(recipe.train, rate=recipes.Rate(2e-3))
    rungs = recipes.pae(experiment=1).ladder
    face = pae.Recipe("face", dataclasses.replace(head, epochs=1), batch_size=recipe.batch_size, ladder=rungs)
    return Preset(
        "paper",
        pae.models.InceptionResnetV1,
        graphdef.PACKAGE,
        160,
        182,
        dataclasses.replace(recipe, first=face),
        pae.Recipe("finetune", own, recipe.batch_size, head_first=head),
        grown=recipes.pae(experiment=2, expanded=True) if experiment == 2 else None,
        experiment=experiment,
        keep="all",
    )


def tiny(experiment: Literal[1, 2] = 1) -> Preset:
    """Return the protocol of `local` for a small network without pretrained weights, for tests."""
    preset = local(experiment, lambda width: pae.models.SmallCNN(width=width, channels=(8, 16), stem=4), 2, (0.5,))
    first = preset.recipe.first
    assert first is not None and first.ladder is not None
    face = dataclasses.replace(
        first,
        train=dataclasses.replace(first.train, epochs=1),
        ladder=dataclasses.replace(first.ladder, rungs=(0.4, 0.6)),
    )
    if experiment == 2:  # its tests need no other phase
        own, grown = (dataclasses.replace(one, head_first=None) for one in (preset.own, preset.grown or preset.own))
        recipe = dataclasses.replace(preset.recipe, head_first=None)
        preset = dataclasses.replace(preset, own=own, grown=grown, recipe=recipe)
    return dataclasses.replace(
        preset,
        name="tiny",
        weights=None,
        size=32,
        stored=36,
        recipe=dataclasses.replace(preset.recipe, first=face),
        faces=(64, 32, 32),
        expressions=(64, 32, 32),
        people=(4, 4),
        sample=32,
        val_identities=4,
    )


PRESETS: dict[str, Callable[..., Preset]] = {"local": local, "paper": paper, "tiny": tiny}
