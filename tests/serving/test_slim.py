"""`slim`: the function of a task on fewer channels, and every channel that is left has an effect."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import pae_jax as pae
from pae_jax.trees import flatten
from pae_jax.widening import Cuts


class Residual(nn.Module):
    """Two branches that add up, norms, pooling, a flatten, a gated layer and an attention over the positions."""

    width: float = 1.0

    @nn.compact
    def __call__(self, x, train):
        def conv(x, size):
            x = nn.Conv(size, (3, 3), use_bias=False)(x)
            return nn.BatchNorm(use_running_average=not train)(x)

        size = int(8 * self.width)
        x = nn.relu(conv(x, size))
        x = nn.relu(x + conv(nn.relu(conv(x, size)), size))
        x = jnp.concatenate([nn.max_pool(x, (2, 2), (2, 2)), nn.avg_pool(x, (2, 2), (2, 2))], -1)
        tokens = nn.LayerNorm()(nn.Dense(6)(x.reshape(x.shape[0], 4, -1)))
        tokens = tokens + nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=16)(tokens)
        return nn.silu(nn.Dense(size)(tokens.reshape(x.shape[0], -1)))


class Nnx(nnx.Module):
    def __init__(self, width, rngs):
        self.first = nnx.Linear(4, int(8 * width), rngs=rngs)
        self.norm = nnx.BatchNorm(int(8 * width), rngs=rngs)
        self.second = nnx.Linear(int(8 * width), int(6 * width), rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.second(nnx.relu(self.norm(self.first(x)))))


def frozen(net, channels=0.5, seed=0, head=3):
    """A frozen task "a" that owns no weight of a share of each layer's input and output channels."""
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=head, key=jax.random.key(1))
    draw = np.random.default_rng(seed)

    def leaf(owner):
        owner = np.array(owner)
        owner[..., draw.random(owner.shape[-1]) < channels] = 0
        owner[..., draw.random(owner.shape[-2]) < channels / 2, :] = 0
        return jnp.asarray(owner)

    owner = jax.tree.map(leaf, state.owner)
    shared = jax.tree.map(lambda w, o: jnp.where(o > 0, w, 0), state.shared, owner)
    entry = state.tasks["a"]
    local = jax.tree.map(lambda v: v + jnp.asarray(0.3 * draw.random(v.shape), v.dtype), entry.local)
    tasks = {"a": entry.replace(local=local)}
    return pae.freeze(state.replace(owner=owner, shared=shared, tasks=tasks), "a")


def shapes(tree):
    return {path: leaf.shape for path, leaf in flatten(tree).items()}


def same_outputs(net, state, small, alone, task, x):
    wanted, found = pae.predict(net, state, task, x), pae.predict(small, alone, task, x)
    assert float(jnp.abs(wanted - wanted[:1]).max()) > 1e-4 or len(x) == 1  # it depends on the input
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(jnp.abs(wanted).max()))


@pytest.fixture(scope="module")
def layers():
    """A net of two layers, of 4 and 3 channels."""
    return pae.linen(lambda width: pae.models.MLP(width, (4, 3)), jnp.zeros((2, 2)))


def by_hand(net, first, second, bias, task="a"):
    """A frozen task of two layers with these kernels and this bias of the first layer."""
    state = pae.pack(net, pae.init(net, jax.random.key(0)), task, head=2, key=jax.random.key(1))
    shared = {"Dense_0": {"kernel": jnp.asarray(first)}, "Dense_1": {"kernel": jnp.asarray(second)}}
    owner = jax.tree.map(lambda w: (w != 0).astype(jnp.int8), shared)
    params = state.tasks[task].local["params"]
    local = {"params": {**params, "Dense_0": {"bias": jnp.asarray(bias, jnp.float32)}}}
    tasks = {task: state.tasks[task].replace(local=local)}
    return pae.freeze(state.replace(shared=shared, owner=owner, tasks=tasks), task)


NETS = {
    "residual": lambda: pae.linen(Residual, jnp.zeros((1, 4, 4, 3))),
    "nnx": lambda: pae.nnx(Nnx, jnp.zeros((2, 4))),
}


