"""Net: widths, layouts, and what is computed once."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import pae_jax as pae
from pae_jax.trees import flatten, merge


@pytest.mark.parametrize("ratio", [0.25, 1, 1.5, 2.25, 4, 100])
def test_a_width_is_the_square_root_of_the_size_ratio(ratio):
    assert pae.width_for(ratio) == math.sqrt(ratio)


def test_the_width_of_a_ratio_gives_about_that_many_times_the_weights(vector_module):
    net = pae.linen(lambda width: pae.models.MLP(width, (64, 64)), jnp.zeros((1, 64)))
    hidden = lambda width: flatten(net.layout(width).shared)["Dense_1/kernel"].size  # noqa: E731
    for ratio in (0.5, 2, 3):
        assert hidden(pae.width_for(ratio)) / hidden(1.0) == pytest.approx(ratio, rel=0.03)


@pytest.mark.parametrize("ratio", [0, -1, math.nan, math.inf])
def test_a_size_ratio_that_is_not_positive_and_finite_is_refused(ratio):
    with pytest.raises(pae.ArgumentError, match="size_ratio must be positive and finite, found"):
        pae.width_for(ratio)


@pytest.mark.parametrize("value", ["2", None, [1.0], True, np.bool_(True)], ids=repr)
def test_a_width_or_ratio_that_is_no_number_is_refused_with_a_typed_error(net, value):
    with pytest.raises(pae.ArgumentError, match="size_ratio"):
        pae.width_for(value)
    with pytest.raises(pae.ArgumentError, match="width"):
        pae.init(net, jax.random.key(0), width=value)


def test_a_layout_is_abstract_and_made_once(vector_module, compilations):
    built = []

    def build(width):
        built.append(width)
        return vector_module(width)

    net = pae.linen(build, jnp.zeros((1, 4)))
    with compilations() as found:
        one, two = net.layout(1.0), net.layout(1.0)
    assert found.count == 0
    assert one is two
    assert built == [1.0]
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((one.shared, one.local)))
    assert one.features.shape == (1, 6)


def test_shared_and_local_together_are_the_variables_of_the_model(net, vector_module, assert_same):
    variables = vector_module().init(jax.random.key(0), jnp.zeros((1, 4)), train=False)
    shared, local = net.split(variables)
    assert_same(merge(shared, local), dict(variables))
    assert not set(flatten({"params": shared})) & set(flatten(local))


def test_two_networks_do_not_share_compiled_functions(vector_module, data):
    """What a build makes may depend on anything that stays as it is, so each net is asked itself."""
    built, factors, states = [], [], []

    def build(width):
        built.append(width)
        return vector_module(factors[-1] * width)

    one, two = (pae.linen(build, jnp.zeros((1, 4))) for _ in range(2))
    assert one != two
    for factor, net in ((1, one), (2, two)):
        factors.append(factor)
        states.append(pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1)))
    assert built == [1.0] * 4  # one for the net, one for the trial
    assert [pae.features(net, state, "a", data[0]).shape for net, state in zip((one, two), states, strict=True)] == [
        (40, 6),
        (40, 12),
    ]
    assert built == [1.0] * 4


def test_a_build_that_makes_another_model_the_next_time_is_refused(vector_module):
    factors = itertools.count(1)
    net = pae.linen(lambda width: vector_module(next(factors) * width), jnp.zeros((1, 4)))
    with pytest.raises(pae.StructureError, match="another model when built again, expected the same one each time"):
        pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))


def test_a_net_may_be_used_with_states_of_many_widths(net, data):
    for width in (0.5, 1.0):
        state = pae.pack(net, pae.init(net, jax.random.key(0), width), "a", head=2, key=jax.random.key(1))
        assert pae.features(net, state, "a", data[0]).shape == (40, int(6 * width))
        assert np.isfinite(pae.predict(net, state, "a", data[0])).all()


def test_the_free_axes_of_inputs_are_checked_by_name():
    sample = {"ids": np.zeros((1, 5), np.int32), "mask": np.zeros((1, 5, 2), np.float32)}
    build = lambda width: pae.models.MLP(width)  # noqa: E731
    assert pae.linen(build, sample, free_axes=(1,)).free_axes == {"ids": (1,), "mask": (1,)}
    assert pae.linen(build, sample, free_axes={"mask": (1, 2)}).free_axes == {"mask": (1, 2)}
    assert pae.linen(build, sample).free_axes == {}
    for axes, message in (
        ({"words": (1,)}, "free_axes names input 'words'; the sample has: 'ids', 'mask'"),
        ((2,), r"axes 1..1, the batch axis is 0; found \(2,\) for an input of 2 axes"),
        ((0,), r"the batch axis is 0; found \(0,\)"),
        ({"mask": 1}, "the batch axis is 0; found 1 for an input of 3 axes"),
    ):
        with pytest.raises(pae.ArgumentError, match=message):
            pae.linen(build, sample, free_axes=axes)


def test_the_text_of_a_net_is_one_line(net):
    assert repr(net) == "Net(Vector, linen, sample float32[1,4])"


def test_two_heads_of_one_nnx_class_may_differ_in_the_shape_of_a_parameter_alone(net, empty, data):
    class Head(nnx.Module):
        def __init__(self, classes):
            self.kernel = nnx.Param(jnp.zeros((6, classes)))

        def __call__(self, features):
            return features @ self.kernel[...]

    state = pae.pack(net, empty, "a", head=Head(2), key=jax.random.key(1))
    state = pae.freeze(pae.prune(state, "a", 0.5), "a")
    state = pae.pack(net, state, "b", head=Head(3), key=jax.random.key(1))
    assert [pae.predict(net, state, name, data[0]).shape for name in "ab"] == [(40, 2), (40, 3)]


FEATURES = {
    "complex64": lambda h: jnp.fft.rfft(h),
    "int32": lambda h: h.argmax(-1, keepdims=True),
    "float32[1]": lambda h: h.sum(-1),
    "tuple of 2": lambda h: (h, h),
}


@pytest.mark.parametrize("found", FEATURES)
def test_a_number_of_classes_needs_real_floating_features(found):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return FEATURES[found](nn.Dense(6)(x))

    net = pae.linen(lambda width: Model(), jnp.zeros((1, 4)))
    state = pae.init(net, jax.random.key(0))
    with pytest.raises(
        pae.StructureError, match=rf"head: found 2 classes on features .*{re.escape(found)}.*real float"
    ):
        pae.pack(net, state, "a", head=2, key=jax.random.key(1))
