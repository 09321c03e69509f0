"""The gradient of a part of a weight is that part of the gradient, for any program, and costs what the part costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx, traverse_util
from jax.extend.core import ClosedJaxpr, Jaxpr

from pae_jax.models.conv import Conv
from pae_jax.training import partial_gradients
from pae_jax.training import places as of_places
from pae_jax.trees import flatten

DRAW = np.random.default_rng(0)
KEY = jax.random.key(0)
ROWS = jnp.asarray(DRAW.normal(size=(6, 16)), jnp.float32)
TOKENS = jnp.asarray(DRAW.normal(size=(2, 5, 16)), jnp.float32)
IMAGES = jnp.asarray(DRAW.normal(size=(2, 9, 8, 16)), jnp.float32)
IDS = jnp.asarray(DRAW.integers(0, 40, (2, 5)).astype(np.int32)).at[0, 1].set(7).at[1, 3].set(7)


class Twice(nn.Module):
    """One kernel in two layers."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(16)
        return layer(nn.tanh(layer(x)))


class Tied(nn.Module):
    """An embedding that is the output layer too."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(40, 16)
        return embed.attend(nn.tanh(embed(ids)))


class Layers(nn.Module):
    """A scan over stacked layers, and one over a shared layer."""

    @nn.compact
    def __call__(self, x):
        class Body(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.tanh(nn.Dense(16)(x)), None

        axes = {"params": 0}
        stacked = nn.scan(Body, variable_axes=axes, split_rngs={"params": True}, length=3)()
        shared = nn.scan(Body, variable_broadcast="params", split_rngs={"params": False}, length=2)()
        return shared(stacked(x, None)[0], None)[0]


@jax.custom_vjp
def halved(x):
    return x


halved.defvjp(lambda x: (x, None), lambda _, slope: (slope / 2,))


class Unusual(nn.Module):
    """Uses of a kernel that no rule knows, beside one that a rule does, and a derivative of the model's own."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(1.0), (16, 20))
        gram = jnp.einsum("ij,kj->ik", kernel, kernel)
        branch = jax.lax.cond(x.sum() > 0, lambda k: x @ k, lambda k: -x @ k, kernel)
        return halved(x @ kernel) + branch + (gram.sum() + jnp.linalg.norm(kernel)) * 0.1


