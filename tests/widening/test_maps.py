"""The maps themselves: moving arrays, composing, writing and reading."""

import json
import pickle
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pae_jax.errors import CheckpointError, StructureError
from pae_jax.widening import ArrayMap, AxisMap, WidenMaps, widen_maps


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Conv(self.width, (3, 3))(x))
        x = jnp.concatenate([y, x, nn.relu(nn.Conv(self.width, (3, 3))(y))], -1)
        return {"features": nn.Dense(self.width)(x.reshape(x.shape[0], -1)), "maps": (x, None)}


IMAGE = jnp.ones((1, 4, 4, 2))


def shapes(width):
    return jax.eval_shape(Net(width).init, jax.random.key(0), IMAGE)


@pytest.fixture(scope="module")
def maps():
    return widen_maps(Net(3).apply, shapes(3), Net(5).apply, shapes(5), IMAGE)


def bits(tree, seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.integers(-50, 50, leaf.shape) / 4).astype(dtype), tree)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, bool])
@pytest.mark.parametrize("jit", [False, True])
def test_take_undoes_put_bit_for_bit(maps, dtype, jit, assert_same_bits):
    put, take = (jax.jit(maps.put), jax.jit(maps.take)) if jit else (maps.put, maps.take)
    narrow, base = bits(shapes(3), 0, dtype), bits(shapes(5), 1, dtype)
    assert_same_bits(take(put(narrow)), narrow)
    filled = put(narrow, base)
    assert_same_bits(take(filled), narrow)
    # Whatever is not an old place comes from `into`, or is 0.
    places = put(jax.tree.map(lambda x: jnp.ones(x.shape, bool), narrow))
    for where, got, old, new in zip(*map(jax.tree.leaves, (places, filled, put(narrow), base)), strict=True):
        assert np.array_equal(np.where(where, old, new), got)
        assert not np.any(np.where(where, False, old))


def test_jit_and_host_move_alike(maps, assert_same_bits):
    narrow, base = bits(shapes(3), 0), bits(shapes(5), 1)
    assert_same_bits(jax.jit(maps.put)(narrow, base), maps.put(narrow, base))
    assert_same_bits(jax.jit(maps.take)(base), maps.take(base))
    numpy = jax.tree.map(np.asarray, base)
    taken = maps.take(numpy)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(taken))
    assert_same_bits(taken, maps.take(base))


