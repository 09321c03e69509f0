"""Two functions that are not one architecture at two widths are an error that names the place."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from pae_jax.errors import ArgumentError, StructureError
from pae_jax.widening import widen_maps


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


class Net(nn.Module):
    width: int = 4
    kernel: int = 3
    stride: int = 1
    depth: int = 1
    activation: str = "relu"
    groups: int = 1

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            x = nn.Conv(
                self.width,
                (self.kernel, self.kernel),
                strides=(self.stride, self.stride),
                feature_group_count=self.groups,
            )(x)
            x = getattr(nn, self.activation)(x)
        return nn.Dense(2)(x.mean((1, 2)))


IMAGE = jnp.ones((1, 8, 8, 4))


def analyse(narrow, wide, x=IMAGE):
    trees = [jax.eval_shape(module.init, jax.random.key(0), x) for module in (narrow, wide)]
    return widen_maps(narrow.apply, trees[0], wide.apply, trees[1], x)


@pytest.mark.parametrize(
    ("wide", "message"),
    [
        (Net(3), r"leaf 'params/Conv_0/bias': found shape \(3,\), expected at least \(4,\).*only grow"),
        (
            Net(6, kernel=5),
            r"leaf 'Net/Conv_0/conv_general_dilated': found a kernel window of \(5, 5\), expected \(3, 3\)",
        ),
        (Net(6, stride=2), r"Net/Conv_0.*window_strides=\(2, 2\), expected window_strides=\(1, 1\)"),
        (Net(6, depth=2), "leaf 'params/Conv_1/bias': found a leaf, expected none"),
        (Net(6, activation="tanh"), "found operation tanh"),
    ],
)
def test_another_architecture(wide, message):
    with pytest.raises(StructureError, match=message):
        analyse(Net(4), wide)


def test_fewer_layers():
    with pytest.raises(StructureError, match="leaf 'params/Conv_1/bias': found no such leaf"):
        analyse(Net(4, depth=2), Net(6))


def test_another_number_of_operations():
    narrow = lambda v, x: x @ v["k"]  # noqa: E731
    wide = lambda v, x: jnp.tanh(x @ v["k"])  # noqa: E731
    with pytest.raises(StructureError, match="found 2 operations, expected 1"):
        widen_maps(narrow, {"k": shape(3, 2)}, wide, {"k": shape(3, 4)}, jnp.ones((1, 3)))


def test_the_same_operations_wired_differently():
    def narrow(v, x):
        a, b = jnp.tanh(x), jnp.tanh(2 * x)
        return a @ v["k"] + b @ v["k"]

    def wide(v, x):
        a, b = jnp.tanh(x), jnp.tanh(2 * x)
        return b @ v["k"] + a @ v["k"]

    with pytest.raises(StructureError, match="an operand from another place"):
        widen_maps(narrow, {"k": shape(3, 2)}, wide, {"k": shape(3, 4)}, jnp.ones((1, 3)))


def test_results_in_another_order():
    narrow = lambda v, x: (x @ v["k"], x @ v["l"])  # noqa: E731
    wide = lambda v, x: (x @ v["k"], x @ v["l"])[::-1]  # noqa: E731
    trees = [{"k": shape(3, n), "l": shape(3, n)} for n in (2, 4)]
    with pytest.raises(StructureError, match="another place"):
        widen_maps(narrow, trees[0], wide, trees[1], jnp.ones((1, 3)))


def test_more_groups_in_place_of_wider_ones():
    """The same number of features in more groups gives every kernel fewer inputs: it shrinks."""
    with pytest.raises(StructureError, match="only grow"):
        analyse(Net(4, groups=1), Net(8, groups=4))


def test_dtype_rank_and_output_trees():
    fn = lambda v, x: x @ v["k"]  # noqa: E731
    x = jnp.ones((1, 3))
    with pytest.raises(StructureError, match="leaf 'k': found bfloat16, expected float32"):
        widen_maps(fn, {"k": shape(3, 2)}, fn, {"k": shape(3, 4, dtype=jnp.bfloat16)}, x)
    with pytest.raises(StructureError, match=r"leaf 'k': found shape .*, expected 2 axes"):
        widen_maps(fn, {"k": shape(3, 2)}, fn, {"k": shape(3, 4, 1)}, x)
    with pytest.raises(StructureError, match="outputs of the wide function"):
        widen_maps(fn, {"k": shape(3, 2)}, lambda v, x: [x @ v["k"]], {"k": shape(3, 4)}, x)


def test_more_scanned_layers():
    def apply(v, x):
        return jax.lax.scan(lambda h, k: (jnp.tanh(h @ k), None), x, v["k"])[0]

    with pytest.raises(StructureError, match="length=3, expected length=2"):
        widen_maps(apply, {"k": shape(2, 3, 3)}, apply, {"k": shape(3, 3, 3)}, jnp.ones((1, 3)))


def test_another_number_of_branches():
    def apply(v, x):
        return jax.lax.switch(jnp.int32(x[0, 0]), [jnp.tanh] * v["k"].shape[1], x @ v["k"])

    with pytest.raises(StructureError, match="found 4 branches, expected 3"):
        widen_maps(apply, {"k": shape(3, 3)}, apply, {"k": shape(3, 4)}, jnp.ones((1, 3)))


def test_a_width_that_changes_nothing_is_the_identity():
    maps = analyse(Net(4), Net(4))
    assert maps.is_identity and maps.preserved
    assert not analyse(Net(4), Net(5)).is_identity


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"nowhere": {0: [0, 1]}}, "no leaf 'nowhere'"),
        ({"k": {2: [0, 1]}}, "axis 2 is outside of a leaf with 2 axes"),
        ({"k": {1: [0]}}, r"found 1 positions \[0\], expected 2 different ones in \[0, 4\)"),
        ({"k": {1: [1, 1]}}, "expected 2 different ones"),
        ({"k": {1: [0, 4]}}, "expected 2 different ones"),
        ({"k": {0: [1, 0, 2]}}, "does not grow would be reordered"),
    ],
)
def test_overrides_are_checked(overrides, message):
    fn = lambda v, x: x @ v["k"]  # noqa: E731
    with pytest.raises(ArgumentError, match=message):
        widen_maps(fn, {"k": shape(3, 2)}, fn, {"k": shape(3, 4)}, jnp.ones((1, 3)), overrides=overrides)
