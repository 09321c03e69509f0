"""`TrainState`: a step of one's own that compiles once, moves what the task owns, and reads nothing else."""

import copy
import dataclasses
import itertools
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx, serialization

import pae_jax as pae
from pae_jax.trees import flatten

CE = optax.softmax_cross_entropy_with_integer_labels
KEY = jax.random.key
X = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
Y = (X[:, 0] > X[:, 1]).astype(np.int32)
BATCHES = jnp.asarray(X).reshape(5, 8, 4), jnp.asarray(Y).reshape(5, 8)
ADAMW = optax.adamw(0.05, weight_decay=0.3)


class NnxVector(nnx.Module):
    def __init__(self, width, rngs):
        self.first = nnx.Linear(4, int(8 * width), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(int(8 * width), momentum=0.5, rngs=rngs)
        self.last = nnx.Linear(int(8 * width), int(6 * width), rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.norm(self.first(x))))


class Sizes(nn.Module):
    """Leaves of 28, 7, 13, 91 and 36 weights, and dropout."""

    width: float = 1.0

    @nn.compact
    def __call__(self, x, train):
        for size in (7, 1, 13, 7):
            x = jnp.tanh(nn.Dense(size)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Conv(4, (3,))(x[:, None, :3])[:, 0]


def two_tasks(net, head=2, name="new", **options):
    """A frozen task "old", with some -0.0 among its weights, and a packed one."""
    state = pae.pack(net, pae.init(net, KEY(0)), "old", head=2, key=KEY(1))
    state = pae.prune(state, "old", 0.5)

    def plant(w, o):
        w = np.array(w)
        w.ravel()[np.flatnonzero(np.asarray(o) == 1)[:2]] = -0.0
        return jnp.asarray(w)

    state = state.replace(shared=jax.tree.map(plant, state.shared, state.owner))
    return pae.pack(net, pae.freeze(state, "old"), name, head=head, key=KEY(2), weight_init="fresh", **options)


@pytest.fixture(scope="module")
def nnx_net():
    return pae.nnx(NnxVector, X[:1])


@pytest.fixture(scope="module")
def state(net):
    return two_tasks(net)


@pytest.fixture(scope="module")
def picked(net):
    return two_tasks(net, sharing="picked")


@pytest.fixture(scope="module", params=["linen", "nnx"])
def either(request, net, nnx_net):
    """A network of each kind, with its two tasks."""
    used = net if request.param == "linen" else nnx_net
    return used, two_tasks(used)


@pytest.fixture(scope="module")
def sizes():
    net = pae.linen(Sizes, X[:1])
    return net, two_tasks(net)


@pytest.fixture(scope="module")
def some_leaves(net):
    """A task that owns half of the second kernel and nothing of the first."""
    state = pae.pack(net, pae.init(net, KEY(0)), "old", head=2, key=KEY(1))
    half = np.arange(48).reshape(8, 6) % 2 == 0
    kernel = jnp.where(half, state.shared["Dense_1"]["kernel"], 0.0)
    owner = jnp.where(half, state.owner["Dense_1"]["kernel"], jnp.int8(0))
    shared = {**state.shared, "Dense_1": {"kernel": kernel}}
    state = state.replace(shared=shared, owner={**state.owner, "Dense_1": {"kernel": owner}})
    return pae.pack(net, pae.freeze(state, "old"), "new", head=2, key=KEY(2), weight_init="fresh")


def loss_of(ts, params, x, y):
    out, updates = ts.apply_fn(params, x, train=True)
    return CE(out, y).mean(), updates


def plain_step(ts, x, y):
    grads, updates = jax.grad(lambda params: loss_of(ts, params, x, y), has_aux=True)(ts.params)
    return ts.apply_gradients(grads=grads, updates=updates)


step = jax.jit(plain_step)


def train(ts, steps=5):
    for x, y in itertools.islice(zip(*BATCHES, strict=True), steps):
        ts = step(ts, x, y)
    return ts


def own_of(state, task="new"):
    return {path: np.asarray(mask) for path, mask in flatten(pae.trainable(state, task)).items()}


@pytest.fixture
def unforgotten(assert_same):
    def check(net, before, after):
        pae.check(after, net)
        pae.verify(after)
        for path, w in flatten(after.shared).items():
            old, new, older = np.asarray(flatten(before.shared)[path]), np.asarray(w), ~own_of(before)[path]
            assert new[older].tobytes() == old[older].tobytes(), path
        assert_same(after.tasks["old"], before.tasks["old"])
        assert_same(pae.predict(net, after, "old", X), pae.predict(net, before, "old", X))

    return check


# Compiled once


def test_two_tasks_of_one_width_and_head_trace_a_step_once_whatever_they_own(net, state, compilations, unforgotten):
    traced = []

    @jax.jit
    def counted(ts, x, y, fraction):
        traced.append(ts.width)
        return plain_step(ts, x, y).prune(fraction)

    ts = pae.TrainState.create(net, state, "new", tx=ADAMW, key=KEY(3))
    for fraction, batch in zip((0.0, 0.1, 0.3), zip(*BATCHES, strict=True), strict=False):
        ts = counted(ts, *batch, fraction)
    first = pae.freeze(ts.commit(net, state), "new")
    unforgotten(net, state, first)
    later = pae.pack(net, first, "third", head=2, key=KEY(5))
    with compilations() as found:
        ts = pae.TrainState.create(net, later, "third", tx=ADAMW, key=KEY(4))
        for fraction, batch in zip((0.05, 1 / 3), zip(*BATCHES, strict=True), strict=False):
            ts = counted(ts, *batch, fraction)
        after = ts.commit(net, later)
    assert traced == [1.0]
    assert found.count == 0
    unforgotten(net, first, pae.drop(after, "third"))
    other = pae.pack(net, pae.drop(after, "third"), "fourth", head=3, key=KEY(5))
    counted(pae.TrainState.create(net, other, "fourth", tx=ADAMW, key=KEY(4)), X[:8], Y[:8], 0.0)
    assert traced == [1.0, 1.0]  # another head is another program


# Pruning


FRACTIONS = (0.0, *(i / 20 for i in range(2, 20)), 1 / 3, 2 / 3, 0.123456, 1.0)


@pytest.mark.parametrize("of", ["available", "own"])
@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_prune_inside_jit_frees_exactly_what_prune_of_the_state_does(sizes, scope, of, assert_same):
    net, state = sizes
    ts = train(pae.TrainState.create(net, state, "new", tx=ADAMW, key=KEY(3)), 2)
    state = ts.commit(net, state)
    traced = jax.jit(lambda ts, fraction: ts.prune(fraction, scope=scope, of=of))
    for fraction in FRACTIONS:
        wanted = pae.prune(state, "new", fraction, scope=scope, of=of)
        assert_same(traced(ts, fraction).commit(net, state), wanted)
        assert_same(ts.prune(fraction, scope=scope, of=of).commit(net, state), wanted)
    for fraction in (0.1, 1 / 3):
        wanted = pae.prune(state, "new", fraction, scope=scope, of=of)
        fixed = jax.jit(lambda ts, fraction=fraction: ts.prune(fraction, scope=scope, of=of))
        assert_same(fixed(ts).commit(net, state), wanted)
        twice = traced(traced(ts, fraction / 2), fraction)
        if of == "available":
            assert_same(twice.commit(net, state), wanted)


@pytest.mark.parametrize("case", ["picked", "some leaves", "head alone"])
def test_prune_counts_every_weight_of_the_task_whatever_is_trained(net, picked, some_leaves, state, case, assert_same):
    before, parts = {
        "picked": (picked, pae.TrainState.create.__func__.__kwdefaults__["parts"]),
        "some leaves": (some_leaves, ("shared", "head")),
        "head alone": (state, ("head",)),
    }[case]
    ts = pae.TrainState.create(net, before, "new", tx=ADAMW, parts=parts)
    for fraction, scope in itertools.product((0.3, 0.75), ("leaf", "global")):
        wanted = pae.prune(before, "new", fraction, scope=scope)
        found = jax.jit(lambda ts, fraction, scope=scope: ts.prune(fraction, scope=scope))(ts, fraction)
        assert_same(found.commit(net, before), wanted)


def test_a_released_weight_stays_zero_through_carried_momentum_and_gives_its_own_up(net, state, unforgotten):
    ts = train(pae.TrainState.create(net, state, "new", tx=optax.sgd(0.1, momentum=0.9))).prune(0.4)
    after = train(ts).commit(net, state)
    unforgotten(net, state, after)
    for path, owner in flatten(after.owner).items():
        free = np.asarray(owner) == 0
        values = np.asarray(flatten(after.shared)[path])[free]
        assert free.any() and not values.any() and not np.signbit(values).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 1.5}, "fraction must lie"),
        ({"fraction": float("nan")}, "fraction must lie"),
        ({"fraction": 0.5, "scope": "layer"}, "scope must be one of"),
        ({"fraction": 0.5, "of": "all"}, "of must be one of"),
    ],
    ids=str,
)
def test_prune_refuses_what_prune_of_the_state_refuses(net, state, options, message):
    with pytest.raises(pae.ArgumentError, match=message):
        pae.TrainState.create(net, state, "new", tx=ADAMW).prune(**options)


