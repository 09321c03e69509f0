"""A task that owns a few weights of a large network: what it cannot change costs nothing, and nothing else differs."""

import copy
import dataclasses
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import pae_jax as pae
from pae_jax.training import places
from pae_jax.training.task_arrays import own_masks
from pae_jax.trees import flatten

CE = optax.softmax_cross_entropy_with_integer_labels
KEY = jax.random.key
X = np.random.default_rng(0).normal(size=(48, 16)).astype(np.float32)
Y = (X[:, 0] > X[:, 1]).astype(np.int32)
ADAM, SGD = optax.adam(0.02), optax.sgd(0.1, momentum=0.9)


class Backbone(nn.Module):
    """Its middle layer has 40 units at width 1, and 45 at width 1.125."""

    width: float = 1.0

    @nn.compact
    def __call__(self, x, train):
        x = jnp.tanh(nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(24)(x)))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return jnp.tanh(nn.Dense(24)(jnp.tanh(nn.Dense(int(40 * self.width))(x))))


class NnxBackbone(nnx.Module):
    def __init__(self, width, rngs):
        self.first = nnx.Linear(16, int(40 * width), rngs=rngs)
        self.last = nnx.Linear(int(40 * width), 24, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.last(jnp.tanh(self.first(x))))


def widened(net):
    """Return a network whose newest task owns the units that were added to one that is frozen."""
    state = pae.pack(net, pae.init(net, KEY(0)), "old", head=2, key=KEY(1))
    state = pae.expand(net, pae.freeze(state, "old"), width=1.125, key=KEY(2))
    return pae.pack(net, state, "new", head=2, key=KEY(3), weight_init="fresh")


def strewn(net, seed=0):
    """Return a network whose newest task owns the smallest 4 % of each kernel."""
    state = pae.pack(net, pae.init(net, KEY(seed)), "old", head=2, key=KEY(1))
    state = pae.freeze(pae.prune(state, "old", 0.04), "old")
    return pae.pack(net, state, "new", head=2, key=KEY(3), weight_init="fresh")


@pytest.fixture(scope="module")
def linen_net():
    return pae.linen(Backbone, X[:1])


@pytest.fixture(scope="module", params=["block", "block, nnx", "entries"])
def small(request, linen_net):
    if request.param == "block, nnx":
        net = pae.nnx(NnxBackbone, X[:1])
        return net, widened(net)
    return linen_net, (widened if request.param == "block" else strewn)(linen_net)


def create(net, state, tx=ADAM, **options):
    return pae.TrainState.create(net, state, "new", tx=tx, key=KEY(4), **options)


