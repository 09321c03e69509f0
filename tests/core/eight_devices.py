"""Laws of networks that are spread over 8 devices; `test_sharded.py` runs them in a process that has as many."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.linen.spmd import logical_to_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import pae_jax as pae
from pae_jax.core import integrity, placement, pruning
from pae_jax.core.spread_arrays import pieces
from pae_jax.trees import flatten

KEY = jax.random.key
X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int32)
ONE_HOT = np.eye(2, dtype=np.float32)[Y]
SGD, ADAM = optax.sgd(0.1, momentum=0.9), optax.adam(0.01)
ROWS = {"params/Dense_0/kernel": P("d"), "params/Dense_1/kernel": P("d")}
COLUMNS = {"params": {"Dense_0": {"kernel": P(None, "model")}, "Dense_1": {"kernel": P(None, "model")}}}


class Backbone(nn.Module):
    width: float = 1.0

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(int(16 * self.width))(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        return jnp.tanh(nn.Dense(int(16 * self.width))(nn.relu(x)))


class Annotated(nn.Module):
    """Its kernels name the axes of a mesh, or logical axes that rules turn into those."""

    width: float = 1.0
    logical: bool = False

    @nn.compact
    def __call__(self, x, train):
        names = nn.with_logical_partitioning if self.logical else nn.with_partitioning
        axes = ("embed", "mlp") if self.logical else (None, "model")
        kernel = names(nn.initializers.lecun_normal(), axes)
        return jnp.tanh(nn.Dense(int(16 * self.width), kernel_init=kernel)(x))


def line():
    return Mesh(np.asarray(jax.devices()), ("d",))


def made(*kinds):
    """Return a mesh as JAX makes it: of explicit axes unless told otherwise."""
    return jax.make_mesh((2, 4), ("data", "model"), **({"axis_types": kinds} if kinds else {}))


PLACEMENTS = {
    "rows": lambda: (line(), ROWS),
    "both axes": lambda: both_axes,
}


def both_axes(path, leaf):
    split = {"params/Dense_0/kernel": P("model", "data"), "params/Dense_1/kernel": P("data", "model")}
    assert path.split("/")[0] in ("params", "batch_stats", "head") and leaf.shape
    return NamedSharding(made(), split.get(path, P()))


@pytest.fixture(scope="module")
def net():
    return pae.linen(Backbone, X[:1])


@pytest.fixture(scope="module", params=PLACEMENTS)
def layout(request):
    return PLACEMENTS[request.param]()


def story(net, state):
    """Return the states of a life without training, so that nothing depends on the order of summation."""
    states = [pae.pack(net, state, "a", head=2, key=KEY(1))]
    states.append(pae.prune(states[-1], "a", 0.5))
    states.append(pae.freeze(states[-1], "a"))
    states.append(pae.expand(net, states[-1], width=1.5, key=KEY(2)))
    states.append(pae.pack(net, states[-1], "b", head=2, key=KEY(3), sharing="picked"))
    states.append(pae.prune(states[-1], "b", 0.4, scope="global"))
    states.append(pae.freeze(states[-1], "b"))
    return states


@pytest.fixture(scope="module")
def empty(net):
    return pae.init(net, KEY(0))


@pytest.fixture(scope="module")
def alone(net, empty):
    return story(net, empty)


@pytest.fixture(scope="module")
def spread(net, empty, layout):
    return story(net, placement.place(net, empty, layout))


def specs(tree):
    return {path: getattr(leaf.sharding, "spec", None) for path, leaf in flatten(tree).items()}


def test_there_are_eight_devices():
    assert jax.device_count() == 8


def test_a_spread_network_has_the_owners_and_the_frozen_weights_of_one_on_one_device(alone, spread, bits):
    for one, many in zip(alone, spread, strict=True):
        assert bits(one.owner) == bits(many.owner)
        for w, v in zip(jax.tree.leaves(one.shared), jax.tree.leaves(many.shared), strict=True):
            np.testing.assert_allclose(np.asarray(w), np.asarray(v), rtol=1e-5)
        if one.tasks["a"].frozen:
            assert bits(one.tasks["a"].digests) == bits(many.tasks["a"].digests)
            pae.verify(many)


def test_every_operation_keeps_the_layout(net, spread, layout):
    wanted = specs(pae.init(net, KEY(0), sharding=layout).shared)
    assert any(spec != P() for spec in wanted.values())
    for state in [*spread, pae.drop(spread[-1], "b")]:
        assert specs(state.shared) == specs(state.owner) == wanted
    assert specs(spread[-1].tasks["b"].pick) == wanted
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(spread[-1].tasks["b"].head))


def test_the_outputs_of_a_frozen_task_keep_their_bits_on_their_layout(net, alone, spread, bits):
    before = pae.predict(net, spread[2], "a", X)
    np.testing.assert_allclose(np.asarray(before), np.asarray(pae.predict(net, alone[2], "a", X)), rtol=1e-4, atol=1e-6)
    for state in [*spread[3:], pae.drop(spread[-1], "b")]:
        assert bits(pae.predict(net, state, "a", X)) == bits(before)


def test_a_server_of_a_spread_network_answers_with_the_same_bits(net, spread, bits):
    for resident in ("weights", "masks"):
        server = pae.Server(net, spread[-1], resident=resident)
        assert bits(server.predict("a", X)) == bits(pae.predict(net, spread[2], "a", X))
    together = server.predict_all(X, together=True)
    np.testing.assert_allclose(np.asarray(together["b"]), np.asarray(server.predict("b", X)), rtol=1e-4, atol=1e-6)


def test_a_stage_and_a_bundle_are_read_onto_a_layout(net, spread, layout, tmp_path, bits, assert_same):
    state = spread[-1]
    pae.save(tmp_path / "stage", state)
    pae.write_bundle(tmp_path / "bundle", net, state)
    before = bits(pae.predict(net, state, "a", X))
    loaded = pae.load(net, tmp_path / "stage", sharding=layout)
    assert_same(loaded, state)
    assert_same(pae.load(net, tmp_path / "stage"), state)
    bundled = pae.read_bundle(net, tmp_path / "bundle", sharding=layout)
    for found in (loaded, bundled):
        assert specs(found.shared) == specs(found.owner) == specs(state.shared)
        assert specs(found.tasks["b"].pick) == specs(state.tasks["b"].pick)
        assert bits(pae.predict(net, found, "a", X)) == before
        pae.verify(found)


def test_scores_of_picks_are_read_onto_the_layout_of_the_weights(net, spread, layout, tmp_path, assert_same):
    pae.save(tmp_path / "stage", spread[4])
    loaded = pae.load(net, tmp_path / "stage", sharding=layout)
    assert_same(loaded, spread[4])
    assert specs(loaded.tasks["b"].pick) == specs(loaded.shared)


def test_init_makes_the_arrays_where_they_lie(net, empty, layout):
    state = pae.init(net, KEY(0), sharding=layout)
    for one, many in zip(jax.tree.leaves(empty), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(many), rtol=1e-5)
    assert all(axis == AxisType.Auto for leaf in jax.tree.leaves(state) for axis in leaf.sharding.mesh.axis_types)


# Nothing whole goes to the host


@pytest.fixture
def largest(monkeypatch):
    """Return a list of the sizes of spread arrays that went to the memory of the host."""
    found, kind = [], type(jnp.zeros(1))
    original = kind.__array__

    def counted(self, *arguments, **options):
        found.append(self.size)
        return original(self, *arguments, **options)

    monkeypatch.setattr(kind, "__array__", counted)
    return found


def step(ts, x, y):
    def loss(params):
        out, updates = ts.apply_fn(params, x, train=True)
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(out) * y, axis=-1)), updates

    grads, updates = jax.grad(loss, has_aux=True)(ts.params)
    return ts.apply_gradients(grads=grads, updates=updates)


STEP = jax.jit(step)


def test_no_array_goes_to_the_host_in_a_step_and_no_weights_in_prune_expand_and_commit(net, spread, largest):
    probe = np.asarray(spread[0].shared["Dense_0"]["kernel"] + 0)
    assert largest == [probe.size]
    smallest = min(leaf.size for leaf in jax.tree.leaves(spread[0].shared))
    ts = pae.TrainState.create(net, spread[0], "a", tx=SGD)
    mesh = spread[0].shared["Dense_0"]["kernel"].sharding.mesh
    pair = [jax.device_put(v, NamedSharding(mesh, P(mesh.axis_names[0]))) for v in (X, ONE_HOT)]
    ts = STEP(ts, *pair)
    largest.clear()
    with jax.transfer_guard("disallow"):
        ts = STEP(ts, *pair)
    assert largest == []
    for scope in ("leaf", "global"):
        ts.prune(0.5, scope=scope)
        pae.prune(spread[0], "a", 0.5, scope=scope)
    after = ts.commit(net, spread[0])
    assert specs(after.tasks["a"]) == specs(spread[0].tasks["a"]) and specs(after.shared) == specs(spread[0].shared)
    pae.expand(net, spread[2], width=1.5, key=KEY(2))
    assert max(largest, default=0) < smallest


def held(tree, device):
    """Return the bytes of a tree's arrays that one device holds."""
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


