"""Kills one process of a lifelong run in several, ten times, and goes on with another number of processes each time.

Command:   python benchmarks/processes.py
Expected:  "equal": true. Owners, scores and accuracies are those of one process that nobody touched, weights are equal
           to summation order, and no bit of a frozen task has changed; about 10 minutes on two quiet cores
Writes:    benchmarks/results/processes.json

The run learns three tasks and widens the network for the second. It takes 1, 2 or 4 processes of one CPU device each,
drawn anew after every kill, with the process to kill and the moment: after 1 to 6 new events of the run, and up to
three seconds more. "seconds_to_end" is how long the others lived after the kill; JAX ends them, at the latest after its
heartbeat timeout (here 10 s). When a run finishes between two kills, it is compared and the next one starts in a new
folder.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
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
from jax.sharding import Mesh

import pae_jax as pae
from pae_jax.lifelong.recipes import Expansion, Ladder, Phase, Rate
from pae_jax.trees import flatten

COUNTS = (1, 2, 4)
MOST_EVENTS, MOST_SECONDS = 6, 3.0
HEARTBEAT = 10
LONGEST = 300.0


def _stricter(net: pae.Net, state: pae.State, task: str, data: Any) -> float:
    """Measure the accuracy; for the second task half of it until the network is expanded."""
    accuracy = pae.evaluate(net, state, task, data)["accuracy"]
    return accuracy / 2 if task == "second" and len(state.tasks) > 1 and not state.growth else accuracy


def tasks() -> list[pae.Task]:
    """Return three tasks that a network learns in seconds."""
    rng, found = np.random.default_rng(0), []
    for number, name in enumerate(("first", "second", "third")):
        x = rng.normal(size=(512, 8)).astype(np.float32)
        y = (x[:, number] + 0.3 * x[:, -1] > 0).astype(np.int32)
        parts = (x[:256], y[:256]), (x[256:384], y[256:384]), (x[384:], y[384:])
        found.append(pae.Task(name, 2, *parts, metric=pae.Metric("accuracy", _stricter)))
    return found


def work(folder: Path, out: Path) -> None:
    """Learn the tasks on the devices of all processes, in a folder that is new or was left by killed ones."""
    net = pae.linen(lambda width: pae.models.MLP(width, (16,)), jnp.zeros((1, 8)))
    ladder = Ladder((0.3, 0.6), Phase(3, Rate(0.02)), choose="last")
    recipe = pae.Recipe("small", Phase(6, Rate(0.05)), 32, ladder=ladder, goal=0.6, expansion=Expansion(0.5, 1.5))
    state = pae.init(net, jax.random.key(0))
    devices = Mesh(np.asarray(jax.devices()), ("data",))
    stream = pae.learn_all(net, state, tasks(), recipe, key=jax.random.key(1), run=pae.Run(folder), devices=devices)
    pae.verify(stream.state)
    assert stream.matrix is not None
    arrays = {f"shared/{path}": np.asarray(leaf) for path, leaf in flatten(stream.state.shared).items()}
    arrays |= {f"owner/{path}": np.asarray(leaf) for path, leaf in flatten(stream.state.owner).items()}
    arrays |= {f"scores/{one.task}": np.asarray([one.value, one.test, one.width]) for one in stream.outcomes}
    arrays["accuracies"] = stream.matrix.values
    if not jax.process_index():
        np.savez(out, **arrays)  # pyright: ignore[reportArgumentType]


def start(count: int, folder: Path, out: Path) -> list[subprocess.Popen[str]]:
    """Start the processes of one job."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    # Most of the time is compilation; nothing here depends on how well it is done.
    environment = dict(os.environ, JAX_PLATFORMS="cpu", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    words = [sys.executable, __file__, "--folder", str(folder), "--out", str(out), "--job", address, str(count)]
    return [
        subprocess.Popen([*words, str(number)], env=environment, stderr=subprocess.PIPE, text=True)
        for number in range(count)
    ]


def finished(processes: list[subprocess.Popen[str]]) -> tuple[float, str]:
    """Wait for the end of all processes; return the seconds until then and what they said at last."""
    begun = time.perf_counter()
    try:
        said = [process.communicate(timeout=LONGEST)[1][-1500:] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return time.perf_counter() - begun, "\n".join(said)


def uninterrupted(count: int, folder: Path, out: Path) -> float:
    """Run to the end; return the seconds."""
    processes = start(count, folder, out)
    seconds, said = finished(processes)
    if any(process.returncode for process in processes):
        raise SystemExit(f"a process of {count} ended by itself: {said}")
    return seconds


def events(folder: Path) -> int:
    """Return how many events a run has logged."""
    file = folder / "events.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def kill_once(count: int, folder: Path, out: Path, victim: int, happened: int, delay: float) -> dict[str, Any] | None:
    """Kill one process so long after so many new events; return what came of it, None if the run finished first."""
    before = events(folder)
    processes, begun = start(count, folder, out), time.perf_counter()
    moment = None
    while (moment is None or time.perf_counter() < moment) and any(process.poll() is None for process in processes):
        if moment is None and events(folder) >= before + happened:
            moment = time.perf_counter() + delay
        time.sleep(0.01)
    after = time.perf_counter() - begun
    early = [process.returncode for process in processes if process.poll()]
    if processes[victim].poll() is None and not early:
        processes[victim].kill()
        seconds, _ = finished(processes)
        others = [process.returncode for number, process in enumerate(processes) if number != victim]
        stages = sorted(str(path.relative_to(folder)) for path in folder.glob("*/*/_CHECKPOINT_METADATA"))
        if others and not any(others):
            return None  # they had nothing more to do with each other
        return {
            "processes": count,
            "killed": victim,
            "new_events": events(folder) - before,
            "after_seconds": round(after, 2),
            "seconds_to_end": round(seconds, 2),
            "statuses_of_the_others": others,
            "last_stage": stages[-1].rsplit("/", 1)[0] if stages else None,
        }
    _, said = finished(processes)
    if early or any(process.returncode for process in processes):
        raise SystemExit(f"a process of {count} ended by itself: {said}")
    return None


def differences(out: Path, reference: Path, folder: Path) -> dict[str, Any]:
    """Compare a run with the one that nobody touched."""
    found, wanted = dict(np.load(out)), dict(np.load(reference))
    weights = [name for name in wanted if name.startswith("shared/")]
    distance = max(float(np.abs(found[name] - wanted[name]).max()) for name in weights)
    same = all(np.array_equal(found[name], wanted[name], equal_nan=True) for name in wanted if name not in weights)
    digests: dict[str, Any] = {}
    frozen = True
    for stage in sorted(folder.glob("*/frozen")):
        for task in pae.read_metadata(stage)["tasks"]:
            frozen &= digests.setdefault(task["name"], task["digests"]) == task["digests"]
    return {"largest_difference_of_a_weight": distance, "decisions_equal": same, "frozen_bits_equal": frozen}


def campaign(kills: int, seed: int, base: Path) -> dict[str, Any]:
    """Kill processes until the number of kills is reached; finish the last run and compare all."""
    draw, reference, out = random.Random(seed), base / "reference.npz", base / "end.npz"
    print(f"one process, uninterrupted: {uninterrupted(1, base / 'reference', reference):.1f} s", flush=True)
    moments: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    count = 1
    while len(moments) < kills:
        folder = base / f"run-{len(ends)}"
        count = draw.choice([other for other in COUNTS if other != count])
        victim, happened = draw.randrange(count), draw.randint(1, MOST_EVENTS)
        moment = kill_once(count, folder, out, victim, happened, draw.uniform(0.0, MOST_SECONDS))
        if moment is None:
            ends.append({"processes_at_the_end": count, **differences(out, reference, folder)})
            print(f"run {len(ends)} at its end: {ends[-1]}", flush=True)
        else:
            moments.append({"run": len(ends) + 1, **moment})
            print(f"kill {len(moments)}: {moments[-1]}", flush=True)
    count = next(other for other in COUNTS[::-1] if other != count)
    uninterrupted(count, base / f"run-{len(ends)}", out)
    ends.append({"processes_at_the_end": count, **differences(out, reference, base / f"run-{len(ends)}")})
    equal = all(
        end["decisions_equal"] and end["frozen_bits_equal"] and end["largest_difference_of_a_weight"] < 1e-4
        for end in ends
    )
    return {"kills": len(moments), "runs": len(ends), "equal": equal, "ends": ends, "moments": moments}


def main() -> None:
    """Run the campaign and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="how often to kill (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of counts, processes and moments")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "processes.json")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        address, count, number = options.job[0], int(options.job[1]), int(options.job[2])
        if count > 1:
            jax.distributed.initialize(address, count, number, heartbeat_timeout_seconds=HEARTBEAT)
        work(options.folder, options.out)
        return
    with tempfile.TemporaryDirectory() as base:
        found = campaign(options.kills, options.seed, Path(base))
    harness.publish_kills("processes.py", options, {"heartbeat_timeout_seconds": HEARTBEAT, **found})


if __name__ == "__main__":
    main()