# In transformations of JAX


def test_steps_in_a_scan_are_the_steps_one_by_one(either, unforgotten):
    net, state = either
    ts = pae.TrainState.create(net, state, "new", tx=ADAMW, key=KEY(3))
    run = jax.jit(lambda ts: jax.lax.scan(lambda ts, batch: (plain_step(ts, *batch), None), ts, BATCHES)[0])
    scanned, single = run(ts), train(ts)
    assert int(scanned.step) == int(single.step) == 5
    for one, other in zip(*map(jax.tree.leaves, (scanned.params, single.params)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    for found in (scanned, single):
        unforgotten(net, state, found.commit(net, state))


def test_donated_steps_leave_the_network_as_it_was(either, state_facts, unforgotten):
    net, state = either
    before = state_facts(state)
    ts = pae.TrainState.create(net, state, "new", tx=ADAMW, key=KEY(3))
    donated = jax.jit(plain_step, donate_argnums=0)
    for x, y in zip(*BATCHES, strict=True):
        ts = donated(ts, x, y)
    assert state_facts(state) == before
    unforgotten(net, state, ts.commit(net, state))


def test_a_donated_train_state_takes_no_random_key_of_the_users_with_it(net, state):
    key, noise = KEY(3), KEY(4)
    tx = optax.chain(optax.sgd(0.1), optax.add_noise(0.1, 0.5, noise))
    ts = pae.TrainState.create(net, state, "new", tx=tx, key=key)
    jax.jit(plain_step, donate_argnums=0)(ts, X[:8], Y[:8])
    assert not key.is_deleted()
    assert not noise.is_deleted()


def test_train_states_of_several_seeds_train_under_vmap(net, state, unforgotten):
    one = pae.TrainState.create(net, state, "new", tx=ADAMW, key=KEY(3))
    many = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), one).replace(key=jax.random.split(KEY(9), 3))
    many = jax.jit(jax.vmap(lambda ts: plain_step(plain_step(ts, X[:8], Y[:8]), X[8:16], Y[8:16])))(many)
    for number in range(3):
        ts = jax.tree.map(lambda leaf, number=number: leaf[number], many)
        unforgotten(net, state, ts.commit(net, state))


class Square(nn.Module):
    width: float = 1.0

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(int(4 * self.width), use_bias=False)(x)


def test_a_stack_is_refused_outside_vmap_where_its_axis_would_pass_for_one_of_the_weights():
    net = pae.linen(Square, X[:1])
    one = pae.TrainState.create(net, two_tasks(net), "new", tx=optax.chain(optax.clip_by_global_norm(0.1), ADAMW))
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), one)
    for call in (
        lambda ts: ts.prune(0.5),
        lambda ts: ts.apply_fn(ts.params, X)[0],
        lambda ts: ts.apply_gradients(grads=jax.tree.map(jnp.ones_like, ts.params)),
        lambda ts: ts.replace(params=jax.tree.map(jnp.zeros_like, ts.params)),
    ):
        with pytest.raises(pae.ArgumentError, match=r"this is a stack of 4 train states; call this under jax\.vmap"):
            call(stack)
        jax.vmap(call)(stack)