def test_a_device_holds_its_share_of_weights_owners_and_optimizer_and_all_else_whole(net, spread):
    state, layout = spread[0], net.layout(1.0)
    weights, local = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (layout.shared, layout.local))
    statistics, head, arrays = 2 * 16, 2 * 16 + 2, 1 + len(jax.tree.leaves((layout.shared, layout.local))) + 2
    ts = pae.TrainState.create(net, state, "a", tx=ADAM)
    for device in jax.devices()[:2]:
        first = device == jax.devices()[0]  # it alone has the digests, and the numbers that count steps
        assert held(state, device) == 5 * weights / 8 + 4 * (local + head) + 4 * local + first * 32 * arrays
        assert held(ts, device) == 13 * weights / 8 + 12 * (local + head) - 8 * statistics + first * 17


def largest_moved(compiled):
    """Return the size of the largest array that devices exchange in a compiled program."""
    pattern = r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    shapes = [
        shape for found in re.findall(pattern, compiled.as_text()) for shape in re.findall(r"\[([\d,]+)\]", found)
    ]
    return max(np.prod([int(size) for size in shape.split(",")]) for shape in shapes)


@pytest.mark.parametrize("spec", [P(("data", "model")), P(None, ("data", "model")), P("data", "model")])
def test_devices_exchange_no_whole_weights_in_prune_and_expand(spec):
    lay = NamedSharding(made(AxisType.Auto, AxisType.Auto), spec)
    leaf = lambda kind, *shape: jax.ShapeDtypeStruct(shape, kind, sharding=lay)  # noqa: E731
    shared, owner = {"k": leaf(jnp.float32, 64, 64)}, {"k": leaf(jnp.int8, 64, 64)}
    number, counts = jax.ShapeDtypeStruct((), jnp.int8), jax.ShapeDtypeStruct((1,), jnp.int32)
    for scope in ("leaf", "global"):
        compiled = pruning.release_smallest.lower(shared, owner, number, counts, scope=scope).compile()
        assert largest_moved(compiled) <= 64 * 8
    apply = lambda v, x: x @ v["k"]  # noqa: E731
    narrow, wide = ({"k": jax.ShapeDtypeStruct((64, n), jnp.float32)} for n in (64, 96))
    maps = pae.widen_maps(apply, narrow, apply, wide, jax.ShapeDtypeStruct((1, 64), jnp.float32))
    into = {"k": leaf(jnp.float32, 64, 96)}
    for compiled in (
        placement._widened.lower(maps, (lay,), shared, into).compile(),
        placement._gathered.lower((maps,), (lay,), into).compile(),
    ):
        assert "all-gather" not in str(compiled.as_text())
        if spec != P(("data", "model")):
            assert largest_moved(compiled) < 64 * 64


