"""Run ways of learning tasks on a pretrained encoder, keep what is finished, and report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import pretrained_packing
import pretrained_report
import pretrained_rivals
from pretrained_encoder import Encoder, Inputs, Task
from pretrained_settings import Result, Settings

import pae_jax as pae
from pae_jax.reports import write_json

APART = ("ncm", "probe", "bitfit", "lora-4", "lora-8", "lora-16", "shira-0.005", "shira-0.01", "full")
TOGETHER = ("joint", "sequential")
WAYS = (*APART, *TOGETHER, *pretrained_packing.WAYS)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a run compares; the order of the tasks matters to the ways that reuse older ones.

    Attributes:
      unlabelled: inputs on which a pruned encoder is retrained to give its former features.
    """

    encoder: Encoder
    tasks: tuple[Task, ...]
    unlabelled: Inputs
    settings: Settings
    seed: int


def add_options(parser: argparse.ArgumentParser, tasks: list[str], out: str) -> None:
    """Add the options that the experiments share."""
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--tasks", nargs="+", default=tasks, help="in order of learning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--quick", action="store_true", help="a tiny encoder and made data; needs no download")


def run(options: argparse.Namespace, title: str, begin: Callable[[int], Experiment]) -> None:
    """Run the requested ways for every seed, then write the table and the picture of all results in the folder."""
    for seed in options.seeds:
        experiment = begin(seed)
        open_folder(options.out, experiment)
        for way in options.ways:
            _run(way, experiment, options.out / f"seed-{seed}" / way)
    results = pretrained_report.collect(options.out, options.tasks)
    text = pretrained_report.table(results)
    page = pretrained_report.write(options.out, title, results, text)
    print(f"\n{text}\n\nreport with a picture: {page}")


def _run(way: str, experiment: Experiment, folder: Path) -> None:
    if way in pretrained_packing.WAYS:
        pack(way, experiment, folder)
        return
    encoder, tasks, settings, seed = experiment.encoder, experiment.tasks, experiment.settings, experiment.seed
    missing = [task for task in tasks if not (folder / f"{task.name}.json").exists()]
    if way in TOGETHER and missing:
        for result in pretrained_rivals.learn_together(way, encoder, tasks, settings, seed):
            _keep(folder, way, result)
    elif way in APART:
        for task in missing:
            _keep(folder, way, pretrained_rivals.learn(way, encoder, task, settings, seed))


def pack(name: str, experiment: Experiment, folder: Path) -> None:
    """Learn the tasks one after the other in one network; every stage is on disk, so that a run can be resumed."""
    encoder, tasks, settings, seed = experiment.encoder, experiment.tasks, experiment.settings, experiment.seed
    if all((folder / f"{task.name}.json").exists() for task in tasks):
        return
    way, net = pretrained_packing.WAYS[name], pretrained_packing.network(encoder)
    first = folder / "stages" / "00-pretrained"
    if not first.exists():
        pae.save(first, pretrained_packing.start(way, encoder, net, experiment.unlabelled, settings, seed))
    state = pae.load(net, first)
    for number, task in enumerate(tasks, start=1):
        stage = folder / "stages" / f"{number:02d}-{task.name}"
        if not stage.exists():
            started, before = time.perf_counter(), state
            state, val, notes = pretrained_packing.learn(way, encoder, net, before, task, settings, seed)
            seconds = time.perf_counter() - started
            state, stored = pretrained_packing.deliver(net, before, state, folder / f"{task.name}.safetensors")
            pae.save(stage, state, metadata={"val": val, "stored": stored, "seconds": seconds, "notes": notes})
        else:
            state = pae.load(net, stage)
        if not (folder / f"{task.name}.json").exists():
            learned = pae.read_metadata(stage)["metadata"]
            _keep(folder, name, pretrained_packing.measured(net, state, task, learned))


def _keep(folder: Path, way: str, result: Result) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{result.task}.json", dataclasses.asdict(result))
    print(f"{way}: {result.task} {result.accuracy:.3f}, {result.stored:,} bytes, {result.seconds:.0f} s", flush=True)


def open_folder(out: Path, experiment: Experiment) -> None:
    """Make the folder of the results, or check that it was begun with the same settings."""
    record, tasks = out / "settings.json", experiment.tasks
    mine = {"encoder": experiment.encoder.name, "tasks": [task.name for task in tasks]}
    mine |= {"train": [len(task.train[1]) for task in tasks], **dataclasses.asdict(experiment.settings)}
    if record.exists() and json.loads(record.read_text("utf-8")) != mine:
        raise SystemExit(f"{out} was begun with other settings ({record}); pass another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(record, mine)
