"""Any user model works under both adapters, or is refused by name: at init, or at pack where it has to be run."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import pae_jax as pae
from pae_jax.trees import flatten

LINEN, NNX = {}, {}


def linen_model(sample):
    def register(kind):
        LINEN[kind.__name__] = (kind, sample)
        return kind

    return register


def nnx_model(sample):
    def register(kind):
        NNX[kind.__name__] = (kind, sample)
        return kind

    return register


IMAGE = np.zeros((1, 6, 6, 2), np.float32)
TOKENS = np.zeros((1, 5), np.int32)
SERIES = np.zeros((1, 4, 3), np.float32)
VECTOR = np.zeros((1, 4), np.float32)


@linen_model(IMAGE)
class ConvBatchNorm(nn.Module):
    width: float

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(int(4 * self.width), (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return x.mean(axis=(1, 2))


@linen_model(IMAGE)
class DepthwiseGroupNormNoBias(nn.Module):
    width: float

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), feature_group_count=2, use_bias=False)(x)
        x = nn.PReLU()(nn.GroupNorm(num_groups=2)(x))
        return nn.Dense(3, use_bias=False)(x.reshape(x.shape[0], -1))


@linen_model(TOKENS)
class EmbedAttentionLayerNormDropout(nn.Module):
    width: float

    @nn.compact
    def __call__(self, x, train):
        x = nn.Embed(7, 4)(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return nn.Dropout(0.3, deterministic=not train)(x).mean(axis=1)


@linen_model(SERIES)
class Lstm(nn.Module):
    width: float

    @nn.compact
    def __call__(self, x, train):
        return nn.RNN(nn.LSTMCell(3))(x)[:, -1]


@linen_model({"picture": VECTOR, "words": TOKENS})
class DictInput(nn.Module):
    width: float

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(x["picture"]) + nn.Embed(7, 3)(x["words"]).mean(axis=1)


@linen_model(VECTOR)
class HalfPrecision(nn.Module):
    width: float

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(6, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)(x)
        x = nn.BatchNorm(use_running_average=not train, dtype=jnp.bfloat16)(x)
        return nn.Dense(3, param_dtype=jnp.float16)(nn.relu(x))


@linen_model(VECTOR)
class FrozenNoiseAndScan(nn.Module):
    """Another random stream than dropout, partition metadata, and stacked layers of a scan."""

    width: float

    @nn.compact
    def __call__(self, x, train):
        def layer(cell, carry, _):
            return nn.relu(cell(carry)), None

        stacked = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = stacked(nn.Dense(4), x, None)
        if train:
            x = x + 0.1 * jax.random.normal(self.make_rng("noise"), x.shape)
        return nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model")))(x)


@nnx_model(IMAGE)
class NnxConvBatchNormDropout(nnx.Module):
    def __init__(self, width, rngs):
        self.conv = nnx.Conv(2, 3, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x, train):
        x = self.norm(self.conv(x), use_running_average=not train)
        return self.dropout(nnx.relu(x).mean(axis=(1, 2)), deterministic=not train)


@nnx_model(TOKENS)
class NnxEmbedListTied(nnx.Module):
    """Int inputs, items of a list, one layer used twice, attention-free."""

    def __init__(self, width, rngs):
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)])
        self.twice = self.layers[0]

    def __call__(self, x, train):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.twice(x).mean(axis=1)


@nnx_model(SERIES)
class NnxRnn(nnx.Module):
    def __init__(self, width, rngs):
        self.rnn = nnx.RNN(nnx.LSTMCell(3, 3, rngs=rngs), rngs=rngs)

    def __call__(self, x, train):
        return self.rnn(x)[:, -1]


class Counter(nnx.Variable):
    pass


@nnx_model(VECTOR)
class NnxOwnVariable(nnx.Module):
    def __init__(self, width, rngs):
        self.dense = nnx.Linear(4, 3, use_bias=False, rngs=rngs)
        self.seen = Counter(jnp.zeros((), jnp.int32))

    def __call__(self, x, train):
        if train:
            self.seen[...] += 1
        return self.dense(x)


def batch_of(sample, count=12):
    rng = np.random.default_rng(0)

    def draw(leaf):
        shape = (count, *leaf.shape[1:])
        if leaf.dtype == np.int32:
            return rng.integers(0, 7, shape).astype(np.int32)
        return rng.normal(size=shape).astype(np.float32)

    return jax.tree.map(draw, sample), rng.integers(0, 3, count)


@functools.cache
def net_of(name):
    return pae.linen(*LINEN[name]) if name in LINEN else pae.nnx(*NNX[name])


@pytest.mark.parametrize("name", [*LINEN, *NNX])
def test_any_model_packs_trains_prunes_freezes_and_forgets_nothing(name, quick_fit, assert_same):
    net, tx = net_of(name), optax.adamw(0.05, weight_decay=0.1)
    x, y = batch_of(net.sample)
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=3, key=jax.random.key(1))
    trained, history = quick_fit(state, "a", (x, y), net=net, optimizer=tx, batch_size=6)
    assert np.isfinite(history.rows[-1]["loss"])
    for path, w in flatten(trained.shared).items():
        assert (np.asarray(w) != np.asarray(flatten(state.shared)[path])).any(), path
        assert w.dtype == flatten(state.shared)[path].dtype
    state = pae.freeze(pae.prune(trained, "a", 0.5), "a")
    before = pae.predict(net, state, "a", x)
    assert before.shape == (12, 3)
    start = pae.pack(net, state, "b", head=3, key=jax.random.key(2), local_init="a")
    for found, wanted in zip(
        *(jax.tree.leaves(pae.features(net, s, t, x)) for s, t in ((start, "b"), (state, "a"))), strict=True
    ):
        scale = np.abs(np.asarray(wanted, np.float32)).max()
        eps = float(jnp.finfo(wanted.dtype).eps)
        np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(wanted, np.float32), atol=8 * eps * scale)
    later = pae.pack(net, state, "b", head=3, key=jax.random.key(2))
    ts = pae.TrainState.create(net, later, "b", tx=tx).replace(opt_state=history.opt_state)  # momentum of the old task
    carried = dataclasses.replace(history, end=ts)
    later, _ = quick_fit(later, "b", (x, 2 - y), net=net, optimizer=tx, batch_size=6, resume=carried)
    for path, w in flatten(later.shared).items():
        assert (np.asarray(w) != np.asarray(flatten(state.shared)[path])).any(), path
    assert_same(pae.predict(net, later, "a", x), before)
    assert_same(later.tasks["a"].local, state.tasks["a"].local)
    pae.verify(later)
    pae.check(later, net)


SHARED = {
    "ConvBatchNorm": {"Conv_0/kernel": "float32[3,3,2,4]"},
    "DepthwiseGroupNormNoBias": {"Conv_0/kernel": "float32[3,3,1,4]", "Dense_0/kernel": "float32[144,3]"},
    "HalfPrecision": {"Dense_0/kernel": "bfloat16[4,6]", "Dense_1/kernel": "float16[6,3]"},
    "DictInput": {"Dense_0/kernel": "float32[4,3]", "Embed_0/embedding": "float32[7,3]"},
    "NnxEmbedListTied": {"embed/embedding": "float32[7,4]", "layers/0/kernel": "float32[4,4]"},
}
LOCAL = {
    "ConvBatchNorm": [
        "batch_stats/BatchNorm_0/mean",
        "batch_stats/BatchNorm_0/var",
        "params/BatchNorm_0/bias",
        "params/BatchNorm_0/scale",
        "params/Conv_0/bias",
    ],
    "DepthwiseGroupNormNoBias": [
        "params/GroupNorm_0/bias",
        "params/GroupNorm_0/scale",
        "params/PReLU_0/negative_slope",
    ],
    "NnxEmbedListTied": ["params/layers/0/bias", "params/layers/1/bias", "params/layers/1/scale"],
    "NnxOwnVariable": ["Counter/seen"],
}


@pytest.mark.parametrize("name", sorted({*SHARED, *LOCAL}))
def test_kernels_and_embeddings_are_shared_and_everything_else_is_local(name, shapes):
    layout = net_of(name).layout(1.0)
    if name in SHARED:
        assert shapes(layout.shared) == SHARED[name]
    if name in LOCAL:
        assert sorted(flatten(layout.local)) == LOCAL[name]


def test_packable_names_other_leaves(quick_fit, net, vector_module, data, assert_same):
    """Biases, slopes and scales packed as well, the second kernel not: it becomes the task's own."""
    seen = set()

    def packable(path, leaf):
        seen.add((path, leaf.shape))
        return path != "Dense_1/kernel"

    own = pae.linen(vector_module, jnp.zeros((1, 4)), packable=packable)
    state = pae.pack(own, pae.init(own, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
    assert sorted(flatten(state.shared)) == [
        "BatchNorm_0/bias",
        "BatchNorm_0/scale",
        "Dense_0/kernel",
        "Dense_1/bias",
        "PReLU_0/negative_slope",
    ]
    assert ("PReLU_0/negative_slope", ()) in seen
    assert "params/Dense_1/kernel" in flatten(state.tasks["a"].local)
    state = pae.freeze(pae.prune(quick_fit(state, "a", net=own)[0], "a", 0.5), "a")
    before = pae.predict(own, state, "a", data[0])
    state, _ = quick_fit(pae.pack(own, state, "b", head=2, key=jax.random.key(2), weight_init="fresh"), "b", net=own)
    assert_same(pae.predict(own, state, "a", data[0]), before)


def test_dropout_is_off_in_evaluation_and_drawn_from_the_key_in_training(quick_fit, assert_same):
    for name in ("EmbedAttentionLayerNormDropout", "NnxConvBatchNormDropout"):
        net = net_of(name)
        x, y = batch_of(net.sample, 6)
        state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=3, key=jax.random.key(1))
        assert_same(pae.predict(net, state, "a", x), pae.predict(net, state, "a", x))
        options = {"net": net, "epochs": 1, "optimizer": optax.adamw(0.05, weight_decay=0.1)}
        batches = [(x, y)]
        one, two, other = (quick_fit(state, "a", batches, key=key, **options)[1].rows[0]["loss"] for key in (1, 1, 2))
        assert one == two != other


def test_a_counter_of_the_model_counts_the_training_steps_of_each_task_alone(quick_fit):
    net = net_of("NnxOwnVariable")
    x, y = batch_of(VECTOR)
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=3, key=jax.random.key(1))
    state, _ = quick_fit(state, "a", [(x, y)] * 3, net=net, epochs=2)
    assert int(state.tasks["a"].local["Counter"]["seen"]) == 6
    pae.evaluate(net, state, "a", (x, y))
    state = pae.pack(net, pae.freeze(pae.prune(state, "a", 0.5), "a"), "b", head=3, key=jax.random.key(1))
    state, _ = quick_fit(state, "b", [(x, y)] * 3, net=net, epochs=1)
    assert [int(state.tasks[t].local["Counter"]["seen"]) for t in "ab"] == [6, 3]