@pytest.fixture
def whole(monkeypatch):
    """Return `create` that makes the parameters whole leaves."""

    def make(*arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(places, "find", lambda owner, task_id: None)
            return create(*arguments, **options)

    return make


def plain_step(ts, x, y):
    def loss(params):
        out, updates = ts.apply_fn(params, x, train=True)
        return CE(out, y).mean(), updates

    grads, updates = jax.grad(loss, has_aux=True)(ts.params)
    return ts.apply_gradients(grads=grads, updates=updates)


step = jax.jit(plain_step)


def train(ts, steps=4):
    for start in range(0, 12 * steps, 12):
        ts = step(ts, X[start : start + 12], Y[start : start + 12])
    return ts


def owned(state):
    return {path: np.asarray(mask) for path, mask in flatten(pae.trainable(state, "new")).items()}


def check_unforgotten(net, before, after):
    pae.check(after, net)
    pae.verify(after)
    for path, mask in owned(before).items():
        old, new = (np.asarray(flatten(state.shared)[path]) for state in (before, after))
        assert new[~mask].tobytes() == old[~mask].tobytes(), path
    np.testing.assert_array_equal(pae.predict(net, after, "old", X), pae.predict(net, before, "old", X))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def close(one, other, **tolerance):
    for (path, a), b in zip(flatten(one).items(), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, err_msg=path, **{"rtol": 1e-3, "atol": 1e-5} | tolerance)


def test_a_task_that_owns_a_few_weights_has_optimizer_state_in_proportion_to_them(small, whole):
    net, state = small
    mine, ts = sum(mask.sum() for mask in owned(state).values()), create(net, state)
    assert mine <= count(ts.params["shared"]) <= 1.25 * mine
    moments = ts.opt_state[0]
    assert count(moments.mu["shared"]) == count(moments.nu["shared"]) == count(ts.params["shared"])
    grads = jax.eval_shape(lambda ts: jax.grad(lambda params: ts.apply_fn(params, X)[0].sum())(ts.params), ts)
    assert count(grads["shared"]) == count(ts.params["shared"])
    assert count(whole(net, state).params["shared"]) > 6 * mine


@pytest.mark.parametrize("tx", [ADAM, SGD], ids=["adam", "sgd"])
def test_training_a_part_of_a_leaf_is_training_the_leaf_whose_other_weights_are_frozen(small, whole, tx):
    net, state = small
    one, other = create(net, state, tx), whole(net, state, tx)
    close(*(jax.jit(lambda ts: ts.apply_fn(ts.params, X, train=True))(ts) for ts in (one, other)))
    committed = [train(ts).commit(net, state) for ts in (one, other)]
    close(committed[0].shared, committed[1].shared)
    close(*(after.tasks["new"] for after in committed))
    check_unforgotten(net, state, committed[0])
    for path, mask in owned(state).items():
        moved = np.asarray(flatten(committed[0].shared)[path] != flatten(state.shared)[path])
        assert moved[mask].mean() > 0.9 if mask.any() else not moved.any()


def test_fit_trains_parts_of_leaves_as_steps_of_ones_own_do(small, monkeypatch):
    net, state = small
    options = {"optimizer": ADAM, "epochs": 3, "batch_size": 16, "key": KEY(5)}
    after, history = pae.fit(net, state, "new", (X, Y), val=(X, Y), keep="best", **options)
    check_unforgotten(net, state, after)
    assert history.end.places
    further, _ = pae.fit(net, after, "new", (X, Y), resume=history, **options)
    check_unforgotten(net, state, further)
    monkeypatch.setattr(places, "find", lambda owner, task_id: None)
    wanted, whole_history = pae.fit(net, state, "new", (X, Y), val=(X, Y), keep="best", **options)
    assert not whole_history.end.places
    close(after.shared, wanted.shared)
    np.testing.assert_allclose(history.rows[-1]["loss"], whole_history.rows[-1]["loss"], rtol=1e-3)


def test_pruning_while_training_releases_the_same_weights(small, whole):
    net, state = small
    release = jax.jit(lambda ts, fraction, scope: ts.prune(fraction, scope=scope, of="own"), static_argnames="scope")
    for scope in ("leaf", "global"):
        one, other = (train(release(train(make(net, state), 1), 0.5, scope), 1) for make in (create, whole))
        found, wanted = (ts.commit(net, state) for ts in (one, other))
        for a, b in zip(*map(jax.tree.leaves, (found.owner, wanted.owner)), strict=True):
            np.testing.assert_array_equal(a, b)
        close(found.shared, wanted.shared)
        for path, mask in owned(state).items():
            freed = mask & (np.asarray(flatten(found.owner)[path]) == 0)
            assert freed.any() == mask.any()
            assert not np.asarray(flatten(found.shared)[path])[freed].any()


def test_a_fit_goes_on_with_the_leaves_it_began_with_though_pruning_has_left_little_of_them(linen_net):
    state = pae.pack(linen_net, pae.init(linen_net, KEY(0)), "new", head=2, key=KEY(1))
    options = {"optimizer": ADAM, "batch_size": 16, "key": KEY(5)}
    schedule = pae.CubicSchedule(final=0.97, end=4, every=2)
    after, history = pae.fit(linen_net, state, "new", (X, Y), epochs=2, pruning=schedule, **options)
    assert not history.end.places
    assert create(linen_net, after).places
    again, longer = pae.fit(linen_net, after, "new", (X, Y), epochs=1, resume=history, **options)
    assert len(longer.rows) == 3
    pae.check(again, linen_net)


def test_tasks_whose_parts_have_equal_shapes_share_a_compiled_step(linen_net):
    traced = []

    @jax.jit
    def counted(ts, x, y):
        traced.append(ts.places)
        return plain_step(ts, x, y)

    first = pae.freeze(strewn(linen_net), "new")
    wide = pae.expand(linen_net, first, width=1.125, key=KEY(5))
    for number in range(2):
        state = strewn(linen_net, seed=10 * number)
        after = counted(create(linen_net, state), X[:12], Y[:12]).commit(linen_net, state)
        check_unforgotten(linen_net, state, after)
    assert len(traced) == 1
    for number in range(2):  # each owns two of the units that were added, at other places
        third = pae.pack(linen_net, wide, "new 3", head=2, key=KEY(number), weight_init="fresh")
        half = jax.tree.map(lambda o: jnp.where((o == 3) & _pair(o.shape, number), o, jnp.minimum(o, 2)), third.owner)
        half = third.replace(owner=half)
        counted(pae.TrainState.create(linen_net, half, "new 3", tx=ADAM, key=KEY(4)), X[:12], Y[:12])
    assert len(traced) == 2


def _pair(shape, number):
    """Return one pair of the units that were added to the middle layer."""
    axis = 1 if shape[1] == 45 else 0
    return (jax.lax.broadcasted_iota(jnp.int32, shape, axis) - 40) // 2 == number


def test_of_parameters_only_what_the_task_owns_is_read(small):
    net, state = small
    ts = train(create(net, state), 1)
    masks = {path: np.asarray(mask) for path, mask in flatten(own_masks(ts)["shared"]).items()}
    leaves = [jnp.where(masks[path], leaf, jnp.nan) for path, leaf in flatten(ts.params["shared"]).items()]
    garbage = {**ts.params, "shared": jax.tree.unflatten(jax.tree.structure(ts.params["shared"]), leaves)}
    run = jax.jit(lambda ts, params: ts.apply_fn(params, X)[0])
    np.testing.assert_array_equal(run(ts, garbage), run(ts, ts.params))
    close(ts.replace(params=garbage).params, ts.params, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["look-ahead", "muon", "adafactor", "accumulated"])
def test_optimizers_of_other_kinds_see_the_parts(small, name):
    net, state = small
    tx = {
        "look-ahead": lambda: optax.lookahead(optax.sgd(0.1), 2, 0.5),
        "muon": lambda: optax.contrib.muon(0.02),
        "adafactor": lambda: optax.adafactor(0.02),
        "accumulated": lambda: optax.MultiSteps(optax.adam(0.02), 2),
    }[name]()
    after = train(create(net, state, tx), 3).prune(0.2, of="own").commit(net, state)
    check_unforgotten(net, state, after)


@pytest.mark.parametrize("kind", ["decay", "centralize"])
def test_an_optimizer_that_tells_kernels_by_their_axes_moves_single_weights_as_it_does_whole_leaves(
    linen_net, whole, kind
):
    state = strewn(linen_net)
    kernels = lambda params: jax.tree.map(lambda w: w.ndim > 1, params)  # noqa: E731
    decay = optax.adamw(0.1, weight_decay=1.0, mask=kernels)
    tx = decay if kind == "decay" else optax.chain(optax.centralize(), optax.sgd(0.1))
    one, other = create(linen_net, state, tx), whole(linen_net, state, tx)
    axes = lambda ts: [leaf.ndim for leaf in jax.tree.leaves(ts.params["shared"])]  # noqa: E731
    assert one.places and axes(one) == axes(other)
    if kind == "centralize":
        moved = step(one, X, Y).commit(linen_net, state)
        assert all((flatten(moved.shared)[path] != flatten(state.shared)[path]).any() for path in owned(state))
        return
    for _ in range(10):
        one, other = (ts.apply_gradients(grads=jax.tree.map(jnp.zeros_like, ts.params)) for ts in (one, other))
    found, wanted = (ts.commit(linen_net, state) for ts in (one, other))
    close(found.shared, wanted.shared)
    for path, mask in owned(state).items():
        before, after = (np.linalg.norm(np.asarray(flatten(s.shared)[path])[mask]) for s in (state, found))
        assert after == pytest.approx(0.9**10 * before, rel=1e-3)


def test_steps_in_a_scan_under_vmap_and_donated(small):
    net, state = small
    one = create(net, state)
    batches = jnp.asarray(X).reshape(4, 12, 16), jnp.asarray(Y).reshape(4, 12)
    scanned = jax.jit(lambda ts: jax.lax.scan(lambda ts, batch: (plain_step(ts, *batch), None), ts, batches)[0])(one)
    close(scanned.params, train(one).params, rtol=1e-2)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), one).replace(key=jax.random.split(KEY(9), 2))
    many = jax.jit(jax.vmap(lambda ts: plain_step(ts, X[:12], Y[:12])))(many)
    check_unforgotten(net, state, jax.tree.map(lambda leaf: leaf[1], many).commit(net, state))
    donated = jax.jit(plain_step, donate_argnums=0)
    ts = one
    for x, y in zip(*batches, strict=True):
        ts = donated(ts, x, y)
    check_unforgotten(net, state, ts.commit(net, state))


