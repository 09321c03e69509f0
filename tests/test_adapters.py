"""Any user model works under both adapters, or is refused by name at init."""

import functools

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
    later = pae.pack(net, state, "b", head=3, key=jax.random.key(2))
    later, _ = quick_fit(later, "b", (x, 2 - y), net=net, optimizer=tx, batch_size=6, opt_state=history.opt_state)
    for path, w in flatten(later.shared).items():
        assert (np.asarray(w) != np.asarray(flatten(state.shared)[path])).any(), path
    assert_same(pae.predict(net, later, "a", x), before)
    assert_same(later.tasks["a"].local, state.tasks["a"].local)
    pae.verify(later)
    pae.check(later)


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
    state, _ = quick_fit(pae.pack(own, state, "b", head=2, key=jax.random.key(2), reclaim_init="fresh"), "b", net=own)
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


def tuple_of_features(self, x):
    return nn.Dense(3)(x), x


def dict_of_features(self, x):
    return {"features": nn.Dense(3)(x)}


def scalar_features(self, x):
    return nn.Dense(3)(x).sum()


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
    tuple_of_features: r"expected one array of features \(batch, ...\)",
    dict_of_features: r"expected one array of features \(batch, ...\)",
    scalar_features: r"expected one array of features \(batch, ...\)",
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


class NoTrain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


class NnxNoTrain(nnx.Module):
    def __init__(self, width, rngs):
        self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.dense(x)


def test_a_model_that_is_not_called_with_train_is_refused_with_what_to_add():
    for net in (pae.linen(lambda width: NoTrain(), jnp.zeros((1, 4))), pae.nnx(NnxNoTrain, jnp.zeros((1, 4)))):
        with pytest.raises(
            pae.StructureError, match=r"NoTrain.__call__ without a train argument.*Add `train: bool` to __call__"
        ):
            pae.init(net, jax.random.key(0))


def test_what_build_returns_must_be_a_module_of_the_adapters_kind():
    for net, message in (
        (
            pae.linen(lambda width: NnxNoTrain(width, nnx.Rngs(0)), jnp.zeros((1, 4))),
            "found NnxNoTrain.*For NNX modules use pae.nnx",
        ),
        (pae.nnx(lambda width, rngs: NoTrain(), jnp.zeros((1, 4))), "found NoTrain.*For Linen modules use pae.linen"),
        (pae.linen(lambda width: None, jnp.zeros((1, 4))), "found NoneType"),
    ):
        with pytest.raises(pae.StructureError, match=message):
            pae.init(net, jax.random.key(0))


@pytest.mark.parametrize("adapter", [pae.linen, pae.nnx], ids=["linen", "nnx"])
@pytest.mark.parametrize("sample", [np.float32(1), {}, None, {"a": np.zeros((1, 2)), "b": np.zeros(())}], ids=str)
def test_a_sample_without_a_batch_axis_is_refused(adapter, sample):
    with pytest.raises(pae.StructureError, match=r"sample: found .*, expected arrays with a leading batch axis"):
        adapter(pae.models.MLP, sample)


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
