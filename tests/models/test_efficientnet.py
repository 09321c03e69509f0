"""EfficientNet-Lite with folded batch norms, and growing inside its blocks alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pae_jax as pae
from pae_jax.models import EfficientNetLite, fold_norms
from pae_jax.trees import flatten

MODULE = EfficientNetLite(width=0.25, stages=((8, 1, 3, 1, 1), (16, 6, 3, 2, 1)))
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 9, 3)), jnp.float32)


@pytest.fixture(scope="module")
def variables():
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        values = 0.5 * rng.normal(size=leaf.shape)
        return jnp.asarray(abs(values) + 0.2 if path[-1].key in ("scale", "var") else values, jnp.float32)

    shapes = jax.eval_shape(lambda x: MODULE.init(jax.random.key(0), x, train=False), IMAGES)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def test_a_folded_network_computes_the_same_features(variables):
    folded, params = MODULE.clone(folded=True), fold_norms(MODULE, variables)
    shapes = jax.eval_shape(lambda x: folded.init(jax.random.key(0), x, train=True), IMAGES)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    expected = jax.jit(lambda v, x: MODULE.apply(v, x, train=False))(variables, IMAGES)
    found = jax.jit(lambda v, x: folded.apply(v, x, train=True))(params, IMAGES)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_variables_without_running_statistics_are_not_folded(variables):
    with pytest.raises(pae.StructureError, match=r"batch_stats/.*/var"):
        fold_norms(MODULE, fold_norms(MODULE, variables))


def test_a_network_that_grows_inside_keeps_all_other_sizes():
    def shapes(inner):
        module = MODULE.clone(inner=inner)
        return flatten(jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False)["params"], IMAGES))

    narrow, wide = shapes(1.0), shapes(1.5)
    changed = {path for path in narrow if narrow[path].shape != wide[path].shape}
    inside = ("Conv_expand", "BatchNorm_expand", "Conv_depthwise", "BatchNorm_depthwise", "Conv_project/kernel")
    assert changed == {path for path in narrow if path.startswith("Block_2") and any(name in path for name in inside)}
    assert wide["Block_2_1/Conv_expand/kernel"].shape == (1, 1, 2, 18)