@pytest.fixture(scope="module", params=NETS)
def slimmed(request):
    """`(net, state, slimmed net, its state)`."""
    net = NETS[request.param]()
    state = frozen(net)
    return (net, state, *pae.slim(net, state, "a"))


def test_a_slimmed_task_computes_the_tasks_function_on_fewer_numbers(slimmed):
    net, state, small, alone = slimmed
    for rows in (1, 5):
        x = np.random.default_rng(rows).normal(size=(rows, *net.sample.shape[1:])).astype(np.float32)
        same_outputs(net, state, small, alone, "a", x)
    before, after = small.sizes
    assert after < 0.8 * before
    assert after == sum(
        leaf.size for leaf in jax.tree.leaves((alone.shared, alone.tasks["a"].local, alone.tasks["a"].head))
    )


def test_the_slimmed_state_holds_the_task_alone_and_passes_every_check(slimmed, tmp_path, state_facts):
    net, state, small, alone = slimmed
    x = np.random.default_rng(0).normal(size=(6, *net.sample.shape[1:])).astype(np.float32)
    y = np.arange(6) % 3
    assert list(alone.tasks) == ["a"] and alone.tasks["a"].frozen
    pae.check(alone, small)
    pae.verify(alone)
    pae.save(tmp_path / "stage", alone)
    assert state_facts(pae.load(small, tmp_path / "stage")) == state_facts(alone)
    pae.write_bundle(tmp_path / "bundle", small, alone)
    bundled = pae.read_bundle(small, tmp_path / "bundle")
    wanted = pae.predict(small, alone, "a", x)
    assert (pae.predict(small, bundled, "a", x) == wanted).all()
    assert pae.evaluate(small, alone, "a", (x, y))["accuracy"] == pae.evaluate(net, state, "a", (x, y))["accuracy"]
    program = pae.export(small, alone, "a")
    for rows in (1, 6):
        np.testing.assert_allclose(program.call(x[:rows]), wanted[:rows], rtol=1e-4, atol=1e-5)
    module, variables = pae.as_flax(small, alone, "a")
    np.testing.assert_allclose(module.apply(variables, x, train=False), wanted, rtol=1e-4, atol=1e-5)


def test_slimming_again_cuts_nothing(slimmed):
    _, _, small, alone = slimmed
    again, same = pae.slim(small, alone, "a")
    assert again.cuts == ()
    assert shapes(same.shared) == shapes(alone.shared)


def test_a_slimmed_net_says_what_was_cut(slimmed):
    net, _, small, alone = slimmed
    before, after = flatten(net.layout(1.0).shared), flatten(alone.shared)
    cuts = {cut.path: (cut.before, cut.after) for cut in small.cuts}
    for path in after:
        assert cuts.get(f"params/{path}", (after[path].shape,) * 2) == (before[path].shape, after[path].shape)
    assert f"{small.sizes[1]:,} of {small.sizes[0]:,} numbers" in repr(small)
    assert all((cut.path in str(small)) == (len(cut.before) > 1) for cut in small.cuts)


def test_a_channel_without_readers_is_cut_from_every_layer_and_so_are_those_that_feed_it_alone():
    net = pae.linen(lambda width: pae.models.MLP(width, (4, 3, 3)), jnp.zeros((1, 2)))
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
    owner = {name: {"kernel": np.array(leaf["kernel"])} for name, leaf in state.owner.items()}
    owner["Dense_2"]["kernel"][1] = 0  # nobody reads the second channel of the second layer
    owner["Dense_1"]["kernel"][3, [0, 2]] = 0  # so nobody needs the last of the first
    owner = jax.tree.map(jnp.asarray, owner)
    shared = jax.tree.map(lambda w, o: jnp.where(o > 0, jnp.abs(w), 0), state.shared, owner)
    state = pae.freeze(state.replace(shared=shared, owner=owner), "a")
    small, alone = pae.slim(net, state, "a")
    assert shapes(alone.shared) == {"Dense_0/kernel": (2, 3), "Dense_1/kernel": (3, 2), "Dense_2/kernel": (2, 3)}
    assert shapes(alone.tasks["a"].local["params"]) == {
        "Dense_0/bias": (3,),
        "Dense_1/bias": (2,),
        "Dense_2/bias": (3,),
    }
    same_outputs(net, state, small, alone, "a", np.random.default_rng(0).random((4, 2)).astype(np.float32))