DEVICES = """
import json
import jax, jax.numpy as jnp, numpy as np, optax
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import pae_jax as pae
from pae_jax.trees import flatten

class Backbone(nn.Module):
    width: float
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(32)(x))
        return nn.tanh(nn.Dense(16)(nn.tanh(x)))

X = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)
Y = np.eye(3, dtype=np.float32)[X[:, :3].argmax(1)]
net = pae.linen(Backbone, X[:1])
state = pae.pack(net, pae.init(net, jax.random.key(0)), "old", head=3, key=jax.random.key(1))
state = pae.freeze(pae.prune(state, "old", 0.5), "old")
state = pae.pack(net, state, "new", head=3, key=jax.random.key(2), weight_init="fresh")
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))

@jax.jit
def step(ts, x, y):
    def loss(params):
        out, updates = ts.apply_fn(params, x, train=True)
        return -jnp.sum(jax.nn.log_softmax(out) * y) / len(y), updates
    grads, updates = jax.grad(loss, has_aux=True)(ts.params)
    return ts.apply_gradients(grads=grads, updates=updates)

prune = jax.jit(lambda ts, fraction, scope: ts.prune(fraction, scope=scope), static_argnames="scope")
pushed = jax.jit(lambda ts: ts.apply_gradients(grads=jax.tree.map(jnp.ones_like, ts.params)))
start = pae.TrainState.create(net, state, "new", tx=tx, key=jax.random.key(3))
alone = start
for _ in range(4):
    alone = step(alone, X, Y)
meshes = {"auto": Mesh(np.asarray(jax.devices()), ("d",)), "explicit": jax.make_mesh((8,), ("d",))}
found = {"devices": len(jax.devices())}
for name, mesh in meshes.items():
    cut = lambda leaf: P(None, "d") if leaf.ndim == 2 and leaf.shape[1] % 8 == 0 else P()
    spread = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, cut(leaf))), start)
    whole = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, P())), start)
    # With explicit axes the model itself says where its products live, so there the batch alone is spread.
    ts = spread if name == "auto" else whole
    x, y = (jax.device_put(leaf, NamedSharding(mesh, P("d"))) for leaf in (X, Y))
    for _ in range(4):
        ts = step(ts, x, y)
    after = ts.commit(net, state)
    pae.check(after, net); pae.verify(after)
    pairs = list(zip(jax.tree.leaves(ts.params), jax.tree.leaves(alone.params)))
    close = all(np.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs)
    exact, bits = True, True
    for fraction, scope in ((0.1, "leaf"), (1 / 3, "global"), (0.75, "leaf")):
        pruned, wanted = prune(spread, fraction, scope), pae.prune(state, "new", fraction, scope=scope)
        given = pruned.commit(net, state)
        exact &= all((np.asarray(a) == np.asarray(b)).all()
                     for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(wanted)))
        exact &= all(a.sharding.is_equivalent_to(b.sharding, a.ndim)
                     for a, b in zip(jax.tree.leaves(pruned.params), jax.tree.leaves(spread.params)))
    # Gradients of weights that are spread, from elsewhere: the optimizer and the gate alone.
    gated, wanted = pushed(spread), pushed(start)
    pairs = list(zip(jax.tree.leaves(gated.params), jax.tree.leaves(wanted.params), jax.tree.leaves(spread.params)))
    close &= all(np.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b, _ in pairs)
    exact &= all(a.sharding.is_equivalent_to(c.sharding, a.ndim) for a, _, c in pairs)
    pae.verify(gated.commit(net, state))
    for path, w in flatten(after.shared).items():
        old = np.asarray(flatten(state.owner)[path]) == 1
        bits &= np.asarray(w)[old].tobytes() == np.asarray(flatten(state.shared)[path])[old].tobytes()
    places = jax.tree.leaves(after), jax.tree.leaves(state)
    home = all(a.sharding == b.sharding for a, b in zip(*places))
    result = {"close": close, "exact": exact, "bits": bits, "home": home}
    found[name] = {key: bool(value) for key, value in result.items()}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def on_eight_devices(on_devices):
    return json.loads(on_devices(8, DEVICES)[-1])


@pytest.mark.parametrize("axes", ["auto", "explicit"])
def test_a_train_state_spread_over_eight_devices_trains_prunes_and_comes_home(on_eight_devices, axes):
    assert on_eight_devices["devices"] == 8
    assert on_eight_devices[axes] == {"close": True, "exact": True, "bits": True, "home": True}


ELSEWHERE = """
import jax, numpy as np, optax
import pae_jax as pae

X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
net = pae.linen(pae.models.MLP, X[:1])
free = pae.pack(net, pae.init(net, jax.random.key(0)), "old", head=2, key=jax.random.key(1))
free = pae.pack(net, pae.freeze(pae.prune(free, "old", 0.5), "old"), "new", head=2, key=jax.random.key(2))
home, away = jax.devices()[0], jax.devices()[2]
for state in (free, jax.device_put(free, home)):
    ts = jax.device_put(pae.TrainState.create(net, state, "new", tx=optax.sgd(0.1)), away)
    ts = jax.jit(lambda ts: ts.apply_gradients(grads=ts.params).prune(0.5))(ts)
    variables = jax.device_put(pae.task_variables(net, state, "new"), away)
    for after in (ts.commit(net, state), pae.commit(net, state, "new", variables)):
        pae.verify(after)
        for leaf, before in zip(jax.tree.leaves(after), jax.tree.leaves(state)):
            assert (leaf.devices(), leaf.committed) == ({home}, before.committed)
        for name in ("old", "new"):
            assert pae.predict(net, after, name, X).devices() == {home}
