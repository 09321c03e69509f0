"""Learn the superclasses of CIFAR-100 one after the other in one network, by any recipe, and compare with baselines.

Command:   python examples/cifar100/cifar100_20tasks.py --preset small --recipe all --seeds 0 1 2 --out runs/small
           python examples/cifar100/cifar100_20tasks.py --preset paper --recipe cpg --out runs/paper
Data:      CIFAR-100 by tensorflow-datasets, or from a local pack: --data FILE.npz
Expected:  small: one line per method with accuracy and stored bytes; 1 to 6 minutes per method and seed, 2 CPU cores
           paper: the published protocol, averages 67.5 (PackNet), 77.1 (PAE), 80.9 (CPG); hours on a GPU

`paper` is the published protocol (VGG16 with two dense layers of 4096, 20 tasks, 100 epochs), except that every choice
is made on a tenth of the training images and never on test images. `small` is a network of 0.24 million weights, the
first 8 tasks, 15 epochs, a fifth of the training images for validation, and a shorter ladder; all methods share its
network, epochs and optimizer. Every run can be resumed: run the same command again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cifar100_baselines as baselines
import cifar100_report as report
import jax
import jax.numpy as jnp

import pae_jax as pae
from pae_jax import data
from pae_jax.lifelong.recipes import Adam, Expansion, Ladder, Phase, Rate, Recipe, Sgd
from pae_jax.reports import sizes

RECIPES = ("pae", "cpg", "packnet", "piggyback")
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
    recipes: dict[str, Recipe]


def small() -> Preset:
    """Return the protocol for a CPU: a compact network, 8 tasks, short training."""
    sgd = Sgd(momentum=0.9, nesterov=True, weight_decay=5e-4, decayed=("shared", "head"))
    own = Phase(15, Rate(0.05, cosine=True), sgd)
    rung = Phase(4, Rate(0.02, cosine=True), sgd)
    ladder = Ladder((0.4, 0.6, 0.8, 0.9), rung, ramp=2.0, misses=2)
    finetune = Recipe("finetune", own, batch_size=64)
    pae_recipe = dataclasses.replace(
        finetune, name="pae", ladder=ladder, goal="baseline", expansion=Expansion(0.5, 2.0), local_init="newest"
    )
    picks = Rate(2e-3, cosine=True)
    return Preset(
        name="small",
        model=lambda width: pae.models.SmallCNN(width=width, stem=2),
        tasks=8,
        val_fraction=0.2,
        recipes={
            "own": finetune,
            "pae": pae_recipe,
            "cpg": dataclasses.replace(
                pae_recipe,
                name="cpg",
                train=dataclasses.replace(own, pick_rate=picks),
                retrain=dataclasses.replace(rung, pick_rate=Rate(5e-4)),
                expansion=Expansion(0.5, 1.5),
                sharing="picked",
            ),
            "packnet": dataclasses.replace(
                finetune,
                name="packnet",
                ladder=Ladder((0.6,), dataclasses.replace(rung, epochs=8), ramp=0.0, choose="last"),
                local_init="newest",
                allow_empty=True,
            ),
            "piggyback": dataclasses.replace(
                pae.recipes.piggyback(finetune),
                train=Phase(15, picks, Adam(), pick_rate=picks, parts=("head",)),
                batch_size=64,
            ),
        },
    )


def paper() -> Preset:
    """Return the published protocol; its PAE is CPG without picks and retraining, to twice the size."""
    cpg = pae.recipes.cpg()
    return Preset(
        name="paper",
        model=lambda width: pae.models.VGG16(width=width),
        tasks=20,
        val_fraction=0.1,
        recipes={
            "own": pae.recipes.finetune(),
            "cpg": cpg,
            "pae": dataclasses.replace(
                cpg, name="pae", retrain=None, expansion=Expansion(0.5, 2.0), sharing="all", picking=None
            ),
            "packnet": pae.recipes.packnet(),
            "piggyback": pae.recipes.piggyback(),
        },
    )


PRESETS = {"small": small, "paper": paper}


class Stream:
    """The tasks of a run, created on access, and their goals."""

    def __init__(self, preset: Preset, images: Any, seed: int, tasks: int | None):
        self.preset, self.seed = preset, seed
        self.splits = data.superclass_tasks(images, tasks or preset.tasks, val_fraction=preset.val_fraction, seed=seed)
        self.net = pae.linen(preset.model, jnp.zeros((1, 32, 32, 3)))
        self.key = jax.random.key(seed)

    def __len__(self) -> int:
        return len(self.splits)

    def __getitem__(self, index: int) -> pae.Task:
        split = self.splits[index]
        # The padding of the crops is the mean colour, so that all tasks share one compiled step.
        return pae.Task(
            split.name, len(split.classes), split.train, split.val, split.test, augment=data.crop_and_flip(4)
        )


def run_recipe(stream: Stream, method: str, recipe: Recipe, folder: Path, goals: dict[str, float]) -> dict[str, Any]:
    """Learn all tasks by a recipe; return the results as a dict."""
    run = pae.Run(folder)
    state = pae.init(stream.net, jax.random.fold_in(stream.key, 1))
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
        "matrix": result.matrix.values.tolist(),
        "forgetting": result.matrix.forgetting(),
        "width": result.state.width,
        "size_ratio": result.state.width**2,
        "stored_bytes": sizes.stored(stage).total,
        "weights_share": shares,
        "outcomes": [
            {"task": o.task, "status": o.status.name, "pruned": o.pruned, "goal": o.goal, "value": o.value}
            for o in result.outcomes
        ],
        "records": curve,
    }


def run_seed(preset: Preset, images: Any, seed: int, methods: Sequence[str], out: Path, tasks: int | None) -> None:
    """Run methods for a seed; a method whose result file exists is not run again."""
    stream = Stream(preset, images, seed, tasks)
    folder = out / f"seed-{seed}"
    needs_goals = [m for m in methods if m in RECIPES and preset.recipes[m].goal is not None]
    order = [m for m in baselines.METHODS if m in methods or (m == "separate" and needs_goals)]
    goals: dict[str, float] = {}
    for method in [*order, *[m for m in methods if m in RECIPES]]:
        file = folder / f"{method}.json"
        if not file.exists():
            started = time.perf_counter()
            if method in RECIPES:
                recipe = preset.recipes[method]
                found = run_recipe(stream, method, recipe, folder / method, {} if recipe.goal is None else goals)
            else:
                found = baselines.run(method, stream, preset.recipes["own"], folder / method)
            found |= {"seed": seed, "seconds": round(time.perf_counter() - started, 1)}
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found, indent=1) + "\n")
        if method == "separate":
            goals = json.loads(file.read_text())["goals"]


def main() -> None:
    """Run the requested methods, then write table and report of all results in the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--recipe", choices=(*METHODS, "all"), nargs="+", default=["pae"], help="methods to run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tasks", type=int, help="fewer tasks than the preset's")
    parser.add_argument("--data", type=Path, help="a pack of CIFAR-100 (.npz); default: tensorflow-datasets")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar100"), help="folder of the runs")
    options = parser.parse_args()
    preset = PRESETS[options.preset]()
    methods = list(METHODS) if "all" in options.recipe else [m for m in METHODS if m in options.recipe]
    open_folder(options.out, preset, options.tasks)
    images = data.load_cifar100(options.data, superclasses=options.tasks or preset.tasks)
    for seed in options.seeds:
        run_seed(preset, images, seed, methods, options.out, options.tasks)
    results = report.collect(options.out)
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
    record.write_text(json.dumps(mine, indent=1) + "\n")


if __name__ == "__main__":
    main()
