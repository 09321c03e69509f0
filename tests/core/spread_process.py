"""One of several processes over whose devices a network is spread, started by `test_spread_processes.py`.

`python spread_process.py ADDRESS COUNT NUMBER FOLDER`: two processes make a network and save `FOLDER/stage`, from which
four go on; they read `FOLDER/alone`, too, the same of one process. What each of
them found is in `FOLDER/found-COUNT-NUMBER.json`.
"""

import json
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from eight_devices import ADAM, KEY, ONE_HOT, ROWS, SGD, STEP, Backbone, X, Y, held, specs, story
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import pae_jax as pae
from pae_jax import files
from pae_jax.core import ownership, picking, spread_arrays, starting_weights
from pae_jax.storage import digests

TASK = pae.Task("c", 2, (X, Y), (X, Y))
RECIPE = pae.Recipe("small", pae.recipes.Phase(1, pae.recipes.Rate(0.05)), 8)


def refusal(call):
    """Return the error of a call."""
    try:
        call()
    except pae.PaeError as error:
        return [type(error).__name__, str(error)]
    return ["none", ""]


def hosted(net, states, mesh, folder):
    """Return the largest number of bytes of one array that goes to the host in each step; no call may ask for more."""
    taken, found = [], {}

    def counted(holder, name):
        original = getattr(holder, name)

        def call(*arguments, **options):
            result = original(*arguments, **options)
            taken.extend(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(result))
            return result

        return mock.patch.object(holder, name, call)

    def step():
        ts = pae.TrainState.create(net, states[0], "a", tx=SGD)
        split = NamedSharding(mesh, P("d"))
        pair = [jax.make_array_from_callback(v.shape, split, lambda index, v=v: v[index]) for v in (X, ONE_HOT)]
        return STEP(ts, *pair).commit(net, states[0])

    steps = {
        "prune leaf": lambda: pae.prune(states[0], "a", 0.5),
        "prune global": lambda: pae.prune(states[0], "a", 0.5, scope="global"),
        "train": step,
        "freeze": lambda: pae.freeze(states[1], "a"),
        "expand": lambda: pae.expand(net, states[2], width=1.5, key=KEY(2)),
        "verify": lambda: pae.verify(states[-1]),
        "predict": lambda: pae.predict(net, states[-1], "a", X),
        "serve": lambda: pae.Server(net, states[2]).predict("a", X),
        "save": lambda: pae.save(folder / "first", states[2]),
        "load": lambda: pae.load(net, folder / "first", sharding=(mesh, ROWS)),
    }
    nothing = mock.Mock(side_effect=AssertionError("a whole array goes to the host"))
    holders = (spread_arrays, ownership, picking, starting_weights)
    patches = [mock.patch.object(module, "whole", nothing) for module in holders]
    # JAX refuses any other way of such an array to a host.
    ways = (spread_arrays, "_rows"), (multihost_utils, "process_allgather"), (type(jnp.zeros(1)), "__array__")
    for patch in (*patches, *(counted(*way) for way in ways)):
        patch.start()
    for name, call in steps.items():
        taken.clear()
        call()
        found[name] = max(taken, default=0)
    mock.patch.stopall()
    return found