class Sums(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Einsum((16, 4, 6), "bti,iho->btho")(x)


LINEN = {
    "dense": (nn.Sequential([nn.Dense(20), nn.tanh, nn.Dense(24)]), ROWS),
    "dense, bfloat16": (nn.Sequential([nn.Dense(20, dtype=jnp.bfloat16), nn.tanh, nn.Dense(24)]), ROWS),
    "attention": (nn.MultiHeadDotProductAttention(4), TOKENS),
    "einsum": (Sums(), TOKENS),
    "convolution": (
        nn.Sequential([nn.Conv(12, (3, 3), strides=2), nn.relu, nn.Conv(16, (2, 3), padding="VALID")]),
        IMAGES,
    ),
    "convolution, dilated": (nn.Conv(12, (3, 3), kernel_dilation=2, padding=((1, 2), (0, 3))), IMAGES),
    "convolution, grouped": (nn.Conv(16, (3, 3), feature_group_count=4), IMAGES),
    "convolution, transposed": (nn.ConvTranspose(12, (3, 3), strides=(2, 2)), IMAGES),
    "convolution of one pixel, on a small map": (
        nn.Sequential([Conv(12, (1, 1)), nn.relu, lambda x: x[:, ::3, ::3], Conv(20, (3, 3))]),
        IMAGES,
    ),
    "kernel used twice": (Twice(), ROWS),
    "tied embedding": (Tied(), IDS),
    "rematerialised": (nn.remat(Twice)(), ROWS),
    "scan": (Layers(), ROWS),
    "unusual": (Unusual(), ROWS),
}


def linen(name):
    module, x = LINEN[name]
    return module.apply, module.init(KEY, x), x


def nnx_model():
    model = nnx.Sequential(nnx.Linear(16, 20, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(20, 24, rngs=nnx.Rngs(1)))
    graph, params = nnx.split(model, nnx.Param)
    return lambda variables, x: nnx.merge(graph, variables)(x), params, ROWS


take = jax.jit(of_places.Places.take)


def places_of(leaf, kind):
    """Return some places of a leaf: in its last two axes, or drawn one by one."""
    owner = np.ones(leaf.shape, np.int8)
    if kind == "entries":
        owner.reshape(-1)[DRAW.choice(leaf.size, 9, replace=False)] = 2
        return of_places._entries(owner == 2, 12)
    axes = {"rows": (-2,), "columns": (-1,), "block": (-2, -1)}[kind]
    axes = tuple(axis % leaf.ndim for axis in axes)
    index = [np.sort(DRAW.choice(leaf.shape[axis], max(leaf.shape[axis] // 3, 1), replace=False)) for axis in axes]
    return of_places.Places(tuple(jnp.asarray(i, jnp.int32) for i in index), axes, scattered=False)


def split(variables, kind):
    """Return `(base, parts, {path: places})` for every leaf of two axes or more."""
    flat = traverse_util.flatten_dict(variables)
    places = {path: places_of(leaf, kind) for path, leaf in flat.items() if leaf.ndim > 1}
    return flat, {path: take(found, flat[path]) for path, found in places.items()}, places


def joined(base, parts, places):
    return traverse_util.unflatten_dict(
        base | {path: places[path].put(base[path], part) for path, part in parts.items()}
    )


def two_ways(function, variables, x, kind, plain_x=None):
    """Return two functions of the parts, the cheap and the plain one, and the parts."""
    base, parts, places = split(variables, kind)

    def cheap(parts):
        whole = joined(base, parts, places)
        return partial_gradients.call(function, whole, {path: (part, places[path]) for path, part in parts.items()}, x)

    same = x if plain_x is None else plain_x
    return cheap, lambda parts: function(joined(base, parts, places), same), parts


def close(one, other, tolerance=1e-4):
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=tolerance * (np.abs(b).max() + 1e-6))


def loss(run):
    return lambda parts: jnp.sum(jnp.sin(run(parts).astype(jnp.float32)))


@pytest.mark.parametrize("kind", ["rows", "columns", "block", "entries"])
@pytest.mark.parametrize("name", [*LINEN, "nnx"])
def test_the_gradient_of_a_part_is_that_part_of_the_gradient(name, kind):
    if name == "nnx":
        function, state, x = nnx_model()
        variables = nnx.to_pure_dict(state)
    else:
        function, variables, x = linen(name)
    cheap, plain, parts = two_ways(function, variables, x, kind)
    assert parts
    tolerance = 0.03 if "bfloat16" in name else 1e-4
    found, wanted = (jax.jit(lambda p, run=run: (run(p), jax.grad(loss(run))(p)))(parts) for run in (cheap, plain))
    close(found, wanted, tolerance)
    assert any(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(wanted[1]))


def inner(value):
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    return (
        [value]
        if isinstance(value, Jaxpr)
        else [j for v in value for j in inner(v)]
        if isinstance(value, tuple)
        else []
    )


def results(jaxpr, names=("dot_general", "conv_general_dilated", "scatter-add")):
    """Return the shapes of all products and sums by index of a program."""
    shapes = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in names:
            shapes.append(equation.outvars[0].aval.shape)
        for value in equation.params.values():
            for body in inner(value):
                shapes += results(body, names)
    return shapes


CHEAP = ("dense", "attention", "einsum", "convolution", "convolution of one pixel, on a small map", "kernel used twice")


@pytest.mark.parametrize("name", [*CHEAP, "rematerialised"])
def test_no_product_of_the_gradient_has_the_size_of_the_whole_weight(name):
    function, variables, x = linen(name)
    cheap, plain, parts = two_ways(function, variables, x, "block")
    sizes = {leaf.size for path, leaf in flatten(variables).items() if path.endswith("kernel")}
    found, wanted = (results(jax.make_jaxpr(jax.grad(loss(run)))(parts).jaxpr) for run in (cheap, plain))
    assert sizes <= {int(np.prod(shape)) for shape in wanted}
    assert not sizes & {int(np.prod(shape)) for shape in found}


def test_a_lookup_has_a_gradient_of_a_row_for_each_lookup():
    module = nn.Embed(50, 16)
    variables = module.init(KEY, IDS)
    for kind in ("rows", "columns", "block", "entries"):
        cheap, plain, parts = two_ways(module.apply, variables, IDS, kind)
        found, wanted = (results(jax.make_jaxpr(jax.grad(loss(run)))(parts).jaxpr) for run in (cheap, plain))
        assert (50, 16) in wanted
        assert (50, 16) not in found


@pytest.mark.parametrize(
    ("ids", "rows"),
    [
        (np.asarray([[0, 41, 39], [-1, 7, 40]]), 40),
        (np.asarray([[7, 7, 7], [7, 7, 7]]), 40),
        (np.arange(256, dtype=np.uint8)[None], 300),
    ],
    ids=["outside the table", "one row", "narrow integers"],
)
@pytest.mark.parametrize("mode", ["fill", "clip"])
@pytest.mark.parametrize("kind", ["rows", "block", "entries"])
def test_lookups_outside_the_table_and_of_one_row_often(ids, rows, mode, kind):
    table = {"table": jnp.asarray(DRAW.normal(size=(rows, 16)), jnp.float32)}

    def function(variables, ids):
        return jnp.nan_to_num(jnp.take(variables["table"], ids, axis=0, mode=mode))

    # With the options that the tests compile with, XLA's own gradient of uint8 ids of 128 and more is 0.
    cheap, plain, parts = two_ways(function, table, jnp.asarray(ids), kind, plain_x=jnp.asarray(ids, jnp.int32))
    close(jax.grad(loss(cheap))(parts), jax.grad(loss(plain))(parts))


def test_derivatives_forward_and_of_second_order_and_under_vmap():
    function, variables, x = linen("dense")
    for kind in ("block", "entries"):
        cheap, plain, parts = two_ways(function, variables, x, kind)
        change = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), parts)
        many = jax.tree.map(lambda a, b: jnp.stack([a, a + b]), parts, change)
        for way in (
            lambda run: jax.jvp(run, (parts,), (change,)),
            lambda run: jax.jvp(jax.grad(loss(run)), (parts,), (change,)),
            lambda run: jax.grad(lambda p: jnp.sum(jax.grad(loss(run))(p)[("params", "layers_0", "kernel")] ** 2))(
                parts
            ),
            lambda run: jax.vmap(jax.grad(loss(run)))(many),
        ):
            close(jax.jit(lambda way=way: way(cheap))(), jax.jit(lambda way=way: way(plain))())


def test_the_gradient_of_the_inputs_is_the_plain_one():
    for name in ("dense", "attention", "convolution"):
        function, variables, x = linen(name)
        base, parts, places = split(variables, "block")
        pairs = {path: (part, places[path]) for path, part in parts.items()}
        whole = joined(base, parts, places)
        cheap = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(partial_gradients.call(function, whole, pairs, x)))))
        plain = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(function(whole, x)))))
        close(cheap(x), plain(x))


def test_results_keep_their_tree_and_names():
    module = nn.Dense(20)
    variables = module.init(KEY, ROWS)
    base, parts, places = split(variables, "columns")
    pairs = {path: (part, places[path]) for path, part in parts.items()}

    def function(variables, x, extra):
        return {"out": [module.apply(variables, x), None], "weights": variables["params"]["kernel"], "extra": extra}

    found = partial_gradients.call(function, joined(base, parts, places), pairs, ROWS, {"n": 3})
    assert jax.tree.structure(found) == jax.tree.structure(function(variables, ROWS, {"n": 3}))
    np.testing.assert_array_equal(found["weights"], flatten(variables)["params/kernel"])