def test_a_digest_is_that_of_one_device_and_takes_one_block_of_rows_at_a_time():
    mesh = made(AxisType.Auto, AxisType.Auto)
    for value in (np.arange(96, dtype=np.float32).reshape(8, 4, 3), np.arange(16, dtype=np.int8), np.float32(3)):
        for spec in (P(), P("data"), P(None, "model"), P("model"), P("data", "model"), P(("data", "model"))):
            if len(spec) > value.ndim or (spec == P(None, "model") and value.ndim < 2):
                continue
            many = jax.device_put(value, NamedSharding(mesh, spec))
            assert integrity.array_digest(many) == integrity.array_digest(value), spec
    zeros = np.zeros((8, 4), np.float32)
    rows, columns = (jax.device_put(zeros, NamedSharding(mesh, spec)) for spec in (P("model"), P(None, "model")))
    for arrays in ((rows,), (columns,), (rows, columns), (zeros, columns)):
        assert [[piece.size for piece in found] for found in pieces(*arrays)] == [[8] * len(arrays)] * 4


# Whatever devices two states are on


def laid_out(tree, mesh, spec):
    """Return a tree as a user lays it out by hand."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec(leaf))), tree)


@pytest.mark.parametrize("home", [None, 3])
def test_a_train_state_laid_out_by_hand_is_committed_to_a_network_that_lies_elsewhere(net, alone, home, bits):
    state = pae.pack(net, pae.expand(net, alone[2], width=1.5, key=KEY(2)), "b", head=2, key=KEY(3))
    if home is not None:
        state = jax.device_put(state, SingleDeviceSharding(jax.devices()[home]))
    few = Mesh(np.asarray(jax.devices()[4:]), ("d",))
    for mesh, spec in ((line(), P()), (line(), P("d")), (few, P("d"))):
        ts = pae.TrainState.create(net, state, "b", tx=SGD)
        ts = laid_out(ts, mesh, lambda leaf, spec=spec: spec if leaf.ndim == 2 and leaf.shape[1] > 8 else P())
        moved = ts.replace(params=jax.tree.map(lambda leaf: leaf + 1, ts.params))
        after = moved.prune(0.25).commit(net, state)
        pae.check(after, net)
        pae.verify(after)
        assert pae.free_fraction(after) == 0.25 * 0.75  # of what task "b" owns
        assert bits(pae.predict(net, after, "a", X)) == bits(pae.predict(net, state, "a", X))
        foreign = moved.replace(owner=jax.tree.map(jnp.ones_like, moved.owner))
        with pytest.raises(pae.ForgettingError, match="have other owners than in the state"):
            foreign.commit(net, state)


def test_fit_on_a_mesh_chooses_the_best_epoch_of_a_network_that_is_bound_to_one_device(net, alone):
    state = pae.pack(net, alone[3], "b", head=2, key=KEY(3))
    state = jax.device_put(state, SingleDeviceSharding(jax.devices()[0]))
    options = {"optimizer": SGD, "epochs": 1, "batch_size": 8, "key": KEY(4), "val": (X, Y), "keep": "best"}
    after, _ = pae.fit(net, state, "b", (X, Y), devices=line(), **options)
    pae.verify(after)


# Meshes as people make them


def own_steps(net, state, mesh):
    ts = pae.TrainState.create(net, state, "a", tx=SGD)
    pair = X, ONE_HOT
    if mesh is not None:
        pair = [jax.device_put(v, NamedSharding(mesh, P("data"))) for v in pair]
    for _ in range(3):
        ts = STEP(ts, *pair)
    return ts.commit(net, state)


@pytest.fixture(scope="module")
def trained(net, alone):
    return own_steps(net, alone[0], None)


@pytest.fixture(scope="module")
def fitted(net, alone):
    return fit(net, alone[0])


def fit(net, state, **options):
    return pae.fit(net, state, "a", (X, Y), optimizer=SGD, epochs=2, batch_size=8, key=KEY(5), **options)[0]


def alike(found, wanted):
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(two), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kinds", [(AxisType.Auto, AxisType.Auto), ()], ids=["automatic", "explicit"])
def test_an_own_step_and_fit_train_on_a_mesh_of_data_and_model_axes_laid_out_by_hand(
    net, alone, trained, fitted, kinds
):
    mesh = made(*kinds)
    columns = {w.shape for w in jax.tree.leaves(alone[0].shared)}
    state = laid_out(alone[0], mesh, lambda leaf: P(None, "model") if leaf.shape in columns else P())
    after = own_steps(net, state, mesh)
    alike(after.shared, trained.shared)
    assert specs(after) == specs(state)
    after = fit(net, state)
    alike(after.shared, fitted.shared)
    assert specs(after) == specs(state)
    frozen = pae.freeze(pae.prune(after, "a", 0.5), "a")
    wide = pae.expand(net, frozen, width=1.5, key=KEY(2))
    assert specs(wide.shared) == specs(state.shared)
    assert wide.shared["Dense_0"]["kernel"].sharding.mesh == mesh


def test_fit_with_devices_trains_a_network_that_is_spread_otherwise(net, alone, fitted):
    state = placement.place(net, alone[0], (made(), COLUMNS))
    after = fit(net, state, devices=pae.Devices(made(), split_weights=True))
    alike(after.shared, fitted.shared)
    assert specs(after) == specs(state)


@pytest.mark.parametrize("logical", [False, True])
def test_annotations_of_a_flax_module_say_where_its_kernels_lie(logical):
    mesh, rules = made(AxisType.Auto, AxisType.Auto), (("embed", None), ("mlp", "model"))
    net = pae.linen(lambda width: Annotated(width, logical), X[:1])
    shapes = jax.eval_shape(lambda: Annotated(1.0, logical).init(KEY(0), X[:1], train=False))
    found = nn.get_partition_spec(shapes)
    found = logical_to_mesh(found, rules) if logical else found
    state = pae.pack(net, pae.init(net, KEY(0), sharding=(mesh, found)), "a", head=2, key=KEY(1))
    assert specs(state.shared) == {"Dense_0/kernel": P(None, "model")}
    one = pae.pack(net, pae.init(net, KEY(0)), "a", head=2, key=KEY(1))
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        alike(own_steps(net, state, mesh).shared, own_steps(net, one, None).shared)


# What is refused


@pytest.mark.parametrize(
    ("sharding", "message"),
    [
        (lambda: (line(), {"params/Dense_9/kernel": P()}), "which the network does not have"),
        (lambda: (line(), {"params/Dense_0/kernel": "d"}), "must be a jax.sharding.PartitionSpec, found 'd'"),
        (lambda: (line(), {"params/Dense_0/kernel": P("model")}), "does not fit the mesh"),
        (lambda: (line(), {"params/Dense_0/kernel": P(None, None, "d")}), "does not divide"),
        (line, r"sharding must be a function .* or \(mesh, specs\), found Mesh"),
        (lambda: lambda path, leaf: P("d"), "must return a jax.sharding.Sharding on devices, found P"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(net, sharding, message):
    with pytest.raises(pae.ArgumentError, match=message):
        pae.init(net, KEY(0), sharding=sharding())


def test_a_width_that_the_devices_do_not_divide_is_refused_by_name(net, empty):
    state = placement.place(net, empty, (line(), ROWS))
    with pytest.raises(pae.ArgumentError, match=r"width 1.25 makes 'Dense_1/kernel' float32\[20,20\], which P\('d'"):
        pae.expand(net, state, width=1.25, key=KEY(2))
    with pytest.raises(pae.ArgumentError, match=r"'Dense_1/kernel' is float32\[20,20\], which P\('d'"):
        pae.init(net, KEY(0), width=1.25, sharding=(line(), ROWS))
