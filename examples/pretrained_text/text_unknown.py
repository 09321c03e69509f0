"""The task of a sentence is not told: the ten domains of CLINC150 as ten tasks, found by their answers.

Command:   python examples/pretrained_text/text_unknown.py --data FOLDER --out runs/unknown
Data:      as for pretrained_text.py, with clinc150.labels.json (the intents, in order of their numbers) and
           clinc_domains.json (`{domain: intents}`)
Expected:  per way and rule: how often the domain is found, and how often domain and intent are right

A task is inferred by the most confident or the least uncertain answer of all tasks, or by the nearest class mean of the
pretrained features, which needs nothing learned. "told" is the accuracy when the domain is known.

Every finished task is kept in the output folder: run the same command again to go on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import pae_jax as pae
from pae_jax.reports import text_table

sys.path.insert(0, str(Path(__file__).parents[1] / "pretrained"))

import pretrained_packing
import pretrained_rivals
import pretrained_run
import text_encoder
import text_tasks
from pretrained_run import Experiment
from pretrained_settings import Settings
from text_encoder import TextEncoder
from text_tasks import Limits, TextTask

Logits = Mapping[str, np.ndarray]
"""`{task: (n, classes)}` of every task for the same sentences."""


def main() -> None:
    """Learn the domains by LoRA and by packing, then find the domain of every test sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="folder of a BERT encoder; default: the installed package")
    parser.add_argument("--out", type=Path, default=Path("runs/unknown"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    encoder = text_encoder.load(options.model)
    tasks = domains(options.data, encoder, options.seed)
    experiment = Experiment(encoder.encoder, tasks, None, Settings(epochs=options.epochs), options.seed)
    pretrained_run.open_folder(options.out, experiment)
    rows = compare(experiment, options.out)
    (options.out / "unknown.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n", "utf-8")
    columns = ["way", "rule", "domain found", "both right"]
    print(text_table(columns, [[r["way"], r["rule"], f"{r['domain']:.4f}", f"{r['both']:.4f}"] for r in rows]))


def domains(folder: Path, encoder: TextEncoder, seed: int) -> tuple[TextTask, ...]:
    """Return one task per domain of CLINC150."""
    intents = json.loads((folder / "clinc150.labels.json").read_text("utf-8"))
    parts = {part: text_tasks.read_lines(folder, f"clinc150.{part}") for part in ("train", "val", "test")}
    tasks = []
    for name, own in json.loads((folder / "clinc_domains.json").read_text("utf-8")).items():
        lines = {part: [row for row in rows if intents[int(row[0])] in own] for part, rows in parts.items()}
        tasks.append(text_tasks.make_task(name, lines, encoder.tokenise, Limits(), seed))
    return tuple(tasks)


def compare(experiment: Experiment, out: Path) -> list[dict[str, Any]]:
    """Return the accuracy of every way and rule on the test sentences of all tasks."""
    encoder, tasks = experiment.encoder, experiment.tasks
    length = max(task.test[0]["ids"].shape[1] for task in tasks)
    x = text_tasks.joined([task.test[0] for task in tasks], length)
    owner = np.repeat(np.arange(len(tasks)), [len(task.test[1]) for task in tasks])
    y = np.concatenate([task.test[1] for task in tasks])
    means = np.concatenate(
        [
            pretrained_rivals.class_means(
                pretrained_rivals.features_of(encoder, task.train[0]), task.train[1], task.classes
            )
            for task in tasks
        ]
    )
    of_mean = np.repeat(np.arange(len(tasks)), [task.classes for task in tasks])
    nearest = pretrained_rivals.nearest(means, pretrained_rivals.features_of(encoder, x))
    first = np.concatenate([np.arange(task.classes) for task in tasks])
    rows = [_row("ncm", "nearest class mean", of_mean[nearest], first[nearest], owner, y)]
    found = {"lora-8": _lora(experiment, out / "lora-8", x), "expand": _packed(experiment, out / "expand", x)}
    for way, logits in found.items():
        answers = np.stack([logits[task.name].argmax(axis=1) for task in tasks])
        rules = {"told": owner, "nearest class mean": of_mean[nearest], **chosen(logits)}
        every = np.arange(len(y))
        rows += [_row(way, rule, task, answers[task, every], owner, y) for rule, task in rules.items()]
    return rows


def chosen(logits: Logits) -> dict[str, np.ndarray]:
    """Return the number of the task that each rule chooses per sentence."""
    scores: dict[str, list[np.ndarray]] = {"confidence": [], "entropy": []}
    for found in logits.values():
        shifted = found - found.max(axis=1, keepdims=True)
        logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        scores["confidence"].append(logs.max(axis=1))
        scores["entropy"].append((np.exp(logs) * logs).sum(axis=1) / np.log(found.shape[1]))
    return {rule: np.stack(values).argmax(axis=0) for rule, values in scores.items()}


def _row(way: str, rule: str, task: np.ndarray, answer: np.ndarray, owner: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    right = task == owner
    return {"way": way, "rule": rule, "domain": float(right.mean()), "both": float((right & (answer == y)).mean())}


def _lora(experiment: Experiment, folder: Path, x: Any) -> Logits:
    folder.mkdir(exist_ok=True)
    logits = {}
    for task in experiment.tasks:
        kept = folder / f"{task.name}.npy"
        if not kept.exists():
            changes, params, _ = pretrained_rivals.fitted(
                "lora-8", experiment.encoder, task, experiment.settings, experiment.seed
            )
            with kept.with_suffix(".part").open("wb") as file:
                np.save(file, pretrained_rivals.logits_of(changes, params, "own", x))
            kept.with_suffix(".part").rename(kept)
            print(f"lora-8: {task.name} learned", flush=True)
        logits[task.name] = np.load(kept)
    return logits


def _packed(experiment: Experiment, folder: Path, x: Any) -> Logits:
    pretrained_run.pack("expand", experiment, folder)
    net = pretrained_packing.network(experiment.encoder)
    state = pae.load(net, max((folder / "stages").iterdir()))
    server = pae.Server(net, state, tasks=[task.name for task in experiment.tasks])
    return {name: np.asarray(found) for name, found in server.infer_task(x, batch_size=128).logits.items()}


if __name__ == "__main__":
    main()