def made(net, mesh, folder):
    """Let a network learn two tasks, save it, read it, and learn a third; return what was found."""
    states = story(net, pae.init(net, KEY(0), sharding=(mesh, ROWS)))
    first, last = states[2], states[-1]
    pae.verify(last)
    found = {"hosted": hosted(net, states, mesh, folder), "held": shares(net, states[0], "a")}
    pae.save(folder / "stage", last)
    whole, loaded = pae.load(net, folder / "stage"), pae.load(net, folder / "stage", sharding=(mesh, ROWS))
    if not jax.process_index():
        pae.write_bundle(folder / "bundle", net, whole)
    multihost_utils.sync_global_devices("bundle")
    bundled = pae.read_bundle(net, folder / "bundle", sharding=(mesh, ROWS))
    for state in (whole, loaded, bundled):
        pae.verify(state)
    found["digests"] = [digests(state) for state in (last, whole, loaded)]
    found["bundled"] = digests(bundled)
    found["answers"] = [answers(pae.predict(net, state, "a", X)) for state in (first, *states[3:], loaded, bundled)]
    servers = [pae.Server(net, last, resident=resident) for resident in ("weights", "masks")]
    found["answers"] += [answers(server.predict("a", X)) for server in servers]
    found["kept"] = kept([*states, loaded, bundled])
    found["refused"] = refused(net, last, mesh, folder)
    learned = pae.learn(net, last, TASK, RECIPE, key=KEY(9), devices=mesh).state
    pae.verify(learned)
    found["learned"] = [answers(pae.predict(net, learned, "a", X)), learned.tasks["c"].phase]
    found["kept"] += kept([learned])
    if jax.process_index():  # the first one does not call
        found["refused"]["alone"] = refusal(lambda: pae.save(folder / "no", learned, timeout=0.5))
    return found


def moved(net, mesh, folder):
    """Go on with the stage that other processes have saved; return what was found."""
    last = pae.load(net, folder / "stage", sharding=(mesh, ROWS))
    pae.verify(last)
    before = answers(pae.predict(net, last, "a", X))
    packed = pae.pack(net, last, "c", head=2, key=KEY(4))
    state = pae.freeze(pae.prune(packed, "c", 0.5, scope="global"), "c")
    pae.verify(state)
    pae.save(folder / "moved", state)
    alone = pae.load(net, folder / "alone", sharding=(mesh, ROWS))
    found = {
        "held": shares(net, packed, "c"),
        "digests": [digests(last)],
        "alone": digests(alone),
        "kept": kept([last, alone, state]),
    }
    found["answers"] = [before, answers(pae.predict(net, state, "a", X))]
    return found


def answers(logits):
    return np.asarray(logits).tobytes().hex()


def kept(states):
    """Return whether weights and owners lie as was asked."""
    wanted = {path.removeprefix("params/"): spec for path, spec in ROWS.items()}
    return [specs(tree) == wanted for state in states for tree in (state.shared, state.owner)]


def shares(net, state, task):
    """Return the bytes that a device holds of weights and owners, and of the state of a training with Adam."""
    device = jax.local_devices()[1]  # the first one alone has the numbers that count steps
    return held((state.shared, state.owner), device), held(pae.TrainState.create(net, state, task, tx=ADAM), device)


def refused(net, state, mesh, folder):
    """Return the errors of calls that cannot be done; none of them may write anything."""
    new, run = folder / "no", folder / "run"
    broken = mock.Mock(side_effect=OSError("the disk is full"))
    disk = mock.patch.object(files, "sync_tree", broken if jax.process_index() else files.sync_tree)
    found = {
        "write_bundle": refusal(lambda: pae.write_bundle(new, net, state)),
        "slim": refusal(lambda: pae.slim(net, state, "a")),
        "export": refusal(lambda: pae.export(net, state, "a")),
        "wait": refusal(lambda: pae.save(new, state, wait=False)),
        "run": refusal(lambda: pae.learn(net, state, TASK, RECIPE, key=KEY(9), devices=mesh, run=pae.Run(run))),
        "exists": refusal(lambda: pae.save(folder / "stage", state)),
        "metadata": refusal(lambda: pae.save(new, state, {"number": jax.process_index()})),
    }
    with disk:
        found["disk"] = refusal(lambda: pae.save(new, state))
    return found


def main(address, count, number, folder):
    jax.distributed.initialize(address, count, number)
    folder, mesh = Path(folder), Mesh(np.asarray(jax.devices()), ("d",))
    net = pae.linen(Backbone, X[:1])
    found = (made if count == 2 else moved)(net, mesh, folder) | {"devices": jax.device_count()}
    (folder / f"found-{count}-{number}.json").write_text(json.dumps(found))
    multihost_utils.sync_global_devices("end")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
