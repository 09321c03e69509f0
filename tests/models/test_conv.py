"""`Conv` is `flax.linen.Conv`: the same parameters, values and gradients; only some primitives differ."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pae_jax.models import conv
from pae_jax.models.conv import Conv

# (map, kernel, stride, padding, whether it is computed as a matrix product)
CASES = [
    ((1, 1), (3, 3), 1, "SAME", True),
    ((2, 2), (3, 3), 1, "SAME", True),
    ((3, 3), (3, 3), 1, "SAME", True),
    ((4, 4), (3, 3), 1, "SAME", False),
    ((2, 4), (3, 3), 1, "SAME", True),
    ((4, 4), (5, 5), 1, "SAME", True),
    ((5, 3), (1, 1), 1, "SAME", True),
    ((5, 6), (1, 1), 2, "VALID", True),
    ((5, 5), (3, 3), 2, "VALID", True),  # the gradient slides over the output, 2x2
    ((7, 7), (3, 3), 2, "VALID", True),
    ((9, 9), (3, 3), 2, "VALID", False),
    ((3, 3), (1, 7), 1, "SAME", False),
    ((2, 3), (7, 1), 1, "SAME", True),
    ((3, 2), (3, 3), 2, ((2, 0), (1, 3)), True),
    ((4, 3), (3, 3), 1, ((-1, 0), (1, 0)), True),
]


def _pair(**options):
    return Conv(**options), nn.Conv(**options)


def _abstract(module, shape):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), x), x


def _concrete(module, shape):
    """Variables and images from NumPy: compiling JAX's generator takes longer than all else here."""
    normal = np.random.default_rng(0).standard_normal
    return jax.tree.map(lambda leaf: normal(leaf.shape, np.float32), _abstract(module, shape))


def _assert_close(modules, shape):
    """Assert that modules have the same values and gradients."""

    @jax.jit
    def run(variables, x):
        results = []
        for module in modules:
            values, pull = jax.vjp(module.apply, variables, x)
            results.append((values, pull(jnp.cos(jnp.arange(values.size, dtype=x.dtype)).reshape(values.shape))))
        return results

    found, expected = run(*_concrete(modules[0], shape))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), found, expected)


def _jaxpr(module, shape):
    return jax.make_jaxpr(module.apply)(*_abstract(module, shape))


@pytest.mark.parametrize(("size", "kernel", "stride", "padding", "product"), CASES)
def test_values_and_gradients_are_those_of_nn_conv(size, kernel, stride, padding, product):
    ours, flax = _pair(features=6, kernel_size=kernel, strides=stride, padding=padding)
    _assert_close((ours, flax), (2, *size, 5))
    assert ("conv_general_dilated" not in str(_jaxpr(ours, (2, *size, 5)))) == product


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        ((6, 7), 3, 1, "SAME"),
        ((6, 7), 5, 2, "SAME"),
        ((7, 6), 3, 2, "VALID"),
        ((5, 5), 5, 2, 2),
        ((2, 2), 3, 1, "SAME"),
    ],
)
def test_a_depthwise_convolution_is_a_sum_over_its_taps(size, kernel, stride, padding):
    options = {"features": 3, "kernel_size": (kernel, kernel), "strides": stride, "padding": padding}
    ours, flax = _pair(**options, feature_group_count=3)
    _assert_close((ours, flax), (2, *size, 3))
    assert "conv_general_dilated" not in str(_jaxpr(ours, (2, *size, 3)))


def test_a_depthwise_convolution_has_all_derivatives_of_the_convolution():
    options = {"features": 3, "kernel_size": (3, 3), "strides": 2, "feature_group_count": 3}
    ours, flax = _pair(**options)
    variables, x = _concrete(flax, (2, 5, 5, 3))
    change = jax.tree.map(jnp.cos, variables)

    def derivatives(module):
        def loss(variables, x):
            return jnp.sum(jnp.tanh(module.apply(variables, x)))

        forward = jax.jvp(loss, (variables, x), (change, x))[1]
        by_example = jax.vmap(jax.grad(loss), (None, 0))(variables, x[:, None])
        curvature = jax.jvp(lambda v: jax.grad(loss, (0, 1))(v, x), (variables,), (change,))[1]
        return forward, by_example, curvature

    found, expected = (jax.jit(derivatives, static_argnums=0)(module) for module in (ours, flax))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), found, expected)


def test_both_gradients_of_a_depthwise_kernel_are_equal():
    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 11, 9, 4), (5, 5, 1, 4)))

    def gradient(sum_of_taps):
        return jax.jit(jax.grad(lambda kernel: jnp.sum(jnp.sin(sum_of_taps(x, kernel, (2, 1), (4, 5))))))(kernel)

    np.testing.assert_allclose(gradient(conv._tap_sum), gradient(conv._tap_sum_by_example), atol=1e-5, rtol=1e-5)


def test_parameters_are_those_of_nn_conv_bit_for_bit(assert_same):
    class Two(nn.Module):
        conv: type

        @nn.compact
        def __call__(self, x):
            return self.conv(3, (1, 1), use_bias=False)(self.conv(4, (3, 3), name="first")(x))

    x = jnp.ones((1, 2, 2, 3))
    ours, flax = jax.jit(lambda key: [Two(conv).init(key, x) for conv in (Conv, nn.Conv)])(jax.random.key(0))
    assert jax.tree.map(jnp.shape, ours)["params"]["first"] == {"kernel": (3, 3, 3, 4), "bias": (4,)}
    assert_same(ours, flax)


@pytest.mark.parametrize(
    "options",
    [
        {"feature_group_count": 2},
        {"kernel_dilation": 2},
        {"input_dilation": (1, 2), "padding": 1},
    ],
    ids=str,
)
def test_what_is_not_plain_is_left_to_lax(options):
    ours, flax = _pair(features=4, kernel_size=(3, 3), **options)
    _assert_close((ours, flax), (1, 2, 2, 4))
    assert str(_jaxpr(ours, (1, 2, 2, 4))) == str(_jaxpr(flax, (1, 2, 2, 4)))


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 3), (2, 2, 2, 2, 3)], ids=str)
def test_other_ranks_are_left_to_lax(shape):
    ours, flax = _pair(features=2, kernel_size=(3,) * max(len(shape) - 2, 1))
    assert str(_jaxpr(ours, shape)) == str(_jaxpr(flax, shape))


def test_images_without_a_batch_axis_are_convolved():
    assert _jaxpr(Conv(2, (3, 3)), (2, 2, 3)).out_avals[0].shape == (2, 2, 2)


def test_the_structure_depends_on_the_map_alone():
    def primitives(channels, features):
        jaxpr = _jaxpr(Conv(features, (3, 3)), (1, 2, 2, channels))
        return [str(equation.primitive) for equation in jaxpr.eqns]

    def depthwise(channels):
        jaxpr = _jaxpr(Conv(channels, (3, 3), feature_group_count=channels), (1, 4, 4, channels))
        return re.findall(r" = (\w+)", str(jaxpr))

    assert primitives(1, 1) == primitives(512, 700)
    assert depthwise(2) == depthwise(40)
    assert depthwise(2).count("slice") == 9 + 9  # of the image and of the kernel


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_dtype_is_that_of_nn_conv(dtype):
    ours, flax = _pair(features=4, kernel_size=(3, 3), dtype=dtype)
    run = jax.jit(lambda variables, x: (ours.apply(variables, x), flax.apply(variables, x)))
    found, expected = run(*_concrete(ours, (1, 2, 2, 4)))
    assert found.dtype == expected.dtype == dtype
    tolerance = 16 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), atol=tolerance, rtol=tolerance)