def test_a_train_state_of_parts_copies_pickles_and_is_stored(small, tmp_path):
    from orbax.checkpoint import v1 as ocp

    net, state = small
    ts = train(create(net, state, pae.recipes.Adam(learning_rate=0.01)), 1)
    wanted = train(ts, 1)
    stored = dataclasses.replace(ts, key=None)
    ocp.save(tmp_path / "ts", stored)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), stored)
    loaded = ocp.load(tmp_path / "ts", like).replace(key=ts.key)
    unpickled = pickle.loads(pickle.dumps(ts)).replace(net=net)
    for again in (copy.copy(ts), copy.deepcopy(ts), unpickled, loaded):
        close(train(again, 1).params, wanted.params, rtol=1e-6)
        check_unforgotten(net, state, again.commit(net, state))


def test_scores_of_a_few_free_weights_are_zero_elsewhere(linen_net):
    state = pae.pack(linen_net, pae.init(linen_net, KEY(0)), "old", head=2, key=KEY(1))
    state = pae.expand(linen_net, pae.freeze(state, "old"), width=1.125, key=KEY(2))
    options = {"head": 2, "key": KEY(3), "weight_init": "fresh"}
    scores = pae.gradient_scores(linen_net, state, "new", (X, Y), **options)
    for path, leaf in flatten(scores).items():
        free = np.asarray(flatten(state.owner)[path]) == 0
        assert not np.asarray(leaf)[~free].any()
        assert np.asarray(leaf)[free].any() == free.any()


