"""Every shipped backbone: published sizes, shapes, modes, dtypes and clear refusals."""

import functools
import math
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pae_jax import models
from pae_jax.errors import ArgumentError, StructureError
from pae_jax.models.inception_resnet_v1 import _BLOCK8, _Residual, _Unit
from pae_jax.models.scaling import scaled

FACE, CIFAR, GREY = (1, 160, 160, 3), (1, 32, 32, 3), (1, 112, 92, 1)
BACKBONES = {
    # small ones of each kind that still have every layer, and images to run them on
    "vgg": (lambda **o: models.VGG16(width=1 / 64, dense=(128, 64), **o), (2, 32, 33, 1)),
    "resnet, imagenet": (lambda **o: models.ResNet(stages=(1, 2), channels=(2, 4), **o), (2, 17, 16, 1)),
    "resnet, cifar": (lambda **o: models.ResNet(stages=(2, 1), channels=(2, 4), stem="cifar", **o), (2, 8, 9, 1)),
    "small": (lambda **o: models.SmallCNN(channels=(2, 3, 4), **o), (2, 28, 23, 1)),
}


def abstract(module, shape):
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda x: module.init(jax.random.key(0), x, **mode(module)), images)


def mode(module):
    """Arguments of evaluation; a network without norms has none."""
    return {} if isinstance(module, models.SphereNet20) else {"train": False}


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (models.MLP(), (1, 4, 3)),
        (models.VGG16(width=1 / 64, dense=(64,)), (1, 32, 32, 1)),
        (models.SphereNet20(width=1 / 64), (1, 112, 96, 3)),
    ],
    ids=["mlp", "vgg", "spherenet"],
)
def test_a_network_that_flattens_its_features_takes_a_batch_of_no_examples(module, shape):
    none = jax.ShapeDtypeStruct((0, *shape[1:]), jnp.float32)
    features = jax.eval_shape(lambda v, x: module.apply(v, x, **mode(module)), abstract(module, shape), none)
    assert features.shape[0] == 0 < features.shape[1]


def fill(variables):
    """Make abstract variables real, by NumPy: compiling JAX's generator takes longer than the networks."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        fan_in = math.prod(leaf.shape[:-1])
        values = rng.standard_normal(leaf.shape, np.float32) / np.float32(math.sqrt(fan_in))
        return values if leaf.ndim > 1 else 1 + 0.1 * np.abs(values)  # a variance is positive

    return jax.tree.map(draw, variables)


def leaves(tree, pattern=""):
    """Leaves of a tree whose path matches."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return [leaf for path, leaf in flat if re.search(pattern, jax.tree_util.keystr(path, simple=True, separator="/"))]


def total(found):
    return sum(math.prod(leaf.shape) for leaf in found)


def kernels(variables):
    return [leaf for leaf in leaves(variables["params"]) if leaf.ndim >= 2]


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request):
    """(build, variables, images) of one small backbone."""
    build, shape = BACKBONES[request.param]
    return build, fill(abstract(build(), shape)), np.random.default_rng(1).standard_normal(shape, np.float32)


# Section 4.1 of PAE's settings: a size ratio of 1.2 is a width of sqrt(1.2).
@pytest.mark.parametrize(
    ("ratio", "weights", "offsets", "biases"),
    [(1.0, 23_432_032, 14_800, 20_992), (1.2, 27_936_335, 16_139, 22_960)],
)
def test_inception_has_the_published_size(ratio, weights, offsets, biases):
    variables = abstract(models.InceptionResnetV1(width=math.sqrt(ratio)), FACE)
    assert len(kernels(variables)) == 133
    assert total(kernels(variables)) == weights
    assert total(leaves(variables["params"], "bn/bias$")) == offsets
    assert total(leaves(variables["params"], "Projection/bias$")) == biases
    assert total(leaves(variables["params"])) == weights + offsets + biases
    assert total(leaves(variables["batch_stats"])) == 2 * offsets


