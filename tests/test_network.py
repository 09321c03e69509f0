"""Net: widths, layouts, and what is computed once."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pae_jax as pae
from pae_jax.trees import flatten


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


@pytest.mark.parametrize("value", ["2", None, [1.0]], ids=str)
def test_a_width_or_ratio_that_is_no_number_is_refused_with_a_typed_error(net, value):
    with pytest.raises(pae.ArgumentError, match="size_ratio"):
        pae.width_for(value)
    with pytest.raises(pae.ArgumentError, match="width"):
        pae.init(net, jax.random.key(0), width=value if value != "2" else "wide")


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
    from pae_jax.trees import merge

    assert_same(merge(shared, local), dict(variables))
    assert not set(flatten({"params": shared})) & set(flatten(local))


def test_two_networks_do_not_share_compiled_functions(vector_module, data):
    one, two = (pae.linen(vector_module, jnp.zeros((1, 4))) for _ in range(2))
    one.layout(1.0)
    assert one._memo
    assert not two._memo
    assert one != two


def test_a_net_may_be_used_with_states_of_many_widths(net, data):
    for width in (0.5, 1.0):
        state = pae.pack(net, pae.init(net, jax.random.key(0), width), "a", head=2, key=jax.random.key(1))
        assert pae.features(net, state, "a", data[0]).shape == (40, int(6 * width))
        assert np.isfinite(pae.predict(net, state, "a", data[0])).all()