def test_leaves_of_owners_that_are_traced_are_whole(linen_net):
    state = widened(linen_net)
    run = jax.jit(lambda state: create(linen_net, state).params)
    assert {leaf.shape for leaf in jax.tree.leaves(run(state)["shared"])} <= {
        w.shape for w in jax.tree.leaves(state.shared)
    }


DEVICES = """
import json, sys
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
sys.path.insert(0, sys.argv[1])
import test_small_tasks as t
import pae_jax as pae

net = pae.linen(t.Backbone, t.X[:1])
everywhere = Mesh(np.asarray(jax.devices()), ("d",))
for form in (t.widened, t.strewn):
    state = form(net)
    for mesh in (everywhere, jax.make_mesh((4,), ("d",))):
        ts = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, P())), t.create(net, state))
        pair = t.X, np.eye(2, dtype=np.float32)[t.Y]
        x, y = (jax.device_put(leaf, NamedSharding(mesh, P("d"))) for leaf in pair)
        def loss(params):
            return -jnp.sum(jax.nn.log_softmax(ts.apply_fn(params, x)[0]) * y)
        after = jax.jit(lambda ts: ts.apply_gradients(grads=jax.grad(loss)(ts.params)))(ts).commit(net, state)
        t.check_unforgotten(net, state, after)
    options = {"optimizer": t.ADAM, "epochs": 1, "batch_size": 16, "key": t.KEY(1)}
    devices = pae.Devices(everywhere, split_weights=True)
    after, _ = pae.fit(net, state, "new", (t.X, t.Y), devices=devices, **options)
    t.check_unforgotten(net, state, after)
print("fine")
"""


def test_parts_train_on_several_devices(on_devices):
    assert on_devices(4, DEVICES, os.path.dirname(__file__))[-1] == "fine"