@pytest.mark.parametrize(("bias", "left"), [(-0.3, 3), (0.0, 3), (0.3, 4)])
def test_a_channel_without_inputs_is_cut_only_if_its_constant_is_zero(layers, bias, left):
    first = np.ones((2, 4), np.float32)
    first[:, 1] = 0
    state = by_hand(layers, first, np.ones((4, 3), np.float32), [0.1, bias, 0.2, 0.3])
    small, alone = pae.slim(layers, state, "a")
    assert shapes(alone.shared) == {"Dense_0/kernel": (2, left), "Dense_1/kernel": (left, 3)}
    same_outputs(layers, state, small, alone, "a", np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32))


def test_every_hidden_channel_that_is_left_has_an_effect(layers):
    state = frozen(layers)
    small, alone = pae.slim(layers, state, "a")
    x = np.random.default_rng(0).normal(size=(32, 2)).astype(np.float32)
    wanted = pae.predict(small, alone, "a", x)
    entry, kernel = alone.tasks["a"], alone.shared["Dense_1"]["kernel"]
    assert 1 <= kernel.shape[0] < 4
    for channel in range(kernel.shape[0]):
        without = {**alone.shared, "Dense_1": {"kernel": kernel.at[channel].set(0)}}
        changed = alone.replace(shared=without, tasks={"a": entry})
        assert (pae.predict(small, changed, "a", x) != wanted).any()


def test_nothing_is_cut_from_a_task_that_uses_everything(layers):
    state = frozen(layers, channels=0.0)
    small, alone = pae.slim(layers, state, "a")
    assert small.cuts == () and small.sizes[0] == small.sizes[1]
    assert shapes(alone.shared) == shapes(state.shared)


def test_of_a_layer_that_was_pruned_away_one_channel_stays(layers):
    state = by_hand(layers, np.zeros((2, 4), np.float32), np.ones((4, 3), np.float32), [-1.0] * 4)
    small, alone = pae.slim(layers, state, "a")
    assert shapes(alone.shared)["Dense_0/kernel"] == (2, 1)
    x = np.ones((3, 2), np.float32)
    np.testing.assert_allclose(pae.predict(small, alone, "a", x), pae.predict(layers, state, "a", x), rtol=1e-5)


class Normed(nn.Module):
    width: float = 1.0

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(nn.LayerNorm()(nn.Dense(6)(x)))


def test_the_channels_of_a_layer_norm_stay():
    """A channel that is always 0 counts in the mean and the variance of the others."""
    net = pae.linen(Normed, jnp.zeros((1, 4)))
    state = frozen(net, channels=0.0)
    kernel = state.shared["Dense_0"]["kernel"].at[:, 2].set(0)
    unowned = state.owner["Dense_0"]["kernel"].at[:, 2].set(0)
    shared, owner = ({**t, "Dense_0": {"kernel": k}} for t, k in ((state.shared, kernel), (state.owner, unowned)))
    digests = jnp.zeros(state.tasks["a"].digests.shape, bool)
    tasks = {"a": state.tasks["a"].replace(digests=digests)}
    state = pae.freeze(state.replace(shared=shared, owner=owner, tasks=tasks), "a")
    small, alone = pae.slim(net, state, "a")
    assert small.cuts == ()
    same_outputs(net, state, small, alone, "a", np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32))


class Tokens(nn.Module):
    """Sequences of any length, and a loop, which is kept whole."""

    width: float = 1.0

    @nn.compact
    def __call__(self, x, train):
        x = nn.Embed(9, 6)(x)
        x = x + nn.Dense(6)(nn.gelu(nn.Dense(int(8 * self.width))(x)))
        return nn.RNN(nn.SimpleCell(4))(x).mean(1)