"""


def test_a_task_trained_on_another_device_is_committed_to_the_device_of_the_network(on_devices):
    assert on_devices(4, ELSEWHERE) == []


# What is trained, and what is read


def test_leaves_in_which_the_task_owns_nothing_are_no_parameters_and_have_no_optimizer_state(
    net, some_leaves, unforgotten
):
    ts = pae.TrainState.create(net, some_leaves, "new", tx=optax.adam(0.05), key=KEY(3))
    assert list(flatten(ts.params["shared"])) == ["Dense_1/kernel"]
    assert not any("Dense_0" in path for path in flatten(ts.opt_state))
    assert "Dense_0" in ts.variables["backbone"]["params"]
    grads = jax.grad(lambda params: loss_of(ts, params, X, Y)[0])(ts.params)
    assert jax.tree.structure(grads) == jax.tree.structure(ts.params)
    after = train(ts).commit(net, some_leaves)
    unforgotten(net, some_leaves, after)
    own = own_of(some_leaves)["Dense_1/kernel"]
    moved = np.asarray(after.shared["Dense_1"]["kernel"] != some_leaves.shared["Dense_1"]["kernel"])
    assert (moved == own).all()


def test_a_task_that_owns_no_shared_weight_trains_the_rest(net, packed, unforgotten):
    state = pae.pack(net, pae.freeze(packed, "a"), "new", head=2, key=KEY(2), allow_empty=True)
    ts = pae.TrainState.create(net, state, "new", tx=ADAMW)
    assert ts.params["shared"] == {}
    after = train(ts).commit(net, state)
    pae.verify(after)
    assert all(
        (np.asarray(a) == np.asarray(b)).all()
        for a, b in zip(*map(jax.tree.leaves, (after.shared, state.shared)), strict=True)
    )
    for a, b in zip(*(jax.tree.leaves(s.tasks["new"].head) for s in (after, state)), strict=True):
        assert (np.asarray(a) != np.asarray(b)).any()


def spoilt(ts, value, seed=0):
    """Return parameters with garbage wherever the task owns nothing."""
    masks = {"shared": pae.core.ownership.owned(ts.owner, ts.task_id)}
    if "pick" in ts.params:
        masks["pick"] = pae.core.picking.older(ts.owner, ts.task_id)

    def part(name, tree):
        flat = flatten(masks.get(name, {}))
        leaves = {
            path: jnp.where(flat[path], leaf, jnp.asarray(value, leaf.dtype)) if path in flat else leaf
            for path, leaf in flatten(tree).items()
        }
        return jax.tree.unflatten(jax.tree.structure(tree), list(leaves.values()))

    return {name: part(name, tree) for name, tree in ts.params.items()}


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e9, -1.0], ids=str)
@pytest.mark.parametrize("sharing", ["all", "first", "picked"])
def test_of_parameters_only_what_the_task_owns_is_read(net, sharing, value, assert_same):
    state = two_tasks(net, sharing=sharing)
    ts = train(pae.TrainState.create(net, state, "new", tx=ADAMW, key=KEY(3)), 1)
    garbage = spoilt(ts, value)
    assert jax.tree.structure(garbage) == jax.tree.structure(ts.params)
    run = jax.jit(lambda ts, params: ts.apply_fn(params, X, train=True))
    assert_same(run(ts, garbage), run(ts, ts.params))
    slopes = jax.jit(lambda ts, params: jax.grad(lambda p: loss_of(ts, p, X, Y)[0])(params))
    assert_same(slopes(ts, garbage), slopes(ts, ts.params))
    replaced = ts.replace(params=garbage)
    assert_same(replaced.params, ts.params)
    assert_same(replaced.commit(net, state), ts.commit(net, state))
    grads = jax.tree.map(jnp.ones_like, ts.params)
    wild = spoilt(dataclasses.replace(ts, params=grads), value)
    for changed in (replaced.apply_gradients(grads=grads), ts.apply_gradients(grads=wild)):
        plain = ts.apply_gradients(grads=grads)
        assert_same((changed.params, changed.opt_state), (plain.params, plain.opt_state))


def test_parameters_come_in_with_the_dtype_they_have(net, state, assert_same):
    ts = pae.TrainState.create(net, state, "new", tx=ADAMW)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), ts.params["shared"])
    assert_same(ts.replace(params={**ts.params, "shared": wide}).params, ts.params)
    for wrong in ({"shared": ts.params["shared"]}, {**ts.params, "head": {}}, {}):
        with pytest.raises(pae.StructureError, match=r"params.*must have the tree of ts.params"):
            ts.replace(params=wrong)
        with pytest.raises(pae.StructureError, match="params"):
            ts.apply_fn(wrong, X)


def test_the_optimizer_sees_zeros_where_the_task_owns_nothing(net, state):
    seen = []

    def update(grads, _, params):
        seen.append((grads, params))
        return jax.tree.map(jnp.ones_like, grads), optax.EmptyState()

    def init(params):
        seen.append((params, params))
        return optax.EmptyState()

    ts = pae.TrainState.create(net, state, "new", tx=optax.GradientTransformation(init, update))
    after = ts.apply_gradients(grads=jax.tree.map(jnp.ones_like, ts.params))
    for trees in seen:
        for tree, (path, own) in itertools.product(trees, own_of(state).items()):
            assert not np.asarray(flatten(tree["shared"])[path])[~own].any()
    for path, own in own_of(state).items():
        old, new = (np.asarray(flatten(s.params["shared"])[path]) for s in (ts, after))
        np.testing.assert_array_equal(new[own], old[own] + 1)
        assert new[~own].tobytes() == old[~own].tobytes()


def test_clipping_by_the_global_norm_sees_own_weights_alone(net, state):
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    ts = pae.TrainState.create(net, state, "new", tx=tx)
    draw = np.random.default_rng(3)
    grads = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), leaf.dtype), ts.params)
    wild = spoilt(dataclasses.replace(ts, params=grads), 1e6)
    steps = [ts.apply_gradients(grads=g).params for g in (grads, wild)]
    for one, other in zip(*map(jax.tree.leaves, steps), strict=True):
        np.testing.assert_array_equal(one, other)
    length = sum(float(((a - b) ** 2).sum()) for a, b in zip(*map(jax.tree.leaves, (steps[0], ts.params)), strict=True))
    assert length == pytest.approx(1.0, rel=1e-4)


# Picks


def test_scores_of_older_weights_learn_and_the_weights_themselves_get_no_gradient(net, picked, unforgotten):
    ts = pae.TrainState.create(net, picked, "new", tx=optax.adam(0.01), key=KEY(3))
    assert set(ts.params) == {"shared", "local", "head", "pick"}
    grads = jax.jit(lambda ts: jax.grad(lambda params: loss_of(ts, params, X, Y)[0])(ts.params))(ts)
    own = own_of(picked)
    for path, mask in own.items():
        assert not np.asarray(flatten(grads["shared"])[path])[~mask].any(), path
        assert np.asarray(flatten(grads["pick"])[path])[~mask].any(), path
        assert not np.asarray(flatten(grads["pick"])[path])[mask].any(), path
    after = train(ts).commit(net, picked)
    unforgotten(net, picked, after)
    for path, mask in own.items():
        old, new = (np.asarray(flatten(s.tasks["new"].pick)[path]) for s in (picked, after))
        assert new[mask].tobytes() == old[mask].tobytes()
        assert (new != old)[~mask].mean() > 0.5
        weights = [np.asarray(flatten(s.shared)[path]) for s in (picked, after)]
        assert (weights[0] != weights[1])[mask].mean() > 0.5
    frozen = pae.freeze(after, "new")
    np.testing.assert_array_equal(pae.predict(net, frozen, "new", X), pae.predict(net, after, "new", X))


@pytest.mark.parametrize("ternary", [False, True], ids=["binary", "ternary"])
def test_a_task_that_picks_computes_in_steps_of_ones_own_what_predict_does(net, ternary, assert_same):
    state = two_tasks(net, sharing="picked", picking=pae.Picking(ternary=ternary))
    entry, draw = state.tasks["new"], np.random.default_rng(1)
    pick = jax.tree.map(lambda p: jnp.asarray(draw.choice([-0.1, 0.0, 0.1], p.shape), jnp.float32), entry.pick)
    state = state.replace(tasks={**state.tasks, "new": entry.replace(pick=pick)})
    parts = (("shared", "local", "head", "pick"), ("shared", "local", "head"), ("pick",), ("head",))
    for chosen in parts:
        ts = pae.TrainState.create(net, state, "new", tx=ADAMW, parts=chosen)
        assert ("pick" in ts.params) == ("pick" in chosen)
        found = jax.jit(lambda ts: ts.apply_fn(ts.params, X)[0])(ts)
        assert_same(found, pae.predict(net, state, "new", X))
        assert_same(ts.commit(net, state), state)


# commit


def test_commit_right_after_create_changes_nothing(either, assert_same):
    net, state = either
    for parts in itertools.combinations(("shared", "local", "head"), 2):
        ts = pae.TrainState.create(net, state, "new", tx=ADAMW, parts=parts)
        assert_same(ts.commit(net, state), state)


def test_commit_refuses_a_state_that_it_was_not_created_from(net, state):
    ts = train(pae.TrainState.create(net, state, "new", tx=ADAMW), 1)
    pruned = pae.prune(state, "new", 0.5)
    with pytest.raises(pae.ForgettingError, match=r"task 'new': \d+ weights of 'Dense_0/kernel' have other owners"):
        ts.commit(net, pruned)
    other = pae.prune(pae.pack(net, pae.init(net, KEY(8)), "old", head=2, key=KEY(9)), "old", 0.5)
    other = pae.pack(net, pae.freeze(other, "old"), "new", head=2, key=KEY(2))
    with pytest.raises(pae.ForgettingError, match="task 'new'"):
        ts.commit(net, other)
    same_owners = other.replace(owner=state.owner)
    with pytest.raises(
        pae.ForgettingError, match=r"task 'new': \d+ of \d+ weights of 'Dense_0/kernel' .* have changed"
    ):
        ts.commit(net, same_owners)
    with pytest.raises(pae.UnknownTaskError, match="unknown task 2; the network to commit to has"):
        ts.commit(net, pae.drop(state, "new"))
    with pytest.raises(pae.PhaseError, match="commit cannot be called now: task 'new' is frozen"):
        ts.commit(net, pae.freeze(state, "new"))
    wider = pae.pack(net, pae.drop(state, "new"), "new", head=3, key=KEY(2))
    with pytest.raises(pae.StructureError, match="head of task 'new'"):
        ts.commit(net, wider)


def test_commit_refuses_another_task_that_has_the_same_id(net, state):
    ts = jax.jit(plain_step)(pae.TrainState.create(net, state, "new", tx=ADAMW), X[:8], Y[:8])
    other = pae.pack(net, pae.drop(state, "new"), "other", head=2, key=KEY(2), weight_init="fresh")
    with pytest.raises(pae.ForgettingError, match="was created for another task than 'other', which has the same id 2"):
        ts.commit(net, other)


def test_commit_refuses_another_network_another_width_and_a_stack_of_train_states_by_name(
    net, state, vector_module, nnx_net
):
    ts = pae.TrainState.create(net, state, "new", tx=ADAMW)
    for other in (nnx_net, pae.linen(vector_module, X[:1], packable=lambda path, leaf: "Dense_0" in path)):
        with pytest.raises(pae.StructureError, match=r"state.shared, leaf .*Was the state made with this net"):
            ts.commit(other, state)
    wide = pae.expand(net, pae.drop(state, "new"), width=1.5, key=KEY(4))
    with pytest.raises(pae.StructureError, match=r"owners .* of task 'new', leaf 'Dense_0/kernel': found int8\[4,8\]"):
        ts.commit(net, pae.pack(net, wide, "new", head=2, key=KEY(2)))
    with pytest.raises(pae.ArgumentError, match="this is a stack of 3 train states; commit one"):
        jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), ts).commit(net, state)


def test_commit_refuses_what_was_changed_behind_its_back(net, some_leaves):
    ts = pae.TrainState.create(net, some_leaves, "new", tx=ADAMW)
    backbone = ts.variables["backbone"]
    params = {**backbone["params"], "Dense_0": jax.tree.map(lambda leaf: leaf + 1, backbone["params"]["Dense_0"])}
    changed = dataclasses.replace(ts, variables={**ts.variables, "backbone": {**backbone, "params": params}})
    with pytest.raises(pae.ForgettingError, match=r"32 of 32 weights of 'Dense_0/kernel' that it does not own"):
        changed.commit(net, some_leaves)
    claimed = dataclasses.replace(ts, owner=jax.tree.map(lambda o: jnp.full_like(o, 2), ts.owner))
    with pytest.raises(pae.ForgettingError, match="32 weights of 'Dense_0/kernel' have other owners than in the state"):
        claimed.commit(net, some_leaves)


@pytest.mark.parametrize("part", ["shared", "local", "head", "statistics"])
def test_commit_refuses_what_is_not_finite_by_leaf(net, state, part):
    ts = pae.TrainState.create(net, state, "new", tx=ADAMW)
    if part == "statistics":
        nan = jax.tree.map(lambda leaf: leaf * jnp.nan, ts.variables["backbone"]["batch_stats"])
        ts = ts.apply_gradients(grads=ts.params, updates={"backbone": {"batch_stats": nan}, "head": {}})
    else:
        ts = ts.replace(params={**ts.params, part: jax.tree.map(lambda leaf: leaf * jnp.nan, ts.params[part])})
    with pytest.raises(pae.StructureError, match=r"task 'new', leaf '(backbone|head)/.*': found NaN or infinity"):
        ts.commit(net, state)


def test_commit_inside_jit_is_refused_with_a_reason(net, state):
    ts = pae.TrainState.create(net, state, "new", tx=ADAMW)
    with pytest.raises(pae.ArgumentError, match="commit finds its task by the id, which has no value inside jit"):
        jax.jit(lambda ts: ts.commit(net, state))(ts)


def test_create_refuses_frozen_and_unknown_tasks_other_networks_and_what_is_no_optimizer(net, state, nnx_net):
    with pytest.raises(pae.PhaseError, match=r"TrainState.create cannot be called now: task 'old' is frozen"):
        pae.TrainState.create(net, state, "old", tx=ADAMW)
    with pytest.raises(pae.UnknownTaskError):
        pae.TrainState.create(net, state, "none", tx=ADAMW)
    with pytest.raises(pae.StructureError, match="Was the state made with this net"):
        pae.TrainState.create(nnx_net, state, "new", tx=ADAMW)
    with pytest.raises(pae.ArgumentError, match="an optimizer must be an optax gradient transformation, found str"):
        pae.TrainState.create(net, state, "new", tx="adam")
    with pytest.raises(pae.ArgumentError, match="parts must be one of 'shared', 'local', 'head', 'pick', found 'body'"):
        pae.TrainState.create(net, state, "new", tx=ADAMW, parts=("body",))
    for parts in ((), ("pick",)):
        with pytest.raises(pae.ArgumentError, match="parts is empty, or names what the task does not have"):
            pae.TrainState.create(net, state, "new", tx=ADAMW, parts=parts)
    with pytest.raises(pae.ArgumentError, match="key must be one random key"):
        pae.TrainState.create(net, state, "new", tx=ADAMW, key=3)


LOOKAHEAD = optax.lookahead(optax.sgd(0.1), sync_period=2, slow_step_size=0.5)


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.clip(1.0), LOOKAHEAD),
        optax.MultiSteps(LOOKAHEAD, 2),
        optax.lookahead(optax.chain(LOOKAHEAD), sync_period=2, slow_step_size=0.5),
    ],
    ids=["chain", "steps", "lookahead"],
)
def test_create_refuses_a_lookahead_that_is_not_outermost(net, state, tx):
    with pytest.raises(pae.ArgumentError, match=r"put optax\.lookahead outermost"):
        pae.TrainState.create(net, state, "new", tx=tx)


@pytest.mark.parametrize("tx", [LOOKAHEAD, optax.chain(LOOKAHEAD)], ids=["outermost", "chain"])
def test_replace_refuses_an_optimizer_with_slow_parameters_and_one_without_in_its_place(net, state, tx):
    ts = pae.TrainState.create(net, state, "new", tx=optax.sgd(0.1))
    with pytest.raises(pae.ArgumentError, match=r"slow parameters of optax\.lookahead.*TrainState\.create"):
        ts.replace(tx=tx, opt_state=tx.init(optax.LookaheadParams.init_synced(ts.params)))
    slow = pae.TrainState.create(net, state, "new", tx=LOOKAHEAD)
    assert slow.replace(opt_state=slow.opt_state).slow is slow.slow
    with pytest.raises(pae.ArgumentError, match=r"slow parameters of optax\.lookahead.*TrainState\.create"):
        slow.replace(tx=ADAMW, opt_state=ADAMW.init(slow.params))


# Parts, randomness, and what modules sow


@pytest.mark.parametrize("parts", [("shared",), ("local",), ("head",), ("shared", "head"), ("local", "head")], ids=str)
def test_parts_say_what_is_trained_and_the_rest_stays_bit_for_bit(either, parts, assert_same):
    net, state = either
    ts = pae.TrainState.create(net, state, "new", tx=ADAMW, parts=parts)
    assert set(ts.params) == set(parts)
    after = train(ts).commit(net, state)
    old, new = state.tasks["new"], after.tasks["new"]
    trees = {"shared": (state.shared, after.shared), "local": (old.local, new.local), "head": (old.head, new.head)}
    for part, (before, now) in trees.items():
        if part in parts:
            moved = [
                bool((np.asarray(a) != np.asarray(b)).any())
                for a, b in zip(*map(jax.tree.leaves, (before, now)), strict=True)
            ]
            assert all(moved), part
        else:
            assert_same(now, before)
    pae.verify(after)


def test_without_local_the_backbone_runs_as_in_evaluation(sizes, assert_same):
    net, state = sizes
    ts = pae.TrainState.create(net, state, "new", tx=ADAMW, key=KEY(3), parts=("shared", "head"))
    assert_same(ts.apply_fn(ts.params, X, train=True)[0], ts.apply_fn(ts.params, X)[0])
    ts = pae.TrainState.create(net, state, "new", tx=ADAMW, key=KEY(3))
    assert (ts.apply_fn(ts.params, X, train=True)[0] != ts.apply_fn(ts.params, X)[0]).any()


def test_randomness_comes_from_the_key_and_the_step_or_from_what_a_call_brings(sizes, assert_same):
    net, state = sizes
    ts = pae.TrainState.create(net, state, "new", tx=ADAMW, key=KEY(3))

    def out(ts, **rngs):
        return ts.apply_fn(ts.params, X, train=True, **rngs)[0]

    assert_same(out(ts), out(ts))
    later = dataclasses.replace(ts, step=ts.step + 1)
    assert (out(later) != out(ts)).any()
    assert (out(ts.replace(key=KEY(4))) != out(ts)).any()
    assert_same(out(later, rngs=KEY(5)), out(ts, rngs=KEY(5)))
    assert (out(ts, rngs=KEY(6)) != out(ts, rngs=KEY(5))).any()
    named = {"dropout": KEY(7)}
    without = pae.TrainState.create(net, state, "new", tx=ADAMW)
    assert without.key is None
    assert_same(out(without, rngs=named), out(ts, rngs=named))
    assert_same(ts.apply_fn(ts.params, X, rngs=KEY(5))[0], ts.apply_fn(ts.params, X)[0])


class Sows(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        h = nn.Dense(6)(x)
        self.sow("intermediates", "h", h)
        self.sow("losses", "size", (h**2).mean())
        return nn.BatchNorm(use_running_average=not train, momentum=0.5)(h)


def test_what_modules_sow_comes_with_the_updates_and_apply_gradients_takes_no_notice(unforgotten):
    net = pae.linen(lambda width: Sows(), X[:1])
    state = two_tasks(net, head=Sows())
    ts = pae.TrainState.create(net, state, "new", tx=ADAMW)

    @jax.jit
    def penalised(ts, x, y):
        def loss(params):
            out, updates = ts.apply_fn(params, x, train=True)
            sown = [updates[part]["losses"]["size"][0] for part in ("backbone", "head")]
            return CE(out, y).mean() + sum(sown), updates

        grads, updates = jax.grad(loss, has_aux=True)(ts.params)
        return ts.apply_gradients(grads=grads, updates=updates), updates

    after, updates = penalised(ts, X, Y)
    assert {name for part in updates.values() for name in part} == {"intermediates", "losses", "batch_stats"}
    assert jax.tree.structure(after) == jax.tree.structure(ts)
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()),
        after.variables["backbone"]["batch_stats"],
        ts.variables["backbone"]["batch_stats"],
    )
    assert all(jax.tree.leaves(moved))
    unforgotten(net, state, after.commit(net, state))
    still = ts.apply_gradients(grads=jax.tree.map(jnp.ones_like, ts.params))
    for one, other in zip(*(jax.tree.leaves(s.variables) for s in (still, ts)), strict=True):
        np.testing.assert_array_equal(one, other)


# As a Python object


def test_a_train_state_is_a_tree_copies_and_pickles(net, state, assert_same):
    ts = train(pae.TrainState.create(net, state, "new", tx=pae.recipes.Adam(learning_rate=0.01), key=KEY(3)), 1)
    assert_same(jax.tree.map(lambda leaf: leaf, ts).params, ts.params)
    paths = {path.split("/")[0] for path in flatten(ts)}
    assert paths == {"step", "params", "opt_state", "variables", "owner", "task_id", "task_name", "key"}
    deep = copy.deepcopy(ts)
    assert all(a is not b for a, b in zip(jax.tree.leaves(deep), jax.tree.leaves(ts), strict=True))
    assert_same((deep.params, deep.opt_state), (ts.params, ts.opt_state))
    assert copy.copy(ts).params is ts.params
    again = pickle.loads(pickle.dumps(ts))
    assert_same((again.params, again.opt_state, again.variables), (ts.params, ts.opt_state, ts.variables))
    with pytest.raises(pae.ArgumentError, match=r"unpickled without its net.*ts.replace\(net=...\)"):
        again.apply_fn(again.params, X)
    again = again.replace(net=net)
    assert_same(train(again, 1).params, train(ts, 1).params)
    assert_same(again.commit(net, state), ts.commit(net, state))
    assert repr(ts).startswith("TrainState(step 1, ") and "\n" not in repr(ts)


def test_flax_writes_a_train_state_to_bytes_and_reads_it_into_one_of_the_same_task(net, state, assert_same):
    new = lambda tx, **options: pae.TrainState.create(net, state, "new", tx=tx, **options)  # noqa: E731
    ts = train(new(ADAMW, key=KEY(3)), 2)
    data = serialization.to_bytes(ts)
    again = serialization.from_bytes(new(ADAMW, key=KEY(9)), data)
    assert jax.tree.structure(again) == jax.tree.structure(ts)
    assert_same(train(again, 2).commit(net, state), train(ts, 2).commit(net, state))
    assert jax.random.key_impl(again.key) == jax.random.key_impl(ts.key)
    for other in (new(optax.sgd(0.1, momentum=0.9), key=KEY(3)), new(ADAMW), new(ADAMW, key=KEY(3), parts=("head",))):
        with pytest.raises(pae.StructureError, match=r"train state, leaf .*created for the same task"):
            serialization.from_bytes(other, data)


def test_replace_refuses_what_is_no_key_and_an_optimizer_whose_state_is_another(net, state, assert_same):
    ts = train(pae.TrainState.create(net, state, "new", tx=optax.adam(0.01), key=KEY(3)), 1)
    for key in (1, jax.random.split(KEY(0)), "key"):
        with pytest.raises(pae.ArgumentError, match="key must be one random key"):
            ts.replace(key=key)
    raw = jax.random.key_data(KEY(7))
    assert_same(*(jax.random.key_data(ts.replace(key=key).key) for key in (raw, KEY(7))))
    assert ts.replace(key=None).key is None
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), ts)
    assert stack.replace(key=jax.random.split(KEY(0)), tx=optax.adam(0.1)).key.shape == (2,)
    for change in ({"tx": optax.sgd(0.1, momentum=0.9)}, {"tx": optax.adamw(0.1)}, {"opt_state": {"count": 1}}):
        with pytest.raises(pae.ArgumentError, match=r"opt_state is not of the form.*TrainState.create"):
            ts.replace(**change)
    with pytest.raises(pae.ArgumentError, match="an optimizer must be"):
        ts.replace(tx=0.1)
    other = optax.sgd(0.1, momentum=0.9)
    for after in (ts.replace(tx=optax.adam(0.1)), ts.replace(tx=other, opt_state=other.init(ts.params))):
        assert int(train(after, 1).step) == 2


def test_a_step_that_donates_its_state_leaves_what_was_committed_from_it(net, state, bits):
    donating = jax.jit(plain_step, donate_argnums=0)
    ts = donating(pae.TrainState.create(net, state, "new", tx=optax.sgd(0.1)), X[:8], Y[:8])
    committed = pae.freeze(ts.commit(net, state), "new")
    before = bits(pae.predict(net, committed, "new", X))
    donating(ts, X[:8], Y[:8])
    assert bits(pae.predict(net, committed, "new", X)) == before
    pae.verify(committed)


def test_gradients_and_parameters_of_other_shapes_are_refused_by_leaf(net, state):
    ts = pae.TrainState.create(net, state, "new", tx=optax.sgd(0.1))
    zeros = jax.tree.map(jnp.zeros_like, ts.params)
    row = {**zeros, "shared": {**zeros["shared"], "Dense_0": {"kernel": jnp.ones((1, 8))}}}
    examples = jax.tree.map(lambda leaf: jnp.zeros((3, *leaf.shape)), zeros)
    with pytest.raises(pae.StructureError, match=r"grads, leaf 'shared/Dense_0/kernel'.*\[1,8\].*\[4,8\]"):
        ts.apply_gradients(grads=row)
    with pytest.raises(pae.StructureError, match="grads, leaf"):
        ts.apply_gradients(grads=examples)
    with pytest.raises(pae.StructureError, match=r"grads, leaf 'head/bias': found nothing"):
        ts.apply_gradients(grads={"shared": zeros["shared"], "local": zeros["local"]})
    with pytest.raises(pae.StructureError, match=r"params, leaf 'shared/Dense_0/kernel'"):
        ts.replace(params=row)
    with pytest.raises(pae.StructureError, match=r"params, leaf 'shared/Dense_0/kernel'"):
        ts.apply_fn(row, X)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (
            (X * 9).astype(np.uint8),
            pae.StructureError,
            r"input: found uint8\[40,4\], expected float32\[batch,4\].*scale",
        ),
        (X[:, :3], pae.StructureError, r"input: found float32\[40,3\], expected float32\[batch,4\]"),
        (X[0], pae.StructureError, r"found float32\[4\], .*The batch axis comes first"),
        ((X, Y), pae.StructureError, r"input: found tuple of 2"),
        (np.ma.masked_array(X, X > 0), pae.DataError, "masked array"),
    ],
    ids=["integers", "width", "no batch", "pair", "masked"],
)
def test_inputs_that_predict_refuses_are_refused_by_apply_fn(net, state, wrong, error, message):
    ts = pae.TrainState.create(net, state, "new", tx=optax.sgd(0.1))
    with pytest.raises(error, match=message):
        ts.apply_fn(ts.params, wrong)
    with pytest.raises(error):
        pae.predict(net, state, "new", wrong)
    if error is pae.StructureError:
        with pytest.raises(error, match=message):
            jax.eval_shape(lambda x: ts.apply_fn(ts.params, x, train=True), wrong)


def test_inputs_of_the_samples_kind_are_taken_in_lists_and_example_by_example(net, state, assert_same):
    ts = pae.TrainState.create(net, state, "new", tx=optax.sgd(0.1))
    run = lambda x: ts.apply_fn(ts.params, x)[0]  # noqa: E731
    assert_same(run(X.tolist()), run(X))
    np.testing.assert_allclose(jax.vmap(lambda x: run(x[None])[0])(X), run(X), rtol=1e-5, atol=1e-6)
    assert run(jnp.asarray(X, jnp.bfloat16)).shape == run(X.astype(np.float64)).shape == (40, 2)


def test_updates_that_apply_fn_did_not_return_are_refused(net, state):
    ts = pae.TrainState.create(net, state, "new", tx=optax.sgd(0.1))
    zeros = jax.tree.map(jnp.zeros_like, ts.params)
    _, updates = ts.apply_fn(ts.params, X, train=True)
    for wrong in (updates["backbone"], updates["backbone"]["batch_stats"]):
        with pytest.raises(pae.ArgumentError, match="expected those that apply_fn returns"):
            ts.apply_gradients(grads=zeros, updates=wrong)
    for wrong in ((X, updates), {"backbone": None}, {"backbone": {"batch_stats": None}}):
        with pytest.raises(pae.ArgumentError, match=r"updates (is|has) .*, expected those that apply_fn returns"):
            ts.apply_gradients(grads=zeros, updates=wrong)
    batched = jax.tree.map(lambda leaf: leaf[None], updates)
    with pytest.raises(pae.StructureError, match="updates of the backbone, leaf 'batch_stats"):
        ts.apply_gradients(grads=zeros, updates=batched)


def test_scores_of_picks_that_are_not_finite_are_not_committed(net, picked):
    ts = pae.TrainState.create(net, picked, "new", tx=optax.sgd(0.1))
    ts = ts.replace(params={**ts.params, "pick": jax.tree.map(lambda leaf: leaf * jnp.nan, ts.params["pick"])})
    with pytest.raises(pae.StructureError, match=r"leaf 'pick/.*NaN or infinity"):
        ts.commit(net, picked)


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(6)(x))


def test_a_model_that_draws_in_training_needs_a_key_of_the_right_stream():
    net, x = pae.linen(lambda width: Dropping(), jnp.zeros((1, 4))), jnp.ones((2, 4))
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
    ts, key = pae.TrainState.create(net, state, "a", tx=optax.sgd(0.1)), jax.random.key(2)
    for rngs, message in (
        (None, r"Dropping draws random numbers in training and got none: pass rngs=, or a key to TrainState.create"),
        ({"drop": key}, r"Dropping draws .* a stream that rngs= does not have, which has 'drop' .*\"dropout\""),
        (0, "rngs must be one random key"),
        ([key, key], "rngs must be one random key"),
    ):
        with pytest.raises(pae.ArgumentError, match=message):
            ts.apply_fn(ts.params, x, train=True, rngs=rngs)
    for rngs in (key, jax.random.PRNGKey(2), {"dropout": key}):
        ts.apply_fn(ts.params, x, train=True, rngs=rngs)
