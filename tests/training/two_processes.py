"""One process of a distributed run, started by test_sharding: `python two_processes.py ADDRESS COUNT NUMBER OUT`."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import pae_jax as pae
from pae_jax.trees import flatten


def train(net, state, task, data, key, **options):
    options = {"optimizer": optax.adamw(0.01), "epochs": 4, "batch_size": 16, **options}
    return pae.fit(net, state, task, data, key=jax.random.key(key), **options)[0]


def stream(data):
    """Return two tasks and a recipe that prunes the first of them by half, for runs that change their devices."""
    tasks = [pae.Task(name, 2, examples) for name, examples in data.items()]
    phase = pae.recipes.Phase(4, pae.recipes.Rate(0.05))
    return tasks, pae.Recipe("half", phase, batch_size=16, ladder=pae.recipes.Ladder((0.5,), phase, choose="last"))


def refused(net, state, task, data, mesh):
    """Return the error of a ragged last batch and the steps that were taken before it."""
    taken, sizes = [], (16, 16, 6)
    batches = [tuple(leaf[:size] for leaf in data) for size in sizes]
    try:
        train(net, state, task, batches, 4, devices=mesh, on_step=lambda row: taken.append(row["step"]))
    except pae.DataError as error:
        return str(error), np.asarray(taken)
    return "none", np.asarray(taken)


def main(address, count, number, out):
    if count > 1:
        jax.distributed.initialize(address, count, number)
    net = pae.linen(lambda width: pae.models.MLP(width=width), jnp.zeros((1, 4)))
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    first, second = (x, (x[:, 0] > 0).astype(np.int32)), (x, (x[:, 1] > 0).astype(np.int32))
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "first", head=2, key=jax.random.key(1))
    state = pae.freeze(pae.prune(train(net, state, "first", first, 2), "first", 0.5), "first")
    logits = np.asarray(pae.predict(net, state, "first", x))
    state = pae.pack(net, state, "second", head=2, key=jax.random.key(3))
    schedule = pae.CubicSchedule(final=0.5, end=12, every=4)
    found = {}
    ways = {"one": None, "mesh": mesh, "split": pae.Devices(mesh, split_weights=True)}
    if count == 1:  # as current JAX makes a mesh: of explicit axes, several of which split the batch together
        ways |= {"made": jax.make_mesh((4, 2), ("rows", "columns"))}
    states = {}
    for name, devices in ways.items():
        states[name] = trained = train(
            net, state, "second", second, 4, pruning=schedule, val=second, keep="best", devices=devices
        )
        pae.verify(trained)
        same = (np.asarray(pae.predict(net, trained, "first", x)) == logits).all()
        found |= {f"{name}/shared/{path}": np.asarray(leaf) for path, leaf in flatten(trained.shared).items()}
        found |= {f"{name}/owner/{path}": np.asarray(leaf) for path, leaf in flatten(trained.owner).items()}
        found[f"{name}/logits of the first task are the same bits"] = np.asarray(same)
        found[f"{name}/devices"] = np.asarray(jax.device_count())
    if count == 1:
        found["ragged"], found["ragged/steps"] = refused(net, state, "second", second, mesh)
        pae.save(f"{out}.stage", states["split"])
        tasks, recipe = stream({"first": first, "second": second})
        options = {"key": jax.random.key(5), "devices": pae.Devices(mesh, split_weights=True)}
        empty = pae.init(net, jax.random.key(0))
        pae.save(f"{out}.empty", empty)
        pae.learn(net, empty, tasks[0], recipe, run=pae.Run(f"{out}.run"), **options)
    np.savez(out, **found)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