def test_inputs_of_any_length_stay_free_and_loops_stay_whole():
    net = pae.linen(Tokens, np.arange(6).reshape(1, 6), free_axes=(1,))
    state = frozen(net)
    small, alone = pae.slim(net, state, "a")
    assert flatten(alone.shared)["Dense_0/kernel"].shape[1] < 8
    before, after = shapes(state.shared), shapes(alone.shared)
    assert all(after[path] == before[path] for path in before if "SimpleCell" in path)
    for rows, length in ((2, 6), (1, 3), (3, 11)):
        x = np.random.default_rng(length).integers(0, 9, (rows, length))
        same_outputs(net, state, small, alone, "a", x)


class Pooled(nn.Module):
    """The mean over positions of any number."""

    axes: tuple[int, ...]
    width: float = 1.0

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.relu(nn.Dense(int(8 * self.width))(x))).mean(self.axes)


@pytest.mark.parametrize(("shape", "axes"), [((1, 6, 5), (1,)), ((1, 4, 6, 5), (1, 2))])
def test_a_mean_over_free_axes_is_exported(shape, axes):
    net = pae.linen(lambda width: Pooled(axes, width), np.zeros(shape, np.float32), free_axes=axes)
    state = frozen(net)
    small, alone = pae.slim(net, state, "a")
    assert small.cuts
    program = pae.export(small, alone, "a")
    x = np.random.default_rng(0).normal(size=(3, *[9] * len(axes), 5)).astype(np.float32)
    np.testing.assert_allclose(program.call(x), pae.predict(net, state, "a", x), rtol=1e-4, atol=1e-5)


class Enlarged(nn.Module):
    """Images of twice the height and width, by products whose order depends on which of them is larger."""

    width: float = 1.0

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(int(8 * self.width))(x))
        rows, height, width, channels = x.shape
        return nn.Dense(2)(jax.image.resize(x, (rows, 2 * height, 2 * width, channels), "bilinear"))


def test_free_axes_of_different_sizes_are_taken():
    net = pae.linen(Enlarged, np.zeros((2, 4, 4, 3), np.float32), free_axes=(1, 2))
    state = frozen(net, head=None)
    small, alone = pae.slim(net, state, "a")
    for rows, height, width in ((3, 6, 9), (1, 9, 6), (5, 2, 4)):
        x = np.random.default_rng(0).normal(size=(rows, height, width, 3)).astype(np.float32)
        wanted = pae.predict(net, state, "a", x)
        np.testing.assert_allclose(pae.predict(small, alone, "a", x), wanted, rtol=1e-4, atol=1e-5)


class Positions(nn.Module):
    """Sequences of up to 40 tokens, whose positions are rows of a table."""

    width: float = 1.0

    @nn.compact
    def __call__(self, x, train):
        table = self.param("table", nn.initializers.normal(), (40, 6))
        x = nn.Embed(9, 6)(x) + table[None, : x.shape[1]]
        return nn.Dense(6)(nn.gelu(nn.Dense(int(8 * self.width))(x))).mean(1)


@pytest.mark.parametrize(("sample", "lengths"), [(6, (6, 11, 37)), (40, (6, 23, 40))])
def test_rows_of_a_table_that_only_longer_inputs_read_stay(sample, lengths):
    net = pae.linen(Positions, np.arange(sample).reshape(1, sample) % 9, free_axes=(1,))
    state = frozen(net)
    small, alone = pae.slim(net, state, "a")
    assert flatten(alone.shared)["table"].shape == (40, 6)
    assert flatten(alone.shared)["Dense_0/kernel"].shape[1] < 8
    for rows, length in enumerate(lengths, 1):
        x = np.random.default_rng(length).integers(0, 9, (rows, length))
        same_outputs(net, state, small, alone, "a", x)


