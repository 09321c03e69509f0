"""Kills a lifelong run 30 times with kill -9, resumes it each time, and compares the result with an uninterrupted run.

Command:   python benchmarks/kill_resume.py
Expected:  "equal": true. Every array of every frozen stage, the table, the records and the accuracies are the same
           bits; 5 to 10 minutes on one core, most of it start-up and compilation of the killed processes
Writes:    benchmarks/results/kill_resume.json

The run learns three tasks and uses every kind of stage: own networks, expansion, a ladder, picks, retraining. Two of
three kills come after a random time between the start of a process and some stages later. Every third kill waits until
a stage is being written and comes a random few milliseconds after its first file. When a run finishes between two
kills, it is compared and the next run starts in a new folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np

import pae_jax as pae
from pae_jax.lifelong.recipes import Expansion, Ladder, Phase, Rate, Recipe

POLL = 0.003
LONGEST_WRITE = 0.06


def tasks(examples: int = 2048, features: int = 16) -> list[pae.Task]:
    """Return three tasks that a network learns in seconds."""
    rng = np.random.default_rng(0)
    found = []
    for number, name in enumerate(("first", "second", "third")):
        x = rng.normal(size=(2 * examples, features)).astype(np.float32)
        y = (x[:, number] * x[:, number + 1] + 0.5 * x[:, -1] > 0).astype(np.int32)
        half = examples // 2
        parts = (x[:examples], y[:examples]), (x[-half:], y[-half:]), (x[-2 * half : -half], y[-2 * half : -half])
        found.append(pae.Task(name, 2, *parts, metric=pae.Metric("accuracy", _stricter)))
    return found


def _stricter(net: pae.Net, state: pae.State, task: str, data: Any) -> float:
    """Measure the accuracy; for the second task return less than half of it until the network is expanded."""
    accuracy = pae.evaluate(net, state, task, data)["accuracy"]
    return 0.45 * accuracy if task == "second" and len(state.tasks) > 1 and not state.growth else accuracy


def recipe() -> Recipe:
    """Return a recipe in which every kind of stage occurs."""
    train = Phase(8, Rate(0.05), pick_rate=Rate(2e-3))
    rung = Phase(4, Rate(0.02, cosine=True))
    return Recipe(
        "small",
        train,
        batch_size=32,
        ladder=Ladder((0.3, 0.5, 0.7), rung, ramp=2.0, choose="last"),
        retrain=Phase(4, Rate(0.01), pick_rate=Rate(1e-3)),
        goal="baseline",
        tolerance=0.1,
        expansion=Expansion(0.5, 1.5),
        sharing="picked",
        local_init="newest",
    )


def work(folder: Path) -> None:
    """Learn the tasks in a folder, new or left by a killed process."""
    given = tasks()
    net = pae.linen(lambda width: pae.models.MLP(width, (64, 32)), jnp.zeros((1, given[0].train[0].shape[1])))
    state = pae.init(net, jax.random.key(0))
    pae.learn_all(net, state, given, recipe(), key=jax.random.key(1), run=pae.Run(folder))


def facts(folder: Path) -> dict[str, Any]:
    """Return the results that must not depend on kills: checksums of all arrays, table, records, accuracies."""
    stages = {stage.parent.name: pae.read_metadata(stage) for stage in sorted(folder.glob("*/frozen"))}
    files = [folder / "stages.csv", folder / "accuracy.json", *sorted(folder.glob("*/records.json"))]
    return {
        "arrays": {name: info["arrays"] for name, info in stages.items()},
        "metadata": {name: info["metadata"] for name, info in stages.items()},
        "texts": {str(file.relative_to(folder)): file.read_text() for file in files},
    }


def events(folder: Path) -> list[dict[str, Any]]:
    """Return the events of a run so far."""
    file = folder / "events.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]  # a kill may leave the last line incomplete


def half_written(folder: Path) -> set[tuple[str, int]]:
    """Return the stages that are on disk under their temporary name, identified by inode."""
    found = set()
    for entry in folder.glob("*/.saving-*/stage*"):
        with contextlib.suppress(FileNotFoundError):  # it was renamed a moment ago
            found.add((str(entry), entry.stat().st_ino))
    return found


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Start a process that works in a folder."""
    return subprocess.Popen([sys.executable, __file__, "--worker", str(folder)], stdout=subprocess.DEVNULL)


