"""One process of lifelong runs, started by test_processes: `python learning_process.py ADDRESS COUNT NUMBER FOLDER`.

From the network in `FOLDER/empty` it learns in `FOLDER/joint` and goes on with the run in `FOLDER/begun`; then it makes
calls that fail. What it ends with is in `FOLDER/NAME-NUMBER.npz`, its errors are in `FOLDER/errors-NUMBER.json`.
"""

import contextlib
import json
import sys
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from jax.sharding import Mesh

import pae_jax as pae
from pae_jax import processes
from pae_jax.lifelong import stage_maker, task_folder
from pae_jax.lifelong.recipes import Expansion, Ladder, Phase, Rate
from pae_jax.storage import digests
from pae_jax.trees import flatten


def halved(net, state, task, data):
    """Measure the accuracy; for the second task half of it until the network has grown."""
    accuracy = pae.evaluate(net, state, task, data)["accuracy"]
    return accuracy / 2 if task == "b" and len(state.tasks) == 2 and not state.growth else accuracy


def tasks(shift=0.0):
    """Return three tasks, of which the second makes the network grow."""
    rng, metric, found = np.random.default_rng(0), pae.Metric("accuracy", halved), []
    for number, name in enumerate("abc"):
        x = rng.normal(size=(96, 4)).astype(np.float32)
        y = (x[:, number] > 0).astype(np.int32)
        parts = (x[:64] + np.float32(shift), y[:64]), (x[64:], y[64:]), (x[:32], y[:32])
        found.append(pae.Task(name, 2, *parts, metric=metric))
    return found


def recipe():
    ladder = Ladder((0.5,), Phase(2, Rate(0.02)), choose="last")
    return pae.Recipe("small", Phase(6, Rate(0.05)), 16, ladder=ladder, goal=0.6, expansion=Expansion(0.5, 1.5))


NET = pae.linen(lambda width: pae.models.MLP(width, (8,)), np.zeros((1, 4), np.float32))


def learn(state, folder, given=None):
    """Learn the three tasks on all devices of all processes."""
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    run = None if folder is None else pae.Run(folder)
    stream = pae.learn_all(NET, state, given or tasks(), recipe(), key=jax.random.key(1), run=run, devices=mesh)
    pae.verify(stream.state)
    return stream


def facts(stream):
    """Return what two runs must have in common."""
    parts = {"shared": stream.state.shared, "owner": stream.state.owner}
    found = {f"{name}/{path}": np.asarray(leaf) for name, part in parts.items() for path, leaf in flatten(part).items()}
    found |= {f"bits/{path}": np.asarray(text) for path, text in digests(stream.state).items()}
    found |= {f"scores/{one.task}": np.asarray([one.value, one.test, one.width]) for one in stream.outcomes}
    return found | {"accuracies": np.asarray(stream.matrix.values)}


def failing(what, *arguments):
    """Return the error of a call, and the seconds that it took."""
    begun = time.monotonic()
    try:
        learn(*arguments)
    except (pae.PaeError, KeyboardInterrupt) as error:
        return [what, type(error).__name__, str(error), time.monotonic() - begun]
    return [what, "none", "", time.monotonic() - begun]


def full_disk(path, state, metadata):
    del state, metadata
    raise pae.CheckpointError(f"cannot write the stage {path}: the disk is full")


def interrupted(*arguments):
    raise KeyboardInterrupt


def main(address, count, number, folder):
    jax.distributed.initialize(address, count, number)
    folder, first = Path(folder), number == 0
    state = pae.load(NET, folder / "empty")
    for name in ("joint", "begun"):
        np.savez(folder / f"{name}-{number}.npz", **facts(learn(state, folder / name)))
    errors = [failing("other data", state, None, tasks(0.0 if first else 1e-3))]
    errors.append(failing("another call", state, folder / "fault" if first else None))
    with mock.patch.object(task_folder, "save", full_disk) if first else contextlib.nullcontext():
        errors.append(failing("full disk", state, folder / "fault"))
    processes.GRACE = 1.0
    (folder / f"errors-{number}.json").write_text(json.dumps(errors))
    # The others train on: what they wait for never comes, and they are ended.
    with mock.patch.object(stage_maker, "trained", interrupted) if first else contextlib.nullcontext():
        learn(state, folder / "fault")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