def test_a_task_of_a_network_that_was_widened_since_is_slimmed_at_its_own_width(net, third, data):
    state = pae.freeze(pae.prune(third, "c", 0.6), "c")
    state = pae.expand(net, state, width=1.5, key=jax.random.key(1))
    rule = pae.Picking(ternary=True)
    state = pae.pack(net, state, "d", head=3, key=jax.random.key(1), sharing="picked", picking=rule)
    draw, entry = np.random.default_rng(0), state.tasks["d"]
    pick = jax.tree.map(lambda p: jnp.asarray(draw.choice([-0.1, 0, 0.1], p.shape), jnp.float32), entry.pick)
    state = pae.freeze(state.replace(tasks={**state.tasks, "d": entry.replace(pick=pick)}), "d")
    for task in "ad":
        small, alone = pae.slim(net, state, task)
        assert list(alone.tasks) == [task] and alone.width == state.tasks[task].width
        same_outputs(net, state, small, alone, task, data[0][:5])


@pytest.mark.parametrize("head", [None, nn.Dense(2)])
def test_without_a_number_of_classes_all_features_stay(layers, head):
    state = pae.pack(layers, pae.init(layers, jax.random.key(0)), "a", head=head, key=jax.random.key(1))
    state = pae.prune(state, "a", 1.0)
    small, _ = pae.slim(layers, pae.freeze(state, "a"), "a")
    assert small.layout(1.0).features.shape == (2, 3)
    assert small.cuts


def test_what_cannot_be_slimmed_is_refused(net, third, layers):
    with pytest.raises(pae.UnknownTaskError, match="'zebra'"):
        pae.slim(net, third, "zebra")
    with pytest.raises(pae.PhaseError, match=r"slim .*'c' is packed"):
        pae.slim(net, third, "c")
    with pytest.raises(pae.StructureError, match="made with this net"):
        pae.slim(layers, third, "a")
    damaged = third.replace(shared=jax.tree.map(lambda w: w + 1, third.shared))
    with pytest.raises(pae.ForgettingError, match="'a'"):
        pae.slim(net, damaged, "a")


def test_a_slimmed_net_only_evaluates_at_its_width(slimmed):
    _, _, small, alone = slimmed
    with pytest.raises(pae.ArgumentError, match="cannot be trained"):
        small.program(1.0).apply({}, small.sample, True, None)
    with pytest.raises(pae.ArgumentError, match=r"width 1 alone, found 2"):
        pae.expand(small, alone, width=2.0, key=jax.random.key(0))


def test_a_network_that_computes_something_else_is_not_returned(layers, monkeypatch):
    """The comparison at the end does not rest on the analysis."""
    module = sys.modules["pae_jax.serving.slim"]
    state = frozen(layers)
    found = module.find_cuts

    class Doubled(Cuts):
        def take(self, variables):
            small = super().take(variables)
            return jax.tree.map(lambda leaf: 2 * leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, small)

    def wrong(*arguments):
        return Doubled(**vars(found(*arguments)))

    monkeypatch.setattr(module, "find_cuts", wrong)
    with pytest.raises(pae.NotPreservableError, match="computes other outputs"):
        pae.slim(layers, state, "a")


class Complex(nn.Module):
    width: float

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(int(8 * self.width))(x))
        return jax.lax.complex(nn.Dense(3, name="real")(h), nn.Dense(3, name="imaginary")(h))


@pytest.mark.parametrize("wrong", [False, True])
def test_imaginary_parts_are_compared_too(wrong, monkeypatch):
    net = pae.linen(Complex, jnp.ones((2, 4)))
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=None, key=jax.random.key(1))
    state = pae.freeze(pae.prune(state, "a", 0.5), "a")
    if not wrong:
        small, alone = pae.slim(net, state, "a")
        return same_outputs(net, state, small, alone, "a", np.arange(8, dtype=np.float32).reshape(2, 4) - 4)
    module = sys.modules["pae_jax.serving.slim"]
    found = module.find_cuts

    class Changed(Cuts):
        def apply(self, variables, inputs):
            return super().apply(variables, inputs) + 1j

    monkeypatch.setattr(module, "find_cuts", lambda *arguments: Changed(**vars(found(*arguments))))
    with pytest.raises(pae.NotPreservableError, match="computes other outputs"):
        pae.slim(net, state, "a")