def test_inception_is_named_as_in_the_paper():
    params = abstract(models.InceptionResnetV1(), FACE)["params"]
    shape = {name: leaf.shape for name, leaf in _flat(params).items()}
    assert shape["Conv2d_1a/conv/kernel"] == (3, 3, 3, 32)
    assert shape["Block35_5/Branch_2/Conv2d_0c/conv/kernel"] == (3, 3, 32, 32)
    assert shape["Block17_10/Branch_1/Conv2d_0b/conv/kernel"] == (1, 7, 128, 128)
    assert shape["Block8_6/Projection/kernel"] == (1, 1, 384, 1792)
    assert shape["Mixed_7a/Branch_2/Conv2d_0c/conv/kernel"] == (3, 3, 256, 256)
    assert shape["Bottleneck/kernel"] == (1792, 512)


def _flat(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize(
    ("ratio", "weights", "channels", "units"),
    [(1.0, 33_584_832, 4224, 4096), (1.5, 50_350_644, 5169, 5016), (2.0, 67_152_663, 5972, 5792)],
)
def test_vgg_has_the_published_size(ratio, weights, channels, units):
    variables = abstract(models.VGG16(width=math.sqrt(ratio)), CIFAR)
    assert len(kernels(variables)) == 15
    assert total(kernels(variables)) == weights
    assert total(leaves(variables["params"], "BatchNorm.*scale$")) == channels
    assert variables["params"]["Dense_2"]["kernel"].shape == (units, units)


@pytest.mark.parametrize(("build", "count"), [(models.resnet18, 11_176_512), (models.resnet34, 21_284_672)])
def test_resnet_has_the_published_size(build, count):
    assert total(leaves(abstract(build(), (1, 224, 224, 3))["params"])) == count


@pytest.mark.parametrize(("width", "weights"), [(1.0, 11_650_752), (0.5, 2_913_120)])
def test_spherenet_has_twenty_convolutions_and_the_documented_size(width, weights):
    variables = abstract(models.SphereNet20(width=width), (1, 112, 112, 3))
    assert len(kernels(variables)) == 20
    assert total(kernels(variables)) == weights
    slopes = leaves(variables["params"], "slope")
    assert [leaf.ndim for leaf in slopes] == [1] * 20
    assert total(slopes) == total(leaves(variables["params"], "bias"))


def test_small_cnn_has_the_documented_size():
    assert total(kernels(abstract(models.SmallCNN(), GREY))) == 240_416


@pytest.mark.parametrize(
    ("build", "shape", "features"),
    [
        (models.InceptionResnetV1, FACE, {1.0: 512, 1.5**0.5: 512}),
        (models.VGG16, CIFAR, {0.5: 2048, 1.0: 4096, 1.5**0.5: 5016}),
        (models.resnet18, FACE, {0.5: 256, 1.0: 512, 1.5**0.5: 627}),
        (models.SmallCNN, GREY, {0.05: 6, 1.0: 128, 1.5**0.5: 156}),
        (models.SphereNet20, (1, 112, 112, 3), {0.5: 256 * 49, 1.0: 512 * 49}),
    ],
)
def test_width_changes_sizes_and_nothing_else(build, shape, features):
    images = jax.ShapeDtypeStruct(shape, jnp.float32)

    def facts(width):
        module = build(width=width)
        variables = abstract(module, shape)
        jaxpr = jax.make_jaxpr(lambda v, x: module.apply(v, x, **mode(module)))(variables, images)
        assert jaxpr.out_avals[0].shape == (1, features[width])
        return jax.tree.map(jnp.ndim, variables), [str(equation.primitive) for equation in jaxpr.eqns]

    first, *others = map(facts, features)
    assert all(other == first for other in others)


def test_evaluation_is_a_function_and_training_moves_the_statistics(backbone, assert_same):
    build, variables, images = backbone
    module = build()
    evaluate = jax.jit(lambda v, x: module.apply(v, x, train=False))
    train = jax.jit(
        lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(2)})
    )
    features = evaluate(variables, images)
    trained, moved = train(variables, images)

    assert features.shape == trained.shape and features.dtype == trained.dtype == jnp.float32
    assert bool(jnp.isfinite(features).all() and jnp.isfinite(trained).all())
    np.testing.assert_allclose(evaluate(variables, images[:1]), features[:1], atol=1e-4)  # no mixing of examples
    assert jax.tree.structure(moved["batch_stats"]) == jax.tree.structure(variables["batch_stats"])
    assert all(
        bool((new != old).any())
        for new, old in zip(jax.tree.leaves(moved), jax.tree.leaves(variables["batch_stats"]), strict=True)
    )