def test_special_values_keep_their_bits(maps):
    odd = np.array([np.nan, -np.nan, -0.0, np.inf, 1e-45], np.float32)
    narrow = jax.tree.map(lambda leaf: jnp.asarray(np.resize(odd, leaf.shape)), shapes(3))
    for put, take in ((maps.put, maps.take), (jax.jit(maps.put), jax.jit(maps.take))):
        for a, b in zip(jax.tree.leaves(take(put(narrow))), jax.tree.leaves(narrow), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_trees_with_some_of_the_leaves(maps):
    kernel = jnp.ones((3, 3, 2, 3), jnp.int8)
    wide = maps.put({"params": {"Conv_0": {"kernel": kernel}}})
    assert wide["params"]["Conv_0"]["kernel"].shape == (3, 3, 2, 5)
    assert wide["params"]["Conv_0"]["kernel"].dtype == jnp.int8
    assert maps.take({}) == {}


def test_wrong_leaves_are_named(maps):
    with pytest.raises(StructureError, match="narrow tree, leaf 'params/Dense_7/kernel': found an unknown leaf"):
        maps.put({"params": {"Dense_7": {"kernel": jnp.ones(3)}}})
    with pytest.raises(
        StructureError, match=re.escape("leaf 'params/Conv_0/bias': found shape (4,), expected shape (5,)")
    ):
        maps.take({"params": {"Conv_0": {"bias": jnp.ones(4)}}})
    narrow, base = bits(shapes(3), 0), bits(shapes(5), 1)
    with pytest.raises(StructureError, match="into"):
        maps.put(narrow, base["params"])
    with pytest.raises(StructureError, match="found bfloat16, expected float32"):
        maps.put(narrow, jax.tree.map(lambda x: x.astype(jnp.bfloat16), base))
    with pytest.raises(StructureError, match=re.escape("found shape (3,)")):
        maps.put(narrow, narrow)


def test_maps_compose(maps, assert_same_bits):
    further = widen_maps(Net(5).apply, shapes(5), Net(6).apply, shapes(6), IMAGE)
    whole = maps.then(further)
    narrow = bits(shapes(3), 0)
    assert_same_bits(whole.put(narrow), further.put(maps.put(narrow)))
    assert_same_bits(whole.take(whole.put(narrow)), narrow)
    spot = whole.outputs["maps"][0]
    assert (
        spot.axes[-1].index.tolist()
        == further.outputs["maps"][0].axes[-1].index[maps.outputs["maps"][0].axes[-1].index].tolist()
    )
    with pytest.raises(StructureError, match="maps to follow, leaf 'params/Conv_0/bias'"):
        further.then(maps)


def test_outputs_tell_where_old_features_sit(maps):
    assert set(maps.outputs) == {"features", "maps"} and maps.outputs["maps"][1] is None
    assert maps.outputs["features"].axes[-1].index.tolist() == [0, 1, 2]
    assert maps.outputs["maps"][0].axes[-1].index.tolist() == [0, 1, 2, 5, 6, 7, 8, 9]
    assert maps.outputs["maps"][0].narrow == (1, 4, 4, 8) and maps.outputs["maps"][0].wide == (1, 4, 4, 12)


def test_json_round_trip_is_exact(maps):
    text = json.dumps(maps.to_json())
    back = WidenMaps.from_json(json.loads(text))
    assert back == maps and hash(back) == hash(maps) and back.to_json() == maps.to_json()
    assert repr(back) == repr(maps) and str(back.report) == str(maps.report)
    assert jax.tree.structure(back.outputs) == jax.tree.structure(maps.outputs)
    with pytest.raises(CheckpointError, match="format 99"):
        WidenMaps.from_json({**maps.to_json(), "format": 99})


def test_json_keeps_reasons_and_the_table_is_small():
    class Refused(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            for _ in range(4):
                x = nn.LayerNorm()(nn.Dense(self.width)(x))
            return x

    x = jnp.ones((1, 3))
    trees = [jax.eval_shape(Refused(w).init, jax.random.key(0), x) for w in (4, 6)]
    maps = widen_maps(Refused(4).apply, trees[0], Refused(6).apply, trees[1], x)
    assert WidenMaps.from_json(json.loads(json.dumps(maps.to_json()))) == maps
    assert maps.to_json()["maps"] == [[6, [0, 4]]]
    assert len(maps.reasons) == 4 and "LayerNorm_3" in str(maps.report)


def test_maps_are_values(maps):
    again = widen_maps(Net(3).apply, shapes(3), Net(5).apply, shapes(5), IMAGE)
    assert again == maps and len({again, maps}) == 1
    copied = pickle.loads(pickle.dumps(maps))
    assert copied == maps and "_hash" not in vars(copied) and hash(copied) == hash(maps)
    assert repr(maps) == "WidenMaps(6 leaves, 6 grow; 2 distinct maps; preserved)"
    with pytest.raises(AttributeError):
        maps.leaves = ()
    assert maps["params/Conv_0/bias"] == ArrayMap((AxisMap(5, ((0, 3),)),))
    with pytest.raises(StructureError, match="no such leaf"):
        maps["params/Conv_9/bias"]


def test_concrete_and_abstract_arguments_give_the_same_maps(maps):
    concrete = [jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes(w)) for w in (3, 5)]
    image = jax.ShapeDtypeStruct(IMAGE.shape, IMAGE.dtype)
    assert widen_maps(Net(3).apply, concrete[0], Net(5).apply, concrete[1], image) == maps


def test_overrides_are_followed_everywhere(random_variables, relative_error):
    order = [4, 0, 2]
    maps = widen_maps(
        Net(3).apply, shapes(3), Net(5).apply, shapes(5), IMAGE, overrides={"params/Conv_0/bias": {0: order}}
    )
    assert maps.preserved
    assert maps["params/Conv_0/kernel"].axes[-1].index.tolist() == order
    assert maps["params/Conv_1/kernel"].axes[2].index.tolist() == order
    variables = random_variables(shapes(3))
    x = jnp.asarray(np.random.default_rng(0).normal(size=IMAGE.shape), jnp.float32)
    error = relative_error(maps, Net(3).apply(variables, x), Net(5).apply(maps.put(variables), x))
    assert error < 1e-5


def test_contradicting_overrides_are_refused():
    overrides = {"params/Conv_0/bias": {-1: [4, 0, 2]}, "params/Conv_0/kernel": {3: [0, 1, 2]}}
    maps = widen_maps(Net(3).apply, shapes(3), Net(5).apply, shapes(5), IMAGE, overrides=overrides)
    assert "two index maps differ" in maps.reasons[0].problem


def test_runs():
    axis = AxisMap.of([0, 1, 5, 6, 3], 8)
    assert axis.runs == ((0, 2), (5, 2), (3, 1)) and axis.narrow == 5
    assert axis.index.tolist() == [0, 1, 5, 6, 3]
    assert axis.then(AxisMap.of(range(1, 9), 9)).index.tolist() == [1, 2, 6, 7, 4]
    assert AxisMap.of([], 3).index.tolist() == [] and str(axis) == "5->8 in 3 runs"
    assert AxisMap.of(range(4), 4).is_identity and not AxisMap.of([], 1).is_identity


def test_axes_that_were_empty():
    array_map = ArrayMap((AxisMap.of([], 2), AxisMap.of([1, 2], 3)))
    empty = jnp.zeros((0, 2))
    for put, take in ((array_map.put, array_map.take), (jax.jit(array_map.put), jax.jit(array_map.take))):
        assert np.array_equal(put(empty), jnp.zeros((2, 3))) and take(jnp.ones((2, 3))).shape == (0, 2)
        assert np.array_equal(put(empty, jnp.ones((2, 3))), jnp.ones((2, 3)))


def test_many_runs_go_by_index():
    axis = AxisMap.of(range(0, 80, 2), 80)
    array_map = ArrayMap((axis, AxisMap.of(range(2), 2)))
    x = jnp.arange(160.0).reshape(80, 2)
    assert np.array_equal(jax.jit(array_map.take)(x), x[::2])
    assert np.array_equal(jax.jit(array_map.put)(x[::2], -x), jnp.where(jnp.arange(80)[:, None] % 2 == 0, x, -x))
