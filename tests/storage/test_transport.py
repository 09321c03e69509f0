"""A network and a task in training come through Orbax, JAX, pickle and copies as the pytrees they are."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import pae_jax as pae
from pae_jax.lifelong.recipes import Adam, Sgd


def raw(tree):
    """Return a tree whose typed keys are plain numbers."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)


@pytest.fixture
def assert_equal(assert_same):
    """Assert that two pytrees are of one structure, static fields included, and hold the same bits."""

    def check(found, expected):
        assert type(found) is type(expected)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))
        assert_same(raw(found), raw(expected))
        assert [leaf.dtype for leaf in jax.tree.leaves(found)] == [leaf.dtype for leaf in jax.tree.leaves(expected)]

    return check


def through_orbax(tree, folder, template):
    with ocp.CheckpointManager(folder) as manager:
        manager.save(3, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
    with ocp.CheckpointManager(folder) as manager:
        return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(template(tree)))


TEMPLATES = {
    "of its shapes": lambda tree: jax.tree.map(ocp.utils.to_shape_dtype_struct, tree),
    "itself": lambda tree: tree,
}
COPIES = {
    "device_put": jax.device_put,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda tree: pickle.loads(pickle.dumps(tree)),
}


@pytest.fixture(scope="module")
def mlp():
    """A network of a class that pickle finds."""
    return pae.linen(pae.models.MLP, jnp.zeros((1, 4)))


@pytest.fixture(scope="module")
def states(mlp):
    """Networks without tasks, with a task in training, with picks in training and frozen, grown."""
    empty = pae.init(mlp, jax.random.key(0))
    packed = pae.pack(mlp, empty, "a", head=2, key=jax.random.key(1))
    grown = pae.expand(mlp, pae.freeze(pae.prune(packed, "a", 0.5), "a"), width=1.5, key=jax.random.key(2))
    picking = pae.pack(mlp, grown, "b", head=None, key=jax.random.key(3), sharing="picked")
    return {
        "empty": empty,
        "packed": packed,
        "picking": picking,
        "frozen": pae.freeze(pae.prune(picking, "b", 0.5), "b"),
    }


KINDS = ("empty", "packed", "picking", "frozen")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_comes_through_the_users_own_checkpoint_manager(
    mlp, states, data, assert_equal, tmp_path, kind, template
):
    state = states[kind]
    found = through_orbax(state, tmp_path, TEMPLATES[template])
    assert_equal(found, state)
    pae.check(found, mlp)
    pae.verify(found)
    for task in state.tasks:
        np.testing.assert_array_equal(pae.predict(mlp, found, task, data[0]), pae.predict(mlp, state, task, data[0]))


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_is_copied_and_pickled_as_it_is(mlp, states, data, assert_equal, kind, way):
    state = states[kind]
    found = COPIES[way](state)
    assert_equal(found, state)
    pae.check(found, mlp)
    pae.verify(found)
    for task in state.tasks:
        np.testing.assert_array_equal(pae.predict(mlp, found, task, data[0]), pae.predict(mlp, state, task, data[0]))


OPTIMIZERS = {
    "sgd of the recipes": Sgd(learning_rate=0.01),
    "adam of the recipes": Adam(learning_rate=0.01, epsilon=0.1, epsilon_hat=True),
    "adam": optax.adam(1e-2),
    "lookahead": optax.lookahead(optax.sgd(0.1), 5, 0.5),
    "MultiSteps": optax.MultiSteps(optax.adam(1e-2), 2),
}


@pytest.fixture
def make_ts(mlp, states, data):
    """Return a train state after a step, and the step."""

    @jax.jit
    def step(ts, x, y):
        def loss(params):
            out, updates = ts.apply_fn(params, x, train=True)
            return jnp.square(out.sum(axis=1) - y).mean(), updates

        (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(ts.params)
        return ts.apply_gradients(grads=grads, updates=updates), value

    def make(optimizer, kind="picking", key=True):
        state = states[kind]
        task = max(state.tasks, key=lambda name: state.tasks[name].id)
        key = jax.random.key(4) if key else None
        ts = pae.TrainState.create(mlp, state, task, tx=OPTIMIZERS[optimizer], key=key)
        take = lambda ts: step(ts, data[0], data[1].astype(np.float32))  # noqa: E731
        return take(ts)[0], take

    return make


def assert_goes_on(one, other, step, assert_equal):
    """Two more steps are the same bits."""
    for _ in range(2):
        (one, value), (other, expected) = step(one), step(other)
        assert value == expected
    assert_equal(one, other)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_task_in_training_comes_through_the_users_own_checkpoint_manager_and_goes_on(
    make_ts, assert_equal, tmp_path, optimizer, template
):
    ts, step = make_ts(optimizer)
    found = through_orbax(ts, tmp_path, TEMPLATES[template])
    assert_equal(found, ts)
    assert_goes_on(found, ts, step, assert_equal)


def test_a_train_state_without_a_key_and_one_of_a_first_task_come_through(make_ts, assert_equal, tmp_path):
    for number, options in enumerate(({"key": False}, {"kind": "packed"})):
        ts, step = make_ts("adam", **options)
        found = through_orbax(ts, tmp_path / str(number), TEMPLATES["of its shapes"])
        assert_equal(found, ts)
        assert_goes_on(found, ts, step, assert_equal)


def test_a_restored_task_is_committed_as_the_one_that_was_saved(mlp, states, make_ts, assert_equal, tmp_path):
    ts, _ = make_ts("adam")
    found = through_orbax(ts.prune(0.5), tmp_path, TEMPLATES["of its shapes"])
    one, other = (each.commit(mlp, states["picking"]) for each in (found, ts.prune(0.5)))
    assert_equal(one, other)
    pae.verify(one)


def test_both_come_through_in_one_tree(states, make_ts, assert_equal, tmp_path):
    ts, _ = make_ts("adam")
    tree = {"state": states["picking"], "ts": ts, "epoch": jnp.asarray(3)}
    found = through_orbax(tree, tmp_path, TEMPLATES["of its shapes"])
    assert_equal(found, tree)


@pytest.mark.parametrize("way", ["device_put", "copy", "deepcopy"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_task_in_training_is_copied_as_it_is_and_goes_on(make_ts, assert_equal, optimizer, way):
    ts, step = make_ts(optimizer)
    found = COPIES[way](ts)
    assert_equal(found, ts)
    assert_goes_on(found, ts, step, assert_equal)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_pickle_keeps_every_array_and_names_what_it_leaves_out_which_is_put_back_by_hand(
    mlp, make_ts, assert_equal, assert_same, optimizer
):
    """A net holds the functions that build the model, and an optimizer of optax is nothing but functions."""
    ts, step = make_ts(optimizer)
    found = COPIES["pickle"](ts)
    assert_same(raw(jax.tree.leaves(found)), raw(jax.tree.leaves(ts)))
    with pytest.raises(pae.ArgumentError, match=r"without its net, .* put it back by ts.replace\(net=...\)"):
        step(found)
    found = found.replace(net=mlp)
    if "recipes" not in optimizer:
        with pytest.raises(pae.ArgumentError, match=r"without its tx, .* put it back by ts.replace\(tx=...\)"):
            step(found)
        found = found.replace(tx=ts.tx)
    assert_equal(found, ts)
    assert_goes_on(found, ts, step, assert_equal)


def test_a_deep_copy_has_arrays_of_its_own(states, make_ts):
    ts, _ = make_ts("adam")
    for tree in (states["picking"], ts):
        found = copy.deepcopy(tree)
        pointers = [{leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(raw(each))} for each in (found, tree)]
        assert not pointers[0] & pointers[1]
