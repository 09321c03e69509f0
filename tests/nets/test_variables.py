"""Pretrained variables in every form that Flax gives them, and what is said of those that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze

import pae_jax as pae
from pae_jax.trees import flatten, merge

VECTOR = np.zeros((1, 4), np.float32)


class Boxed(nn.Module):
    """Partitioned weights, two kinds of box, statistics, and two collections that are only sown."""

    width: float = 1.0

    @nn.compact
    def __call__(self, x, train):
        logical = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        plain = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        x = nn.Dense(int(8 * self.width), kernel_init=logical)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        self.sow("intermediates", "h", x)
        self.sow("losses", "size", (x**2).mean())
        return nn.Dense(6, kernel_init=plain, use_bias=False)(x)


class Blocks(nnx.Module):
    """Items of a list, one layer used twice, statistics, dropout, constants and None."""

    def __init__(self, width, rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)])
        self.twice, self.dropout = self.layers[0], nnx.Dropout(0.5, rngs=rngs)
        self.waves, self.table = np.arange(4, dtype=np.float32), jnp.ones(4)
        self.mean, self.nothing = nnx.Variable(jnp.full(4, 0.5)), nnx.Param(None)
        self.out = nnx.Linear(4, int(6 * width), use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(self.layers[1](self.layers[0](x))) + jnp.asarray(self.waves)[None] * self.table[None]
        return self.out(self.twice(x - self.mean[...][None]))


LINEN, NNX = pae.linen(Boxed, VECTOR), pae.nnx(Blocks, VECTOR)
X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def boxed():
    """Variables as `module.init` gives them: in boxes, with what was sown."""
    variables = Boxed().init(jax.random.key(3), jnp.asarray(VECTOR), False)
    assert "losses" in variables
    assert isinstance(variables["params"]["Dense_0"]["kernel"], nn.LogicallyPartitioned)
    return variables


@pytest.fixture(scope="module")
def plain(boxed):
    """The same as nested dicts of arrays."""
    unboxed = nn.meta.unbox(boxed)
    return {name: unboxed[name] for name in ("params", "batch_stats")}


FORMS = {
    "as init gives them": lambda boxed, plain: boxed,
    "frozen": lambda boxed, plain: freeze(boxed),
    "NumPy": lambda boxed, plain: jax.tree.map(np.asarray, plain),
    "with None": lambda boxed, plain: {**plain, "params": {**plain["params"], "Dense_9": {"bias": None}}},
    "float64, cast": lambda boxed, plain: jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), plain),
}


@pytest.mark.parametrize("form", FORMS)
def test_linen_variables_are_taken_in_every_form(form, boxed, plain, assert_same):
    dtype = jnp.float32 if "cast" in form else None
    state = pae.from_variables(LINEN, FORMS[form](boxed, plain), dtype=dtype)
    assert_same(merge(state.shared, state.local), plain)


def nnx_pure(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


NNX_FORMS = {
    "the module": lambda model: model,
    "its state": nnx.state,
    "collections of states": lambda model: collections(model, lambda state: state),
    "collections of pure dicts": lambda model: collections(model, nnx.to_pure_dict),
}


def collections(model, make):
    kinds = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
    found = {name: make(nnx.state(model, kind)) for name, kind in kinds.items()}
    constants = {"waves": model.waves, "table": model.table}
    return {**found, "Variable": {"mean": model.mean[...]}, "constants": constants}


@pytest.mark.parametrize("form", NNX_FORMS)
def test_nnx_variables_are_taken_in_every_form(form, assert_same):
    model = Blocks(1.0, nnx.Rngs(3))
    state = pae.from_variables(NNX, NNX_FORMS[form](model))
    kernel = model.layers[0].kernel[...]
    assert_same(state.shared, {"layers": {"0": {"kernel": kernel}}, "out": {"kernel": model.out.kernel[...]}})
    assert set(flatten(state.local)) == {
        "params/layers/0/bias", "params/layers/1/bias", "params/layers/1/scale", "batch_stats/layers/1/mean",
        "batch_stats/layers/1/var", "Variable/mean", "constants/waves", "constants/table",
    }  # fmt: skip
    state = pae.pack(NNX, state, "a", head=None, key=jax.random.key(0))
    model.eval()
    np.testing.assert_allclose(pae.predict(NNX, state, "a", X), model(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", [None, 3], ids=["no head", "a head"])
@pytest.mark.parametrize("net", [LINEN, NNX], ids=["linen", "nnx"])
def test_as_flax_is_the_inverse_of_from_variables(net, head, assert_same):
    model = Blocks(1.0, nnx.Rngs(3)) if net is NNX else Boxed().init(jax.random.key(3), jnp.asarray(VECTOR), False)
    state = pae.from_variables(net, model)
    packed = pae.pack(net, state, "a", head=head, key=jax.random.key(0))
    module, values = pae.as_flax(net, packed, "a")
    for variables in (values, module if net is NNX else values, pae.task_variables(net, packed, "a")["backbone"]):
        back = pae.from_variables(net, variables)
        assert_same(merge(back.shared, back.local), merge(state.shared, state.local))


def changed(plain, change):
    params = dict(plain["params"])
    if change == "params alone":
        return params
    if change == "half precision":
        return jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), plain)
    if change == "two missing":
        return {"params": params}
    if change == "another model":
        return {**plain, "params": {f"{name}_layer": layer for name, layer in params.items()}}
    if change == "integers":
        return {**plain, "params": jax.tree.map(lambda leaf: np.zeros(leaf.shape, int), params)}
    assert change == "wider"
    return {**plain, "params": jax.tree.map(lambda leaf: np.zeros((*leaf.shape[:-1], 9), np.float32), params)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("params alone", r'found nothing, .* These are the parameters alone: pass \{"params": ...\}'),
        ("half precision", r"found float16\[8\], expected float32\[8\]. To cast floating leaves, pass dtype="),
        ("two missing", r"In all 2 leaves are missing \('batch_stats/BatchNorm_0/mean', .*/var'\) and 0 unexpected"),
        (
            "another model",
            r"In all 5 leaves are missing \(.*, \.\.\.\) and 5 unexpected \('params/BatchNorm_0_layer/bias'",
        ),
        ("integers", r"found int64\[8\], expected float32\[8\]. The variables must come from the same model"),
        ("wider", r"found float32\[9\], expected float32\[8\]. The variables must come from the same model"),
    ],
)
def test_variables_that_do_not_fit_say_what_differs_and_what_to_do(change, message, plain):
    with pytest.raises(pae.StructureError, match=message) as error:
        pae.from_variables(LINEN, changed(plain, change))
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("dtype", [int, "words", np.complex64], ids=str)
def test_a_cast_is_to_a_floating_dtype(dtype, plain):
    with pytest.raises(pae.ArgumentError, match="dtype must be a floating dtype"):
        pae.from_variables(LINEN, plain, dtype=dtype)


@pytest.mark.parametrize(
    "variables",
    [None, 3, "weights.npz", [1, 2], nn.Dense(3), {"params": nn.Dense(3)}],
    ids=lambda value: str(type(value)),
)
def test_what_holds_no_variables_is_refused_in_one_line(variables):
    with pytest.raises(pae.StructureError, match="variables") as error:
        pae.from_variables(LINEN, variables)
    assert len(str(error.value)) < 300


# What is shared


def leaf(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


SHARED = {
    "Dense_0/kernel": leaf(4, 3),
    "layers/kernel": leaf(3, 4, 4),
    "Embed_0/embedding": leaf(7, 4),
    "probe": leaf(1, 1, 8),
    "lora_a": leaf(4, 2),
    "out/lora_b": leaf(2, 4),
    "normed_projection/kernel": leaf(4, 4),
    "w": leaf(4, 4),
    "position_embedding": leaf(1, 5, 4),
    "relative_position_bias_table": leaf(49, 3),
    "blocks/scale_kernel": leaf(4, 4),
}
LOCAL = {
    "Dense_0/bias": leaf(3),
    "layers/bias": leaf(3, 4),
    "attention/query/bias": leaf(2, 4),
    "layers/LayerNorm_0/scale": leaf(3, 4),
    "layers/ln_1/weight": leaf(3, 4),
    "bn2/offset": leaf(3, 4),
    "rms/g": leaf(3, 4),
    "layers/q_bias": leaf(3, 4),
    "layers/layer_scale": leaf(3, 4),
    "prelu/negative_slope": leaf(3, 1),
    "blocks/attn_ln/w": leaf(3, 4),
    "block/b": leaf(3, 4),
    "block/gamma": leaf(3, 4),
    "temperature": leaf(2, 1, 1),
    "count/kernel": leaf(2, 4, dtype=jnp.int32),
}


@pytest.mark.parametrize("path", [*SHARED, *LOCAL])
def test_kernels_are_shared_and_vectors_are_local_however_many_axes_they_have(path):
    leaves = SHARED if path in SHARED else LOCAL
    assert pae.linen(Boxed, VECTOR).packable(path, leaves[path]) == (path in SHARED)


def test_the_layout_says_which_leaves_are_shared_and_which_are_local():
    lines = str(pae.layout(LINEN, 1.5)).splitlines()
    assert lines[0] == "shared: 2 leaves, 120 numbers"
    assert "  params/Dense_0/kernel  float32[4,12]" in lines
    assert lines[3] == "local, once per task: 5 leaves, 60 numbers"
    assert "  batch_stats/BatchNorm_0/mean  float32[12]" in lines
    assert lines[-1] == "features: float32[1,6]"
    with pytest.raises(pae.ArgumentError, match="width is a positive channel factor"):
        pae.layout(LINEN, 0)
