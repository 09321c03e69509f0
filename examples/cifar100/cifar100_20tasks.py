"""Learn the superclasses of CIFAR-100 one after the other in one network, by any recipe, and compare with baselines.

Command:   python examples/cifar100/cifar100_20tasks.py --preset small --recipe all --seeds 0 1 2 --out runs/small
           python examples/cifar100/cifar100_20tasks.py --preset medium --recipe pae cpg --out runs/medium --minutes 60
           python examples/cifar100/cifar100_20tasks.py --preset paper --recipe cpg --out runs/paper
Data:      CIFAR-100 by tensorflow-datasets, or from a local pack: --data FILE.npz
Expected:  small: one line per method with accuracy and stored bytes; 1 to 6 minutes per method and seed, 2 CPU cores
           medium: the same for all 20 tasks; 20 to 75 minutes for PAE, 13 for separate networks, one seed, one core
           paper: the published protocol, averages 67.5 (PackNet), 77.1 (PAE), 80.9 (CPG); on a GPU

`paper` is the published protocol (VGG16 with two dense layers of 4096, 20 tasks, 100 epochs), except that every choice
is made on a tenth of the training images and never on test images. `small` is a network of 0.24 million weights, the
first 8 tasks, 15 epochs, a fifth of the training images for validation, and a shorter ladder; all methods share its
network and epochs, and a task of PAE or CPG may miss its goal by 0.02, the standard error of an accuracy on its 500
validation images. `medium` is all 20 tasks, 2,500 training and validation images each, a network of 0.37 million
weights, 20 epochs. Every run can be resumed: run the same command again. With --minutes, a run ends after the task or
method at which the time is over; what is finished is in the table, and the rest goes on in the next run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cifar100_baselines as baselines
import cifar100_report as report
import jax
import jax.numpy as jnp

import pae_jax as pae
from pae_jax import data, recipes
from pae_jax.reports import sizes, write_json

RECIPES = ("pae", "cpg", "packnet", "piggyback", "wsn", "supsup", "exssnet")
METHODS = (*RECIPES, *baselines.METHODS)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A protocol: network, data and recipes.

    Attributes:
      model: `width -> Linen module`.
      tasks: how many of the superclasses, in alphabetical order.
      val_fraction: share of the training images used for validation.
      recipes: by method; "own" trains the separate networks, which set the goals.
    """

    name: str
    model: Callable[[float], Any]
    tasks: int
    val_fraction: float
    recipes: dict[str, pae.Recipe]


def small() -> Preset:
    """Return the protocol for a CPU: a compact network, 8 tasks, short training."""
    model = lambda width: pae.models.SmallCNN(width=width, stem=2)  # noqa: E731
    return Preset("small", model, tasks=8, val_fraction=0.2, recipes=_compact(15))


def medium() -> Preset:
    """Return the protocol of all 20 tasks on a CPU: 20 to 75 minutes for PAE and one seed on one core."""
    model = lambda width: pae.models.SmallCNN(width=width, channels=(40, 80, 160, 160), stem=2)  # noqa: E731
    return Preset("medium", model, tasks=20, val_fraction=0.2, recipes=_compact(20, gain=0.05))


def _compact(epochs: int, gain: float | None = None) -> dict[str, pae.Recipe]:
    """Return the recipes of the CPU protocols, which train as long as each other and by one optimizer per kind."""
    sgd = recipes.Sgd(momentum=0.9, nesterov=True, weight_decay=5e-4, decayed=("shared", "head"))
    own = recipes.Phase(epochs, recipes.Rate(0.05, cosine=True), sgd)
    rung = recipes.Phase(4, recipes.Rate(0.02, cosine=True), sgd)
    ladder = recipes.Ladder((0.4, 0.6, 0.8, 0.9), rung, ramp=2.0, misses=2, gain=gain)
    finetune = pae.Recipe("finetune", own, batch_size=64)
    pae_recipe = dataclasses.replace(
        finetune,
        name="pae",
        ladder=ladder,
        goal="baseline",
        tolerance=0.02,  # the rule of one standard error: Breiman et al., CART, 1984
        expansion=recipes.Expansion(0.5, 2.0),
        local_init="newest",
    )
    return {
        "own": finetune,
        "pae": pae_recipe,
        "cpg": dataclasses.replace(
            pae_recipe,
            name="cpg",
            train=dataclasses.replace(own, pick_rate=recipes.Rate(2e-3, cosine=True)),
            retrain=dataclasses.replace(rung, pick_rate=recipes.Rate(5e-4)),
            expansion=recipes.Expansion(0.5, 1.5),
            sharing="picked",
        ),
        "packnet": dataclasses.replace(
            finetune,
            name="packnet",
            ladder=recipes.Ladder((0.6,), dataclasses.replace(rung, epochs=8), ramp=0.0, choose="last"),
            local_init="newest",
            allow_empty=True,
        ),
        **_masks(epochs, finetune),
    }


