"""How a model is called: its mode, its mapped axes, and what it needs besides x."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import pae_jax as pae

VECTOR = np.zeros((1, 4), np.float32)
X = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)


def packed(net, head=None):
    return pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=head, key=jax.random.key(1))


class Replicated(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=not train, momentum=0.5, axis_name="replica")(nn.Dense(3)(x))


class NnxReplicated(nnx.Module):
    def __init__(self, width, rngs):
        self.dense = nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, momentum=0.5, axis_name="replica", rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(x))


class Centred(nn.Module):
    """Uses the mapped axis in evaluation too."""

    @nn.compact
    def __call__(self, x, train):
        mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(3))
        h = nn.Dense(3)(x)
        seen = jax.lax.pmean(h.mean(0), "replica")
        if train:
            mean.value = seen
        return h - mean.value[None]


REPLICATED = {
    "Linen": lambda: pae.linen(lambda width: Replicated(), VECTOR),
    "NNX": lambda: pae.nnx(NnxReplicated, VECTOR),
    "pmean": lambda: pae.linen(lambda width: Centred(), VECTOR),
}


@pytest.mark.parametrize("kind", REPLICATED)
def test_statistics_are_of_all_replicas_of_a_users_loop_also_after_a_call_outside_of_it(kind):
    net = REPLICATED[kind]()
    ts = pae.TrainState.create(net, packed(net), "a", tx=optax.sgd(0.1))

    def means(x):
        statistics = ts.apply_fn(ts.params, x, train=True)[1]["backbone"]["batch_stats"]
        return next(leaf for path, leaf in jax.tree_util.tree_leaves_with_path(statistics) if "mean" in str(path))

    alone = means(X[:6])
    both = jax.vmap(means, axis_name="replica")(X.reshape(2, 6, 4))
    np.testing.assert_array_equal(both[0], both[1])
    assert (np.abs(both[0] - alone) > 1e-3).any()
    np.testing.assert_allclose(both[0], means(X), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(means(X[:6]), alone)


def with_mode(name, training):
    """Return a Linen model with a norm and dropout whose mode is an argument of this name."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, **flags):
            train = flags[name] is training
            x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(64)(x))
            return nn.Dropout(0.5, deterministic=not train)(x)

    scope = {"whole": Model.__call__}
    exec(f"def call(self, x, {name}={not training}): return whole(self, x, {name}={name})", scope)
    Model.__call__ = scope["call"]
    return pae.linen(lambda width: Model(), VECTOR)


@pytest.mark.parametrize("name", ["is_train", "enable_dropout", "update_stats", "inference", "eval_mode", "is_eval"])
def test_a_mode_is_set_by_other_common_names_too(name):
    net = with_mode(name, training=name in ("is_train", "enable_dropout", "update_stats"))
    state = packed(net)
    ts = pae.TrainState.create(net, state, "a", tx=optax.sgd(0.1), key=jax.random.key(0))
    out, updates = ts.apply_fn(ts.params, X, train=True)
    assert 0.3 < (np.asarray(out) == 0).mean() < 0.7
    old, new = (jax.tree.leaves(tree["batch_stats"]) for tree in (state.tasks["a"].local, updates["backbone"]))
    assert all((np.asarray(a) != np.asarray(b)).any() for a, b in zip(old, new, strict=True))
    assert (np.asarray(ts.apply_fn(ts.params, X)[0]) != 0).all()


class NnxLearning(nnx.Module):
    def __init__(self, width, rngs):
        self.dense, self.norm = nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x, learning=False):
        return self.norm(self.dense(x), use_running_average=not learning)


class Learning(nn.Module):
    @nn.compact
    def __call__(self, x, learning=False):
        return nn.BatchNorm(use_running_average=not learning)(nn.Dense(3)(x))


UNKNOWN = {
    "Learning": lambda **options: pae.linen(lambda width: Learning(), VECTOR, **options),
    "NnxLearning": lambda **options: pae.nnx(NnxLearning, VECTOR, **options),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_statistics_that_stay_while_a_flag_of_the_call_is_not_set_are_refused_in_training(name, quick_fit):
    make = UNKNOWN[name]
    net, batch = make(), (X, np.arange(12) % 3)
    message = rf"{name}: found batch_stats that training does not change.*'learning'.*module\(x, learning=train\)"
    with pytest.raises(pae.StructureError, match=message):
        quick_fit(packed(net), "a", batch, net=net, batch_size=6)
    for call in (lambda module, x, train: module(x, learning=train), lambda module, x, train: module(x)):
        net = make(call=call)
        quick_fit(packed(net), "a", batch, net=net, batch_size=6)


class FlagOfNoMode(nn.Module):
    @nn.compact
    def __call__(self, x, train, return_all=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))
        return (x, x) if return_all else x


def test_a_flag_that_is_no_mode_is_left_alone(quick_fit):
    net = pae.linen(lambda width: FlagOfNoMode(), VECTOR)
    quick_fit(packed(net), "a", (X, np.arange(12) % 3), net=net, batch_size=6)


class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, x, t, train=False):
        return nn.Dense(3)(x + t)


class NnxTwoInputs(nnx.Module):
    def __init__(self, width, rngs):
        self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x, *, t):
        return self.dense(x + t)


@pytest.mark.parametrize(
    ("kind", "sample", "hint"),
    [
        ("linen", (VECTOR, VECTOR), r"module\(\*x, train=train\)"),
        ("linen", {"x": VECTOR, "t": VECTOR}, r"module\(\*\*x, train=train\)"),
        ("nnx", {"x": VECTOR, "t": VECTOR}, r"module\(\*\*x\)"),
    ],
)
def test_a_model_that_needs_a_second_input_is_refused_at_init_with_how_to_call_it(kind, sample, hint):
    adapter, build = {"linen": (pae.linen, lambda width: TwoInputs()), "nnx": (pae.nnx, NnxTwoInputs)}[kind]
    net = adapter(build, sample)
    with pytest.raises(
        pae.StructureError, match=rf"TwoInputs: found a call that also needs t.*call=lambda module, x, train: {hint}"
    ):
        pae.init(net, jax.random.key(0))
