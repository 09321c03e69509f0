"""The formulas of docs/scaling.md: they give the numbers of its table, and the bytes of real states."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import pae_jax as pae
from pae_jax.core import placement
from pae_jax.trees import flatten

PAGE = (Path(__file__).parent.parent.parent / "docs" / "scaling.md").read_text()
LAYERS, D, CLASSES = 20, 2048, 1000
N = LAYERS * 12 * D * D
LOCAL = LAYERS * 13 * D
HEAD = D * CLASSES + CLASSES
ARRAYS = 1 + LAYERS * (6 + 10) + 2


def state(n, devices, tasks, local, head, arrays):
    return 5 * n / devices + tasks * (4 * (local + head) + 32 * arrays) + 4 * local


def train_state(n, devices, local, head):
    return 13 * n / devices + 12 * (local + head)


PHASES = {
    "hold the state": lambda d, held: held,
    "train a task, Adam": lambda d, held: held + train_state(N, d, LOCAL, HEAD) + 4 * N / d + 4 * (LOCAL + HEAD),
    "prune, leaf or global": lambda d, held: held + 9 * N / d,
    "expand to 1.5 N": lambda d, held: held + 13.5 * N / d,
    'serve all, resident="weights"': lambda d, held: held + 100 * 4 * N / d,
    'serve all, resident="masks"': lambda d, held: held + 4 * N / d,
    "100 tasks that pick, on top": lambda d, held: 99 * N / d,
}


@pytest.mark.parametrize("phase", PHASES)
def test_the_table_of_the_page_is_what_the_formulas_give(phase):
    row = next(line for line in PAGE.splitlines() if line.replace("`", "").startswith(f"| {phase} |"))
    found = [float(cell) for cell in re.findall(r"\| ([\d.]+) (?=\|)", row)]
    wanted = [PHASES[phase](d, state(N, d, 100, LOCAL, HEAD, ARRAYS)) / 1e9 for d in (8, 64, 512)]
    assert found == [float(f"{gigabytes:.2f}") for gigabytes in wanted]


def size_of(tree):
    return sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def tasks(net):
    states = [pae.init(net, jax.random.key(0))]
    for name in "ab":
        states.append(pae.pack(net, states[-1], name, head=2, key=jax.random.key(1)))
        states.append(pae.freeze(pae.prune(states[-1], name, 0.5), name))
    return states


def counts(net, found):
    """Return `n, local, head, arrays` of a state whose tasks have equal heads of 2 classes."""
    layout = net.layout(1.0)
    local = sum(leaf.size for leaf in jax.tree.leaves(layout.local))
    arrays = 1 + len(flatten(layout.shared)) + len(flatten(layout.local)) + 2
    return sum(w.size for w in jax.tree.leaves(found.shared)), local, 6 * 2 + 2, arrays


@pytest.mark.parametrize("number", [0, 2, 4])
def test_a_state_has_the_bytes_of_the_formula(net, tasks, number):
    n, local, head, arrays = counts(net, tasks[number])
    assert size_of(tasks[number]) == state(n, 1, len(tasks[number].tasks), local, head, arrays)


def test_a_train_state_has_the_bytes_of_the_formula(net, tasks):
    n, local, head, _ = counts(net, tasks[1])
    ts = pae.TrainState.create(net, tasks[1], "a", tx=optax.adam(0.01))
    statistics = sum(leaf.size for leaf in jax.tree.leaves(tasks[1].local["batch_stats"]))
    scalars = 4 + 1 + 8 + 4  # steps of the state and of Adam, the task's id and the digest of its name
    assert size_of(ts) == train_state(n, 1, local, head) - 8 * statistics + scalars


def test_what_one_device_holds_of_weights_and_owners_falls_with_the_number_of_devices():
    net = pae.linen(lambda width: pae.models.MLP(width, (64, 64)), jnp.zeros((1, 16)))
    layout = net.layout(1.0)
    owner = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.int8), layout.shared)
    whole = pae.State(layout.shared, owner, {}, 1.0, local=layout.local)
    n, local = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (layout.shared, layout.local))
    for devices in (1, 2, 4, 8, 64):
        mesh = Mesh(np.asarray(jax.devices()[:1] * devices), ("d",))
        specs = {f"params/{path}": P(None, "d") for path in flatten(layout.shared)}
        plan = placement.planned(net, whole, (mesh, specs))
        held = [np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(plan)]
        assert sum(held) == state(n, devices, 0, local, 0, 0)