def _masks(epochs: int, finetune: pae.Recipe) -> dict[str, pae.Recipe]:
    """Return the published recipes that learn masks, in fewer epochs, with rates that fall to 0 over them."""
    picks, rate = recipes.Rate(2e-3, cosine=True), recipes.Rate(2e-3, cosine=True)
    piggyback, wsn = recipes.piggyback(finetune), recipes.wsn(0.3)
    supsup, exssnet = recipes.supsup(0.3), recipes.exssnet(0.3)
    scores, weights = exssnet.head_first, exssnet.train
    assert scores is not None
    half = {"epochs": epochs // 2, "rate": rate}
    return {
        "piggyback": dataclasses.replace(
            piggyback,
            train=recipes.Phase(epochs, picks, recipes.Adam(), pick_rate=picks, parts=("head",)),
            batch_size=64,
        ),
        "wsn": dataclasses.replace(wsn, train=recipes.Phase(epochs, rate, recipes.Adam(), pick_rate=rate)),
        "supsup": dataclasses.replace(
            supsup, train=dataclasses.replace(supsup.train, epochs=epochs, rate=rate, pick_rate=rate), batch_size=64
        ),
        "exssnet": dataclasses.replace(
            exssnet,
            head_first=dataclasses.replace(scores, pick_rate=rate, **half),
            train=dataclasses.replace(weights, epochs=epochs - epochs // 2, rate=rate),
        ),
    }


def paper() -> Preset:
    """Return the published protocol; its PAE is CPG without picks and retraining, to twice the size."""
    cpg = recipes.cpg()
    return Preset(
        name="paper",
        model=lambda width: pae.models.VGG16(width=width),
        tasks=20,
        val_fraction=0.1,
        recipes={
            "own": recipes.finetune(),
            "cpg": cpg,
            "pae": dataclasses.replace(
                cpg, name="pae", retrain=None, expansion=recipes.Expansion(0.5, 2.0), sharing="all", picking=None
            ),
            "packnet": recipes.packnet(),
            "piggyback": recipes.piggyback(),
            "wsn": recipes.wsn(),
            "supsup": recipes.supsup(),
            "exssnet": recipes.exssnet(),
        },
    )


PRESETS = {"small": small, "medium": medium, "paper": paper}


class TimeIsOver(Exception):
    """The minutes of this run are over; the next one goes on."""


class Stream:
    """The tasks of a run, created on access; none after the deadline, in seconds of `time.monotonic`."""

    def __init__(self, preset: Preset, images: Any, seed: int, tasks: int | None, deadline: float = math.inf):
        self.preset, self.seed, self.deadline = preset, seed, deadline
        self.splits = data.superclass_tasks(images, tasks or preset.tasks, val_fraction=preset.val_fraction, seed=seed)
        self.net = pae.linen(preset.model, jnp.zeros((1, 32, 32, 3)))
        self.key = jax.random.key(seed)

    def __len__(self) -> int:
        return len(self.splits)

    def __getitem__(self, index: int) -> pae.Task:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if time.monotonic() > self.deadline:
            raise TimeIsOver
        return self.task(index)

    def task(self, index: int) -> pae.Task:
        """Return a task, whatever the time."""
        split = self.splits[index]
        # The padding of the crops is the mean colour, so that all tasks share one compiled step.
        return pae.Task(
            split.name, len(split.classes), split.train, split.val, split.test, augment=data.crop_and_flip(4)
        )


def run_recipe(
    stream: Stream, method: str, recipe: pae.Recipe, folder: Path, goals: dict[str, float]
) -> dict[str, Any]:
    """Learn all tasks by a recipe; return the results as a dict."""
    run = pae.Run(folder)
    state = pae.init(stream.net, jax.random.fold_in(stream.key, 1))
    if recipe.picking is not None and recipe.picking.top is not None and not recipe.picking.own:
        state = pae.pack(stream.net, state, "random weights", head=None, key=jax.random.fold_in(stream.key, 2))
        state = pae.freeze(state, "random weights")
    # learn_all accepts any sequence of tasks, also one that creates them on access.
    options: Any = {"key": stream.key, "run": run, "goals": goals, "progress": True}
    result = pae.learn_all(stream.net, state, stream, recipe, **options)  # pyright: ignore
    pae.verify(result.state)
    assert result.matrix is not None
    last = result.outcomes[-1]
    if not last.status.added:
        raise SystemExit(f"{method}, seed {stream.seed}: {last}")
    stage = folder / f"{len(result.state.tasks):02d}-{last.task}" / "frozen"
    shares = {row["task"]: row["share"] for row in pae.report(result.state).rows}
    curve = [[record.to_json() for record in outcome.records] for outcome in result.outcomes]
    return {
        "method": method,
        "tasks": list(result.matrix.tasks),
        "test": [float(v) for v in result.matrix.values[-1]],
        "matrix": report.measured(result.matrix.values),
        "forgetting": result.matrix.forgetting(),
        "width": result.state.width,
        "size_ratio": result.state.width**2,
        "stored_bytes": sizes.stored(stage).total,
        "bundle_bytes": baselines.bundle_bytes(stream.net, result.state),
        "reused": {row["task"]: row["reused"] for row in pae.transfer(result.state).rows},
        "weights_share": shares,
        "outcomes": [
            {"task": o.task, "status": o.status.name, "pruned": o.pruned, "goal": o.goal, "value": o.value}
            for o in result.outcomes
        ],
        "records": curve,
    }


def run_seed(stream: Stream, methods: Sequence[str], out: Path) -> None:
    """Run methods for a seed; a method whose result file exists is not run again."""
    preset, seed = stream.preset, stream.seed
    folder = out / f"seed-{seed}"
    needs_goals = [m for m in methods if m in RECIPES and preset.recipes[m].goal is not None]
    order = [m for m in baselines.METHODS if m in methods or (m == "separate" and needs_goals)]
    goals: dict[str, float] = {}
    for method in [*order, *[m for m in methods if m in RECIPES]]:
        file = folder / f"{method}.json"
        if not file.exists():
            spent = folder / f"{method}.seconds"
            earlier, started = float(spent.read_text()) if spent.exists() else 0.0, time.perf_counter()
            folder.mkdir(parents=True, exist_ok=True)
            try:
                if method in RECIPES:
                    recipe = preset.recipes[method]
                    found = run_recipe(stream, method, recipe, folder / method, {} if recipe.goal is None else goals)
                else:
                    found = baselines.run(method, stream, preset.recipes["own"], folder / method)
            finally:
                seconds = round(earlier + time.perf_counter() - started, 1)
                spent.write_text(f"{seconds}\n")
            found |= {"seed": seed, "seconds": seconds}
            write_json(file, found)
        if method == "separate":
            goals = json.loads(file.read_text())["goals"]


def main() -> None:
    """Run the requested methods, then write table and report of all results in the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--recipe", choices=(*METHODS, "all"), nargs="+", default=["pae"], help="methods to run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tasks", type=int, help="fewer tasks than the preset's")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end after the task at which they are over")
    parser.add_argument("--data", type=Path, help="a pack of CIFAR-100 (.npz); default: tensorflow-datasets")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar100"), help="folder of the runs")
    options = parser.parse_args()
    preset = PRESETS[options.preset]()
    methods = list(METHODS) if "all" in options.recipe else [m for m in METHODS if m in options.recipe]
    open_folder(options.out, preset, options.tasks)
    images = data.load_cifar100(options.data, superclasses=options.tasks or preset.tasks)
    deadline = time.monotonic() + 60 * options.minutes
    try:
        for seed in options.seeds:
            run_seed(Stream(preset, images, seed, options.tasks, deadline), methods, options.out)
    except TimeIsOver:
        print("the time is over; the same command goes on")
    results = report.collect(options.out)
    if not results:
        return
    text = report.table(results)
    page = report.write(options.out, preset.name, results, text)
    print(f"\n{text}\n\nreport with pictures: {page}")


def open_folder(out: Path, preset: Preset, tasks: int | None) -> None:
    """Make the folder of the runs, or check that it was started with the same settings."""
    record = out / "settings.json"
    mine = {
        "preset": preset.name,
        "tasks": tasks or preset.tasks,
        "val_fraction": preset.val_fraction,
        "recipes": {name: recipe.to_json() for name, recipe in preset.recipes.items()},
    }
    mine = json.loads(json.dumps(mine))
    if record.exists() and json.loads(record.read_text()) != mine:
        raise SystemExit(f"{out} was begun with other settings ({record}); pass another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(record, mine)


if __name__ == "__main__":
    main()