def test_half_precision_keeps_the_parameters_in_full(backbone):
    build, _, images = backbone
    module = build(dtype=jnp.bfloat16)
    features, variables = jax.eval_shape(
        lambda x: module.init_with_output(jax.random.key(0), x, train=False), images.astype(jnp.bfloat16)
    )
    assert features.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


# 133 convolutions take long to compile, so the whole of InceptionResnetV1 is only traced here, at its smallest image.
def test_inception_trains_and_evaluates_down_to_75_pixels():
    images = jax.ShapeDtypeStruct((2, 75, 80, 1), jnp.float32)

    def run(module, train, rngs):
        variables = abstract(module, images.shape)
        apply = functools.partial(module.apply, train=train, mutable=["batch_stats"], rngs=rngs)
        features, moved = jax.eval_shape(lambda v, x: apply(v, x), variables, images)
        assert jax.tree.structure(moved["batch_stats"]) == jax.tree.structure(variables["batch_stats"])
        return features.shape

    keys = {"dropout": jax.random.key(0)}
    assert run(models.InceptionResnetV1(width=0.05), True, keys) == (2, 512)
    assert run(models.InceptionResnetV1(width=0.05, dropout=0.0), True, None) == (2, 512)
    with pytest.raises(flax.errors.InvalidRngError):
        run(models.InceptionResnetV1(width=0.05), True, None)


def test_half_precision_reaches_every_layer_of_inception():
    module = models.InceptionResnetV1(width=0.05, dtype=jnp.bfloat16)
    jaxpr = jax.make_jaxpr(lambda v, x: module.apply(v, x, train=False))(
        abstract(module, (1, 75, 75, 1)), jax.ShapeDtypeStruct((1, 75, 75, 1), jnp.bfloat16)
    )
    assert jaxpr.out_avals[0].dtype == jnp.bfloat16
    products = [e for e in jaxpr.eqns if str(e.primitive) in ("conv_general_dilated", "dot_general")]
    assert len(products) == 133
    assert {e.outvars[0].aval.dtype for e in products} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("activate", [True, False])
def test_a_residual_block_adds_the_scaled_projection(activate):
    unit = functools.partial(_Unit, train=False, width=0.125, dtype=None)
    block = _Residual(unit, _BLOCK8, scale=0.2, activate=activate)
    x = np.random.default_rng(0).standard_normal((2, 3, 3, 5), np.float32)
    variables = fill(jax.eval_shape(block.init, jax.random.key(0), x))
    found, state = jax.jit(lambda v, x: block.apply(v, x, capture_intermediates=True))(variables, x)
    expected = x + 0.2 * state["intermediates"]["Projection"]["__call__"][0]
    np.testing.assert_allclose(found, jnp.maximum(expected, 0) if activate else expected, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (models.InceptionResnetV1(), (1, 74, 160, 3)),
        (models.VGG16(), (1, 28, 28, 1)),
        (models.VGG16(), (32, 32, 3)),
        (models.resnet18(), (32, 32, 3)),
        (models.SmallCNN(), (112, 92, 1)),
        (models.SphereNet20(), (1, 15, 112, 3)),
    ],
)
def test_images_of_another_shape_are_refused(module, shape):
    with pytest.raises(StructureError, match=re.escape(str(shape))):
        abstract(module, shape)


def test_a_resnet_whose_stages_do_not_match_is_refused():
    with pytest.raises(ArgumentError, match="channels per stage"):
        abstract(models.ResNet(stages=(1, 1), channels=(4,)), CIFAR)


@pytest.mark.parametrize("width", [0.0, -1.0, float("nan"), float("inf"), 0.01])
def test_a_width_without_channels_is_refused(width):
    with pytest.raises(ArgumentError, match="width"):
        scaled(64, width)