def uninterrupted(folder: Path) -> tuple[float, float]:
    """Run to the end; return the seconds until the first stage begins, and those of the rest."""
    begun, first = time.perf_counter(), None
    process = start(folder)
    while process.poll() is None:
        if first is None and events(folder):
            first = time.perf_counter()
        time.sleep(0.02)
    if process.returncode or first is None:
        raise SystemExit(f"the uninterrupted run ended with status {process.returncode}")
    return first - begun, time.perf_counter() - first


def kill_once(folder: Path, while_writing: bool, delay: float) -> dict[str, Any] | None:
    """Start a process and kill it; return the time of the kill, None if the run finished first."""
    left, seen = half_written(folder), None
    process, begun = start(folder), time.perf_counter()
    while process.poll() is None:
        now = time.perf_counter()
        if while_writing and seen is None and half_written(folder) - left:
            seen = now
        if now - (seen or begun) >= delay and (seen is not None or not while_writing):
            process.kill()
            process.wait()
            last = (events(folder) or [{}])[-1]
            return {
                "kind": "writing" if while_writing else "any time",
                "seconds": round(time.perf_counter() - begun, 3),
                "last_event": " ".join(str(last.get(name, "")) for name in ("event", "folder", "stage")).strip(),
                "half_written_stage": bool(half_written(folder) - left),
            }
        time.sleep(POLL)
    if process.returncode:
        raise SystemExit(f"a resumed run ended with status {process.returncode}")
    return None


def campaign(kills: int, seed: int, base: Path) -> dict[str, Any]:
    """Kill and resume runs in new folders until the number of kills is reached; finish the last and compare all."""
    draw = random.Random(seed)
    startup, rest = uninterrupted(base / "reference")
    wanted = facts(base / "reference")
    stages = sum(event["event"] == "started" for event in events(base / "reference"))
    longest = startup + 4 * rest / stages
    print(f"uninterrupted: {startup:.1f} s to the first of {stages} stages, {rest:.1f} s for them", flush=True)
    moments: list[dict[str, Any]] = []
    equal: list[bool] = []
    while len(moments) < kills:
        folder = base / f"run-{len(equal)}"
        while_writing = len(moments) % 3 == 2
        delay = draw.uniform(0.0, LONGEST_WRITE) if while_writing else draw.uniform(0.3 * startup, longest)
        moment = kill_once(folder, while_writing, delay)
        if moment is None:
            equal.append(facts(folder) == wanted)
            print(f"run {len(equal)} at its end: {'equal' if equal[-1] else 'DIFFERENT'}", flush=True)
        else:
            moments.append({"run": len(equal) + 1, **moment})
            print(f"kill {len(moments)}: {moments[-1]}", flush=True)
    folder = base / f"run-{len(equal)}"
    uninterrupted(folder)
    equal.append(facts(folder) == wanted)
    return {
        "stages_per_run": stages,
        "kills": len(moments),
        "runs": len(equal),
        "half_written_stages": sum(moment["half_written_stage"] for moment in moments),
        "equal": all(equal),
        "moments": moments,
    }


def main() -> None:
    """Run the campaign and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="how often to kill (default 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kill_resume.json")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options.worker)
        return
    with tempfile.TemporaryDirectory() as base:
        found = campaign(options.kills, options.seed, Path(base))
    harness.publish_kills("kill_resume.py", options, found)


if __name__ == "__main__":
    main()