class DeepHead(nn.Module):
    """A head with statistics of its own and dropout."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        return nn.Dense(2)(nn.Dropout(0.2, deterministic=not train)(x))


class NnxHead(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(6, momentum=0.5, rngs=rngs)
        self.out = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x, train):
        return self.out(self.norm(x, use_running_average=not train))


@pytest.mark.parametrize(
    "make", [DeepHead, lambda: NnxHead(nnx.Rngs(0)), lambda: nn.Dense(2)], ids=["Linen", "NNX", "plain layer"]
)
def test_a_head_may_be_any_module_with_variables_of_its_own(net, empty, quick_fit, data, make, assert_same):
    state = pae.pack(net, empty, "a", head=make(), key=jax.random.key(1))
    trained, _ = quick_fit(state, "a")
    for path, leaf in flatten(trained.tasks["a"].head).items():
        assert (np.asarray(leaf) != np.asarray(flatten(state.tasks["a"].head)[path])).any(), path
    state = pae.freeze(pae.prune(trained, "a", 0.5), "a")
    before = pae.predict(net, state, "a", data[0])
    state, _ = quick_fit(pae.pack(net, state, "b", head=2, key=jax.random.key(2)), "b")
    assert_same(pae.predict(net, state, "a", data[0]), before)
    pae.verify(state)


def test_two_heads_built_alike_share_one_train_step(net, empty, quick_fit, traces):
    state = pae.pack(net, empty, "a", head=nn.Dense(2), key=jax.random.key(1))
    state, _ = quick_fit(state, "a", epochs=1)
    state = pae.freeze(pae.prune(state, "a", 0.5), "a")
    traces.clear()
    quick_fit(pae.pack(net, state, "b", head=nn.Dense(2), key=jax.random.key(1)), "b", epochs=1)
    assert traces == []


# Refused by name at init


def refused(call):
    def make(width):
        class Model(nn.Module):
            @nn.compact
            def __call__(self, x, train):
                return call(self, x)

        return Model()

    return make


def complex_param(self, x):
    p = self.param("phase", lambda key: jnp.ones((4, 4), jnp.complex64))
    return nn.Dense(3)(x) + jnp.real(p).sum()


def integer_param(self, x):
    return nn.Dense(3)(x) + self.param("table", lambda key: jnp.ones((4, 4), jnp.int32)).sum()


def bool_param(self, x):
    return nn.Dense(3)(x) + self.param("gate", lambda key: jnp.ones((4,), bool)).sum()


def key_variable(self, x):
    self.variable("state", "rng", lambda: jax.random.key(0))
    return nn.Dense(3)(x)


def no_kernel(self, x):
    return x * self.param("scale", nn.initializers.ones, (1,))[None]


def no_params(self, x):
    return x


def scalar_features(self, x):
    return nn.Dense(3)(x).sum()


def features_in_a_row(self, x):
    return nn.Dense(3)(x).T


def one_scalar_among_features(self, x):
    return nn.Dense(3)(x), x.sum()


def no_features(self, x):
    return (nn.Dense(3)(x),)[1:]


def params_in_a_tuple(self, x):
    w, v = self.param("pair", lambda key: (jnp.ones((4, 3)), jnp.ones((4, 3))))
    return x @ w + x @ v


def growing_collection(self, x):
    self.sow("losses", "size", jnp.sum(x))
    return nn.Dense(3)(x)


REFUSED = {
    complex_param: r"leaf 'params/phase': found complex64\[4,4\], expected a float array",
    integer_param: r"leaf 'params/table': found int32\[4,4\], expected a float array, because params are trained",
    bool_param: r"leaf 'params/gate': found bool\[4\], expected a float array",
    key_variable: r"leaf 'state/rng': found key<fry>\[\], expected a numeric array",
    no_kernel: r"found no leaf that can be shared, expected at least one float leaf of two or more axes.*packable=",
    no_params: "found no leaf that can be shared",
    scalar_features: r"leaf 'features': found float32\[\], expected an array of 2 examples \(batch, ...\)",
    features_in_a_row: r"leaf 'features': found float32\[3,2\], expected an array of 2 examples",
    one_scalar_among_features: r"leaf 'features 1': found float32\[\], expected an array of 2 examples",
    no_features: r"found no features, expected a tree of features \(batch, ...\)",
}


@pytest.mark.parametrize("call", REFUSED, ids=lambda call: call.__name__)
def test_a_leaf_or_output_that_cannot_be_handled_is_refused_by_name_at_init(call):
    net = pae.linen(refused(call), jnp.zeros((2, 4)))
    with pytest.raises(pae.StructureError, match=REFUSED[call]):
        pae.init(net, jax.random.key(0))


@pytest.mark.parametrize("call", [params_in_a_tuple, growing_collection], ids=lambda call: call.__name__)
def test_an_unusual_variable_is_refused_by_name_at_init_or_trains(call, quick_fit, data):
    net = pae.linen(refused(call), jnp.zeros((2, 4)))
    try:
        state = pae.init(net, jax.random.key(0))
    except pae.StructureError as error:
        assert "pair" in str(error) or "losses" in str(error)
        return
    state = pae.pack(net, state, "a", head=2, key=jax.random.key(1))
    quick_fit(state, "a", net=net)


class NnxInteger(nnx.Module):
    def __init__(self, width, rngs):
        self.dense = nnx.Linear(4, 3, rngs=rngs)
        self.table = nnx.Param(jnp.ones((2, 2), jnp.int32))

    def __call__(self, x, train):
        return self.dense(x)


def test_the_nnx_adapter_refuses_such_leaves_too():
    with pytest.raises(
        pae.StructureError, match=r"NnxInteger, leaf 'params/table': found int32\[2,2\], expected a float array"
    ):
        pae.init(pae.nnx(NnxInteger, jnp.zeros((1, 4))), jax.random.key(0))


# How a model is told that it trains


class Train(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dropout(0.5)(nn.Dense(16)(x), deterministic=not train)


class Training(nn.Module):
    @nn.compact
    def __call__(self, x, training=False):
        return nn.Dropout(0.5)(nn.Dense(16)(x), deterministic=not training)


class IsTraining(nn.Module):
    @nn.compact
    def __call__(self, x, *, is_training):
        return nn.Dropout(0.5)(nn.Dense(16)(x), deterministic=not is_training)


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, scale=1.0, deterministic=False):
        return scale * nn.Dropout(0.5)(nn.Dense(16)(x), deterministic=deterministic)


class UseRunningAverage(nn.Module):
    @nn.compact
    def __call__(self, x, use_running_average=None):
        return nn.BatchNorm(momentum=0.5)(nn.Dense(16)(x), use_running_average=use_running_average)


class TwoModes(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True, use_running_average=True):
        x = nn.BatchNorm(momentum=0.5)(nn.Dense(16)(x), use_running_average=use_running_average)
        return nn.Dropout(0.5, deterministic=deterministic)(x)


class TwoModesByName(nn.Module):
    @nn.compact
    def __call__(self, x, scale=1.0, *, training, deterministic):
        x = nn.BatchNorm(momentum=0.5)(nn.Dense(16)(x), use_running_average=not training)
        return scale * nn.Dropout(0.5, deterministic=deterministic)(x)


class NnxTwoModes(nnx.Module):
    def __init__(self, width, rngs):
        self.dense, self.dropout = nnx.Linear(4, 16, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.5, rngs=rngs)

    def __call__(self, x, use_running_average=True, *, deterministic=True):
        return self.dropout(
            self.norm(self.dense(x), use_running_average=use_running_average), deterministic=deterministic
        )


class NnxTrain(nnx.Module):
    def __init__(self, width, rngs):
        self.dense, self.dropout = nnx.Linear(4, 16, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, train):
        return self.dropout(self.dense(x), deterministic=not train)


class NnxModes(nnx.Module):
    """No word for it: `.train()` and `.eval()` of the module."""

    def __init__(self, width, rngs):
        self.dense, self.dropout = nnx.Linear(4, 16, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.dense(x)))


TOLD = {
    "train": pae.linen(lambda width: Train(), VECTOR),
    "training": pae.linen(lambda width: Training(), VECTOR),
    "is_training, by name only": pae.linen(lambda width: IsTraining(), VECTOR),
    "deterministic": pae.linen(lambda width: Deterministic(), VECTOR),
    "use_running_average": pae.linen(lambda width: UseRunningAverage(), VECTOR),
    "remat, train static": pae.linen(lambda width: nn.remat(Train, static_argnums=(2,))(), VECTOR),
    "two": pae.linen(lambda width: TwoModes(), VECTOR),
    "two, remat, both static": pae.linen(lambda width: nn.remat(TwoModes, static_argnums=(2, 3))(), VECTOR),
    "two, by name only": pae.linen(lambda width: TwoModesByName(), VECTOR),
    "NNX two": pae.nnx(NnxTwoModes, VECTOR),
    "NNX train": pae.nnx(NnxTrain, VECTOR),
    "NNX modes": pae.nnx(NnxModes, VECTOR),
}


@pytest.mark.parametrize("name", TOLD)
def test_a_model_is_told_that_it_trains_by_whatever_it_calls_it(name, assert_same):
    net, x = TOLD[name], batch_of(VECTOR)[0]
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=None, key=jax.random.key(1))
    ts = pae.TrainState.create(net, state, "a", tx=optax.sgd(0.1), key=jax.random.key(2))
    told, updates = jax.jit(lambda ts: ts.apply_fn(ts.params, x, train=True))(ts)
    quiet, none = jax.jit(lambda ts: ts.apply_fn(ts.params, x))(ts)
    weights = flatten(state.shared)
    weights = weights.get("Dense_0/kernel", weights.get("dense/kernel"))
    np.testing.assert_allclose(quiet, x @ np.asarray(weights), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(pae.predict(net, state, "a", x), quiet, rtol=1e-5, atol=1e-5)
    assert none == {}
    if name == "use_running_average":
        np.testing.assert_allclose(np.asarray(told).mean(0), 0, atol=1e-5)
    else:
        assert 0.3 < (np.asarray(told) == 0).mean() < 0.7
    if name in ("use_running_average", "NNX modes") or "two" in name:
        before, after = (jax.tree.leaves(tree["batch_stats"]) for tree in (state.tasks["a"].local, updates["backbone"]))
        assert all((np.asarray(old) != np.asarray(new)).any() for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("name", [name for name in TOLD if "two" in name])
def test_fit_moves_the_statistics_of_a_model_with_two_modes_and_drops_out(name, quick_fit):
    net, (x, y) = TOLD[name], batch_of(VECTOR)
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=None, key=jax.random.key(1))
    dropped = lambda out, y: (out == 0).mean() + 0 * out.sum()  # noqa: E731
    fitted, history = quick_fit(state, "a", (x, y), net=net, batch_size=6, loss=dropped)
    assert 0.3 < history.rows[-1]["loss"] < 0.7
    before, after = (flatten(one.tasks["a"].local["batch_stats"]) for one in (state, fitted))
    assert all((before[path] != after[path]).any() for path in before)


PLAIN = {
    "Sequential": pae.linen(lambda width: nn.Sequential([nn.Dense(int(8 * width)), nn.relu]), VECTOR),
    "one layer": pae.linen(lambda width: nn.Dense(8), VECTOR),
    "NNX layer": pae.nnx(lambda width, rngs: nnx.Linear(4, 8, rngs=rngs), VECTOR),
    "NNX Sequential": pae.nnx(lambda width, rngs: nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.relu), VECTOR),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_model_without_a_word_for_training_is_called_without(name, quick_fit, assert_same):
    net, (x, y) = PLAIN[name], batch_of(VECTOR)
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=3, key=jax.random.key(1))
    state, _ = quick_fit(state, "a", (x, y), net=net, batch_size=6)
    state = pae.freeze(pae.prune(state, "a", 0.5), "a")
    before = pae.predict(net, state, "a", x)
    state, _ = quick_fit(
        pae.pack(net, state, "b", head=3, key=jax.random.key(2)), "b", (x, 2 - y), net=net, batch_size=6
    )
    assert_same(pae.predict(net, state, "a", x), before)


class NnxSequenceHead(nnx.Module):
    """Dropout and a norm that only `.eval()` of the whole turns off."""

    def __init__(self, rngs):
        self.body = nnx.Sequential(
            nnx.Dropout(0.5, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
        )

    def __call__(self, x):
        return self.body(x)


def test_modes_of_an_nnx_head_are_set_too(quick_fit):
    net, x = PLAIN["NNX layer"], batch_of(VECTOR)[0]
    head = NnxSequenceHead(nnx.Rngs(0))
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=head, key=jax.random.key(1))
    state, _ = quick_fit(state, "a", (x, np.arange(12) % 2), net=net, batch_size=6)
    thrice = np.asarray(pae.predict(net, state, "a", np.repeat(x[:1], 3, 0)))
    np.testing.assert_array_equal(thrice[1:], thrice[:1].repeat(2, 0))
    np.testing.assert_allclose(pae.predict(net, state, "a", x)[:1], thrice[:1], rtol=1e-5)


# Called otherwise, several inputs, several outputs


class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, picture, words, *, mode):
        x = nn.Dense(8)(picture) + nn.Embed(7, 8)(words).mean(axis=1)
        return nn.Dropout(0.5, deterministic=mode == "eval")(x)


class NnxTwoInputs(nnx.Module):
    def __init__(self, width, rngs):
        self.dense, self.embed = nnx.Linear(4, 8, rngs=rngs), nnx.Embed(7, 8, rngs=rngs)

    def encode(self, picture, words):
        return self.dense(picture) + self.embed(words).mean(axis=1)


BOTH = {"picture": VECTOR, "words": TOKENS}
CALLED = {
    "Linen": lambda: pae.linen(
        lambda width: TwoInputs(),
        BOTH,
        call=lambda module, x, train: module(x["picture"], x["words"], mode="train" if train else "eval"),
    ),
    "NNX": lambda: pae.nnx(NnxTwoInputs, BOTH, call=lambda module, x, train: module.encode(x["picture"], x["words"])),
}


@pytest.mark.parametrize("kind", CALLED)
def test_call_says_how_a_model_is_called(kind, quick_fit, assert_same):
    net, (x, y) = CALLED[kind](), batch_of(BOTH)
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=3, key=jax.random.key(1))
    trained, _ = quick_fit(state, "a", (x, y), net=net, batch_size=6)
    for old, new in zip(*map(jax.tree.leaves, (state.shared, trained.shared)), strict=True):
        assert (np.asarray(old) != np.asarray(new)).any()
    frozen = pae.freeze(pae.prune(trained, "a", 0.5), "a")
    before = pae.predict(net, frozen, "a", x)
    later, _ = quick_fit(pae.pack(net, frozen, "b", head=3, key=jax.random.key(2)), "b", (x, y), net=net, batch_size=6)
    assert_same(pae.predict(net, later, "a", x), before)


class Pyramid(nn.Module):
    width: float

    @nn.compact
    def __call__(self, x, train):
        fine = nn.relu(nn.Conv(int(4 * self.width), (3, 3))(x))
        return {"fine": fine, "coarse": (nn.relu(nn.Conv(4, (3, 3), 2)(fine)), x.mean(axis=(1, 2)))}


class Detector(nn.Module):
    @nn.compact
    def __call__(self, features):
        coarse, mean = features["coarse"]
        boxes = nn.Dense(4)(coarse).mean(axis=(1, 2))
        return {"boxes": boxes, "class": nn.Dense(3)(jnp.concatenate([features["fine"].mean(axis=(1, 2)), mean], -1))}


def test_features_and_outputs_may_be_trees(quick_fit, assert_same):
    net, (x, y) = pae.linen(Pyramid, IMAGE), batch_of(IMAGE)
    labels = {"class": y, "boxes": np.ones((12, 4), np.float32)}

    def loss(out, y):
        of_class = optax.softmax_cross_entropy_with_integer_labels(out["class"], y["class"])
        return of_class + ((out["boxes"] - y["boxes"]) ** 2).mean(-1)

    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=Detector(), key=jax.random.key(1))
    options = {"net": net, "loss": loss, "batch_size": 6}
    trained, history = quick_fit(state, "a", (x, labels), epochs=10, **options)
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]
    state = pae.freeze(pae.prune(trained, "a", 0.5), "a")
    before = pae.predict(net, state, "a", x)
    assert jax.tree.map(jnp.shape, before) == {"boxes": (12, 4), "class": (12, 3)}
    found = pae.features(net, state, "a", x)
    assert jax.tree.map(jnp.shape, found) == {"fine": (12, 6, 6, 4), "coarse": ((12, 3, 3, 4), (12, 2))}
    wide = pae.expand(net, state, width=1.5, key=jax.random.key(3))
    later, _ = quick_fit(pae.pack(net, wide, "b", head=Detector(), key=jax.random.key(2)), "b", (x, labels), **options)
    for after in (state, wide, later):
        assert_same(pae.predict(net, after, "a", x), before)
    with pytest.raises(pae.StructureError, match="head"):
        pae.pack(net, state, "c", head=2, key=jax.random.key(2))


class Lengths(nn.Module):
    width: float

    @nn.compact
    def __call__(self, batch, train):
        return (nn.Embed(7, 6)(batch["ids"]) * batch["mask"][..., None]).sum(1) @ self.param(
            "out", nn.initializers.ones, (6, 3)
        )


def test_free_axes_may_have_any_size_and_others_may_not(quick_fit, assert_same):
    def batch(length, seed=0):
        draw = np.random.default_rng(seed)
        return {"ids": draw.integers(0, 7, (8, length)).astype(np.int32), "mask": np.ones((8, length), np.float32)}

    y = np.arange(8) % 2
    net = pae.linen(Lengths, batch(5), free_axes=(1,))
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
    state, _ = quick_fit(state, "a", [(batch(5), y), (batch(9), y), (batch(5, 1), y)], net=net)
    for length in (1, 5, 12):
        padded = {name: np.pad(leaf, ((0, 0), (0, 3))) for name, leaf in batch(length).items()}
        one, other = (np.asarray(pae.predict(net, state, "a", x)) for x in (batch(length), padded))
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    fixed = pae.linen(Lengths, batch(5), free_axes={"ids": (1,)})
    state = pae.pack(fixed, pae.init(fixed, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
    with pytest.raises(
        pae.StructureError, match=r"input, leaf 'mask': found float32\[8,9\], expected float32\[batch,5\]"
    ):
        pae.predict(fixed, state, "a", batch(9))


# Random numbers, neighbours and what is sown


class Noise(nn.Module):
    only_in_training: bool = False

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(8)(x)
        if self.only_in_training and not train:
            return x
        return x + jax.random.normal(self.make_rng("noise"), x.shape[1:])[None]


class NnxNoise(nnx.Module):
    def __init__(self, width, rngs):
        self.dense, self.rngs = nnx.Linear(4, 8, rngs=rngs), rngs.fork() if hasattr(rngs, "fork") else rngs

    def __call__(self, x):
        return self.dense(x) + jax.random.normal(self.rngs.noise(), (1, 8))


def test_a_model_that_draws_random_numbers_in_evaluation_is_refused_with_what_to_say():
    net = pae.linen(lambda width: Noise(), VECTOR)
    with pytest.raises(
        pae.StructureError,
        match=r'Noise: found a random number drawn in evaluation .*pae.linen\(..., rngs=\("noise",\)\)',
    ):
        pae.init(net, jax.random.key(0))
    net = pae.nnx(NnxNoise, VECTOR)
    with pytest.raises(pae.StructureError, match="an answer that depends on random numbers in evaluation"):
        pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))


def test_named_streams_draw_from_one_key_in_evaluation_and_from_the_steps_key_in_training(quick_fit, assert_same):
    net, (x, y) = pae.linen(lambda width: Noise(), VECTOR, rngs=("noise",)), batch_of(VECTOR)
    assert net.rngs == ("noise",)
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=3, key=jax.random.key(1))
    assert_same(pae.predict(net, state, "a", x), pae.predict(net, state, "a", x))
    losses = [quick_fit(state, "a", [(x, y)], net=net, epochs=1, key=key)[1].rows[0]["loss"] for key in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    quiet = pae.linen(lambda width: Noise(True), VECTOR, rngs=("noise",))
    state = pae.pack(quiet, pae.init(quiet, jax.random.key(0)), "a", head=None, key=jax.random.key(1))
    ts = pae.TrainState.create(quiet, state, "a", tx=optax.sgd(0.1))
    one, two, other = (
        ts.apply_fn(ts.params, x, train=True, rngs={"noise": jax.random.key(key), "dropout": jax.random.key(9)})[0]
        for key in (1, 1, 2)
    )
    assert_same(one, two)
    assert (one != other).any()
    assert (one != ts.apply_fn(ts.params, x)[0]).any()


class OfTheBatch(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x))


@pytest.mark.parametrize("part", ["backbone", "head"])
def test_a_model_whose_answer_depends_on_its_neighbours_is_refused_at_pack_unless_that_is_wanted(
    part, net, empty, quick_fit, assert_same
):
    x, y = batch_of(VECTOR)
    coupled = pae.linen(lambda width: OfTheBatch(), VECTOR)
    call = {
        "backbone": lambda: pae.pack(coupled, pae.init(coupled, jax.random.key(0)), "a", head=3, key=jax.random.key(1)),
        "head": lambda: pae.pack(net, empty, "a", head=OfTheBatch(), key=jax.random.key(1)),
    }[part]
    with pytest.raises(
        pae.StructureError,
        match=r"depends on the other examples of the batch, expected one that does not.*couples_examples=True",
    ):
        call()
    wanted = pae.linen(lambda width: OfTheBatch(), VECTOR, couples_examples=True)
    head = 3 if part == "backbone" else OfTheBatch()
    state = pae.pack(wanted, pae.init(wanted, jax.random.key(0)), "a", head=head, key=jax.random.key(1))
    state, _ = quick_fit(state, "a", (x, y), net=wanted, batch_size=6)
    state = pae.freeze(pae.prune(state, "a", 0.5), "a")
    before = pae.predict(wanted, state, "a", x)
    later, _ = quick_fit(
        pae.pack(wanted, state, "b", head=3, key=jax.random.key(2)), "b", (x, y), net=wanted, batch_size=6
    )
    assert_same(pae.predict(wanted, later, "a", x), before)


class ImaginaryOfTheBatch(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Dense(8)(x)
        return jax.lax.complex(h, h - h.mean(0, keepdims=True))


def test_a_dependence_on_neighbours_in_the_imaginary_part_alone_is_refused():
    net = pae.linen(lambda width: ImaginaryOfTheBatch(), VECTOR)
    with pytest.raises(pae.StructureError, match="depends on the other examples of the batch"):
        pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=None, key=jax.random.key(1))


class PerExample(nn.Module):
    """Keeps a value for each example of a batch from call to call."""

    @nn.compact
    def __call__(self, x, train):
        carry = self.variable("carry", "h", lambda: jnp.zeros((x.shape[0], 8)))
        h = nn.Dense(8)(x) + 0.5 * carry.value
        if train:
            carry.value = h
        return h


def test_a_variable_shaped_by_the_batch_is_refused_by_name_at_init():
    net = pae.linen(lambda width: PerExample(), VECTOR)
    with pytest.raises(
        pae.StructureError,
        match=r"leaf 'carry/h': found float32\[1,8\] for one batch and float32\[2,8\] for a larger one",
    ):
        pae.init(net, jax.random.key(0))


class Sows(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        h = nn.Dense(8)(x)
        self.sow("intermediates", "h", h)
        self.sow("losses", "size", (h**2).mean())
        return nn.BatchNorm(use_running_average=not train, momentum=0.5)(h)


class NnxSows(nnx.Module):
    def __init__(self, width, rngs):
        self.dense, self.norm = nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, momentum=0.5, rngs=rngs)

    def __call__(self, x):
        h = self.dense(x)
        with warnings.catch_warnings():  # Flax wants nnx.capture now, and other models may not have heard of it
            warnings.simplefilter("ignore", DeprecationWarning)
            self.sow(nnx.Intermediate, "h", h)
        return self.norm(h)


SOWING = {
    "Linen": (lambda: pae.linen(lambda width: Sows(), VECTOR), {"intermediates", "losses", "batch_stats"}),
    "NNX": (lambda: pae.nnx(NnxSows, VECTOR), {"Intermediate", "batch_stats"}),
}


@pytest.mark.parametrize("kind", SOWING)
def test_what_a_model_sows_comes_with_the_updates_and_is_no_variable_of_the_task(kind, quick_fit, assert_same):
    make, collections = SOWING[kind]
    net, (x, y) = make(), batch_of(VECTOR)
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=3, key=jax.random.key(1))
    assert set(state.tasks["a"].local) == {"params", "batch_stats"}
    ts = pae.TrainState.create(net, state, "a", tx=optax.sgd(0.1))
    _, updates = ts.apply_fn(ts.params, x, train=True)
    assert set(updates["backbone"]) == collections
    (sown,) = (leaf for leaf in jax.tree.leaves(updates["backbone"]) if leaf.shape == (12, 8))
    kernel = jax.tree.leaves(state.shared)[0]
    np.testing.assert_allclose(sown, x @ np.asarray(kernel), rtol=1e-4, atol=1e-5)
    trained, _ = quick_fit(state, "a", (x, y), net=net, batch_size=6)
    frozen = pae.freeze(pae.prune(trained, "a", 0.5), "a")
    before = pae.predict(net, frozen, "a", x)
    later, _ = quick_fit(pae.pack(net, frozen, "b", head=3, key=jax.random.key(2)), "b", (x, y), net=net, batch_size=6)
    assert_same(pae.predict(net, later, "a", x), before)
    pae.check(later, net)


class Stacked(nnx.Module):
    """Three layers stacked by vmap and run by scan, each with its own stream of dropout."""

    def __init__(self, width, rngs):
        self.layers = nnx.split_rngs(splits=3)(nnx.vmap(StackedBlock, in_axes=0, out_axes=0))(rngs)

    def __call__(self, x, train):
        run = nnx.scan(lambda x, layer: layer(x, train), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return run(x, self.layers)


class StackedBlock(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.dropout = nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x, train):
        return self.dropout(self.dense(x), deterministic=not train)


def test_stacked_nnx_layers_draw_dropout_each_from_a_key_of_its_own(quick_fit, assert_same):
    net, (x, y) = pae.nnx(Stacked, VECTOR), batch_of(VECTOR)
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=3, key=jax.random.key(1))
    losses = [quick_fit(state, "a", [(x, y)], net=net, epochs=1, key=key)[1].rows[0]["loss"] for key in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    assert_same(pae.predict(net, state, "a", x), pae.predict(net, state, "a", x))


def test_what_build_returns_must_be_a_module_of_the_adapters_kind():
    for net, message in (
        (
            pae.linen(lambda width: NnxModes(width, nnx.Rngs(0)), jnp.zeros((1, 4))),
            "found NnxModes.*For NNX modules use pae.nnx",
        ),
        (pae.nnx(lambda width, rngs: nn.Dense(3), jnp.zeros((1, 4))), "found Dense.*For Linen modules use pae.linen"),
        (pae.linen(lambda width: None, jnp.zeros((1, 4))), "found NoneType"),
    ):
        with pytest.raises(pae.StructureError, match=message):
            pae.init(net, jax.random.key(0))


@pytest.mark.parametrize("adapter", [pae.linen, pae.nnx], ids=["linen", "nnx"])
@pytest.mark.parametrize("sample", [np.float32(1), {}, None, {"a": np.zeros((1, 2)), "b": np.zeros(())}], ids=str)
def test_a_sample_without_a_batch_axis_is_refused(adapter, sample):
    with pytest.raises(pae.StructureError, match=r"sample: found .*, expected arrays with a leading batch axis"):
        adapter(lambda width, **rngs: None, sample)


def test_a_sample_may_be_abstract_or_of_64_bits(assert_same):
    kernels = []
    for sample in (jnp.zeros((1, 4)), jax.ShapeDtypeStruct((7, 4), jnp.float32), np.zeros((2, 4)), [[0.0] * 4]):
        if isinstance(sample, list):
            sample = np.asarray(sample)
        net = pae.linen(lambda width: pae.models.MLP(width, (3,)), sample)
        assert net.sample.dtype == jnp.float32
        kernels.append(pae.init(net, jax.random.key(0)).shared)
    for other in kernels[1:]:
        assert_same(other, kernels[0])


class Whitened(nn.Module):
    """Scales that its first batch chooses, as in the activation norm of a flow."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x * self.param("scale", lambda key: 1 / (x.std(0, keepdims=True) + 1e-6)))


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["NumPy", "JAX"])
def test_initial_values_that_a_model_takes_from_its_inputs_are_those_of_the_sample(array):
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    state = pae.init(pae.linen(lambda width: Whitened(), array(x)), jax.random.key(0))
    np.testing.assert_allclose(state.local["params"]["scale"], 1 / x.std(0, keepdims=True), rtol=1e-4)
