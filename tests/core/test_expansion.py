"""`expand` and what follows it: old tasks at their own width, new tasks on top of all older knowledge."""

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import pae_jax as pae
from pae_jax import trees
from pae_jax.core import ownership
from pae_jax.nets import trial_inputs


class Concat(nn.Module):
    """Two branches, a concatenation and a flattening: old channels are no leading block of anything."""

    width: float

    @nn.compact
    def __call__(self, x, train):
        def channels(count):
            return int(count * self.width)

        norm = nn.BatchNorm(use_running_average=not train, momentum=0.5)
        a = nn.relu(norm(nn.Conv(channels(4), (3, 3), use_bias=False)(x)))
        b = nn.relu(nn.Conv(channels(2), (1, 1))(x))
        x = jnp.concatenate([a, b], -1)
        return nn.relu(nn.Dense(channels(6))(x.reshape(x.shape[0], -1)))


class NnxBranches(nnx.Module):
    """The same in NNX, with a list and dropout."""

    def __init__(self, width, rngs):
        self.branches = nnx.List([nnx.Linear(4, int(c * width), rngs=rngs) for c in (4, 2)])
        self.norm = nnx.BatchNorm(int(4 * width) + int(2 * width), rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(int(4 * width) + int(2 * width), int(6 * width), rngs=rngs)

    def __call__(self, x, train):
        x = jnp.concatenate([nnx.relu(branch(x)) for branch in self.branches], -1)
        x = self.norm(x, use_running_average=not train)
        return self.out(self.drop(x, deterministic=not train))


class Normalised(nn.Module):
    width: float

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(nn.LayerNorm(name="norm")(nn.Dense(int(4 * self.width))(x)))


SHAPES = {"linen": (4, 4, 2), "nnx": (4,)}


@pytest.fixture(scope="module", params=["linen", "nnx"])
def net(request):
    sample = jnp.zeros((1, *SHAPES[request.param]))
    return pae.linen(Concat, sample) if request.param == "linen" else pae.nnx(NnxBranches, sample)


@pytest.fixture(scope="module")
def x(net):
    return np.random.default_rng(0).normal(size=(16, *net.sample.shape[1:])).astype(np.float32)


@pytest.fixture(scope="module")
def learn(net, x):
    """Pack, fit, prune and freeze a task; return the state."""
    labels = (x.reshape(len(x), -1)[:, 0] > 0).astype(np.int32)
    optimizer = optax.adamw(0.01, weight_decay=0.1)

    def run(state, task, local_init="backbone"):
        key = jax.random.key(len(state.tasks))
        state = pae.pack(net, state, task, head=2, key=key, local_init=local_init)
        options = dict(optimizer=optimizer, epochs=2, batch_size=8, key=key, progress=False)
        state, _ = pae.fit(net, state, task, (x, labels), **options)
        return pae.freeze(pae.prune(state, task, 0.5), task)

    return run


@pytest.fixture(scope="module")
def grown(net, learn, x):
    """Expanded before the first task, and after the second and the third; with the logits of every task's day."""
    state = pae.expand(net, pae.init(net, jax.random.key(0)), width=1.25, key=jax.random.key(1))
    logits = {}
    for task, local_init, width in (("a", "backbone", None), ("b", "a", 1.75), ("c", "b", 2.5)):
        state = learn(state, task, local_init)
        logits[task] = pae.predict(net, state, task, x)
        if width:
            state = pae.expand(net, state, width=width, key=jax.random.key(2))
    return learn(state, "d", "a"), logits


def test_old_tasks_answer_bit_for_bit_after_pack_fit_prune_expand_pack_fit_save_load_expand(
    net, grown, x, tmp_path, assert_same, state_facts
):
    state, logits = grown
    pae.save(tmp_path / "stage", state)
    loaded = pae.load(net, tmp_path / "stage")
    assert state_facts(loaded) == state_facts(state)
    assert loaded.growth == state.growth
    again = pae.expand(net, loaded, width=3.0, key=jax.random.key(9))
    for later in (state, loaded, again):
        pae.check(later)
        pae.verify(later)
        for task, before in logits.items():
            assert_same({"logits": pae.predict(net, later, task, x)}, {"logits": before})


def test_the_wide_network_with_only_old_weights_computes_the_old_features(net, learn, x):
    state = learn(pae.init(net, jax.random.key(0)), "a")
    wide = pae.expand(net, state, width=1.5, key=jax.random.key(1))
    maps, entry = wide.growth[-1].maps, state.tasks["a"]
    held = ownership.select(ownership.visible(wide.owner, ownership.id_array(1), "all"), wide.shared)
    local = maps.put(entry.local, net.initial(jax.random.key(3), 1.5)[1])
    features, _ = net.program(1.5).apply(trees.merge(held, local), x[:1], False, None)
    old = pae.features(net, state, "a", x[:1])
    np.testing.assert_allclose(maps.outputs.take(features), old, rtol=1e-5, atol=1e-6 * float(jnp.abs(old).max()))


def test_expand_places_weights_and_owners_by_the_same_maps_and_frees_the_new_area(net, learn, assert_same):
    state = learn(pae.init(net, jax.random.key(0)), "a")
    wide = pae.expand(net, state, width=1.5, key=jax.random.key(1))
    assert_same(ownership.at_width(wide, wide.shared, 1.0), state.shared)
    assert_same(ownership.at_width(wide, wide.owner, 1.0), state.owner)
    assert sum(int((leaf == 1).sum()) for leaf in jax.tree.leaves(wide.owner)) == sum(
        int((leaf == 1).sum()) for leaf in jax.tree.leaves(state.owner)
    )
    new = jax.tree.map(lambda o, w: (o == 0) & (w != 0), wide.owner, wide.shared)
    assert all(bool(leaf.any()) for leaf in jax.tree.leaves(new))  # fresh values, so that new channels can learn
    assert_same(wide.tasks["a"].local, state.tasks["a"].local)
    assert wide.tasks["a"].width == 1.0


def test_expand_leaves_the_given_state_as_it_was(net, learn, state_facts):
    state = learn(pae.init(net, jax.random.key(0)), "a")
    before = state_facts(state)
    pae.expand(net, state, width=1.5, key=jax.random.key(1))
    assert state_facts(state) == before


def test_report_drop_and_masks_work_on_a_grown_state(net, grown, x):
    state, logits = grown
    rows = pae.report(state).rows
    assert [row["width"] for row in rows[:-1]] == [1.25, 1.25, 1.75, 2.5]
    assert sum(row["weights"] for row in rows) == sum(leaf.size for leaf in jax.tree.leaves(state.shared))
    assert jax.tree.map(jnp.shape, pae.masks(state, "a")) == jax.tree.map(jnp.shape, state.shared)
    dropped = pae.drop(state, "d")
    pae.check(dropped)
    pae.verify(dropped)
    np.testing.assert_array_equal(pae.predict(net, dropped, "c", x), logits["c"])
    with pytest.raises(pae.PhaseError):
        pae.drop(dropped, "b")


def test_a_damaged_bit_of_an_older_width_is_found_after_growing(grown, edit_leaf):
    state, _ = grown
    owner = trees.flatten(state.owner)
    path = next(path for path, leaf in owner.items() if (np.asarray(leaf) == 1).any())
    index = tuple(np.argwhere(np.asarray(owner[path]) == 1)[0])

    def flip(leaf):
        leaf.view(np.uint32)[index] ^= 1
        return leaf

    with pytest.raises(pae.ForgettingError, match=f"'a'.*{path}"):
        pae.verify(state.replace(shared=edit_leaf(state.shared, path, flip)))


def test_pretrained_local_variables_follow_every_expansion_and_the_next_task_starts_from_them(net, x, assert_same):
    key = jax.random.key(0)
    variables = net.program(1.0).init(key, jnp.asarray(x[:1]))
    variables = {**variables, "params": jax.tree.map(lambda leaf: leaf + 0.5, variables["params"])}
    narrow = pae.from_variables(net, variables)
    wide = pae.expand(net, narrow, width=1.5, key=key)
    assert_same(wide.growth[-1].maps.take(wide.local), narrow.local)
    wider = pae.expand(net, pae.freeze(pae.pack(net, wide, "z", head=2, key=key), "z"), width=2.0, key=key)
    assert_same(wider.growth[-1].maps.take(wider.local), wide.local)
    assert pae.check(wider, net) is None
    state = pae.pack(net, wide, "a", head=2, key=key)
    assert_same(state.tasks["a"].local, wide.local)
    assert jax.tree.map(jnp.shape, state.tasks["a"].local) == jax.tree.map(jnp.shape, net.layout(1.5).local)


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_a_width_that_is_not_larger_is_refused(net, width):
    with pytest.raises(pae.ArgumentError, match="larger"):
        pae.expand(net, pae.init(net, jax.random.key(0)), width=width, key=jax.random.key(1))


def test_a_width_that_changes_no_layer_is_refused(net):
    with pytest.raises(pae.ArgumentError, match="changes no layer"):
        pae.expand(net, pae.init(net, jax.random.key(0)), width=1.001, key=jax.random.key(1))


def test_an_unfrozen_task_must_be_finished_before_expanding(net):
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
    with pytest.raises(pae.PhaseError, match="'a' is packed but not frozen"):
        pae.expand(net, state, width=1.5, key=jax.random.key(1))


def test_what_cannot_be_preserved_is_refused_by_name_unless_accepted():
    net = pae.linen(Normalised, jnp.zeros((1, 4)))
    state = pae.init(net, jax.random.key(0))
    with pytest.raises(pae.NotPreservableError, match=r"(?s)norm.*accept_changes") as caught:
        pae.expand(net, state, width=2.0, key=jax.random.key(1))
    assert any("norm" in reason for reason in caught.value.reasons)
    state = pae.freeze(pae.pack(net, state, "a", head=2, key=jax.random.key(2)), "a")
    before = pae.predict(net, state, "a", jnp.ones((3, 4)))
    accepted = pae.expand(net, state, width=2.0, key=jax.random.key(1), accept_changes=True)
    np.testing.assert_array_equal(pae.predict(net, accepted, "a", jnp.ones((3, 4))), before)


def test_builds_of_two_architectures_are_refused():
    def build(width):
        return nn.Sequential([]) if width is None else (Normalised(1.0) if width == 1.0 else Concat(1.0))

    net = pae.linen(build, jnp.zeros((1, 4, 4, 2)))
    with pytest.raises(pae.StructureError):
        pae.expand(net, pae.init(net, jax.random.key(0)), width=2.0, key=jax.random.key(1))


class Encoder(nn.Module):
    """Token ids and an integer padding mask; the mean over real tokens is NaN where there is none."""

    width: float
    guard: bool

    @nn.compact
    def __call__(self, batch, train):
        mask = batch["mask"].astype(jnp.float32)[..., None]
        h = nn.Embed(50, 16)(batch["ids"])
        h = h + nn.Dense(16)(nn.gelu(nn.Dense(int(20 * self.width))(h)))
        count = mask.sum(1)
        return (h * mask).sum(1) / (jnp.maximum(count, 1e-9) if self.guard else count)


@pytest.mark.parametrize("guard", [False, True], ids=["plain mean", "guarded mean"])
def test_expand_tries_the_model_on_the_samples_own_integers(guard, assert_same):
    sample = {"ids": np.arange(1, 8, dtype=np.int32)[None], "mask": np.ones((1, 7), np.int32)}

    def life(sample):
        net = pae.linen(lambda width: Encoder(width, guard), sample)
        state = pae.freeze(pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1)), "a")
        return net, state, pae.expand(net, state, width=1.5, key=jax.random.key(2))

    net, state, wide = life(sample)
    assert_same(pae.predict(net, wide, "a", sample), pae.predict(net, state, "a", sample))
    message = "are not finite on its sample" if not guard else "features are 0 on its sample"
    for without in (jax.tree.map(np.zeros_like, sample), jax.eval_shape(lambda: jax.tree.map(jnp.asarray, sample))):
        with pytest.raises(pae.NotPreservableError, match=f"{message}.*state is unchanged; give the net a sample"):
            life(without)


class Rectified(nn.Module):
    """Features that are 0 unless the first input is large."""

    width: float

    @nn.compact
    def __call__(self, x):
        bias = nn.initializers.constant(-1.5)
        h = nn.relu(nn.Dense(int(4 * self.width), kernel_init=nn.initializers.ones, bias_init=bias)(x[:, :1]))
        return nn.Dense(3)(h)


def test_features_that_are_0_for_the_few_examples_of_a_sample_are_compared_on_more(assert_same):
    net = pae.linen(Rectified, jnp.zeros((1, 4)))
    state = pae.freeze(pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1)), "a")
    assert not pae.features(net, state, "a", trial_inputs(net, 1)).any()
    wide = pae.expand(net, state, width=2.0, key=jax.random.key(2))
    x = trial_inputs(net, 32)
    assert_same(pae.predict(net, wide, "a", x), pae.predict(net, state, "a", x))


class Outputs(nn.Module):
    """Features, and another output made of them."""

    width: float
    make: Callable

    @nn.compact
    def __call__(self, x):
        return self.make(nn.Dense(3)(nn.sigmoid(nn.Dense(int(4 * self.width))(x))))


def expanded(monkeypatch, make, wrong=lambda out: out):
    """Widen a net; `wrong` alters what the wide network of the check at the end computes."""
    net = pae.linen(lambda width: Outputs(width, make), jnp.ones((2, 4)))
    module = sys.modules["pae_jax.core.expansion"]
    apply = module.apply_backbone

    def choose(net, width):
        run = apply(net, width)
        return run if width == 1.0 else lambda *given: wrong(run(*given))

    with monkeypatch.context() as patch:
        patch.setattr(module, "apply_backbone", choose)
        return pae.expand(net, pae.init(net, jax.random.key(0)), width=2.0, key=jax.random.key(1))


def test_a_change_of_the_imaginary_part_alone_is_found(monkeypatch):
    make = lambda h: jax.lax.complex(h, 2 * h)  # noqa: E731
    assert expanded(monkeypatch, make).width == 2.0
    with pytest.raises(pae.NotPreservableError, match="computes other features"):
        expanded(monkeypatch, make, lambda out: out + 1e-3j)


def test_outputs_of_integers_and_bools_are_compared_entry_by_entry(monkeypatch):
    make = lambda h: {"h": h, "best": h.argmax(-1), "high": h > 0}  # noqa: E731
    assert expanded(monkeypatch, make).width == 2.0
    assert expanded(monkeypatch, lambda h: h.argmax(-1)).width == 2.0
    for name, alter in (("best", lambda leaf: leaf.at[0].add(1)), ("high", jnp.logical_not)):
        wrong = lambda out, name=name, alter=alter: {**out, name: alter(out[name])}  # noqa: E731
        with pytest.raises(pae.NotPreservableError, match=f"at {name}: .* entries differ. The state is unchanged"):
            expanded(monkeypatch, make, wrong)


def test_one_of_several_outputs_may_be_0_and_stays_so(monkeypatch):
    make = lambda h: {"h": h, "aux": jnp.zeros(h.shape[:1])}  # noqa: E731
    assert expanded(monkeypatch, make).width == 2.0
    with pytest.raises(pae.NotPreservableError, match="at aux: largest difference 1 "):
        expanded(monkeypatch, make, lambda out: {**out, "aux": out["aux"] + 1})
    with pytest.raises(pae.NotPreservableError, match="features are 0 on its sample"):
        expanded(monkeypatch, lambda h: (0 * h, jnp.zeros(h.shape[:1])))


def test_each_new_width_traces_the_train_step_once_more():
    traced = []

    class Counted(nn.Module):
        width: float

        @nn.compact
        def __call__(self, x, train):
            if train:
                traced.append(self.width)
            return nn.Dense(int(4 * self.width))(x)

    net = pae.linen(Counted, jnp.zeros((1, 4)))
    state = pae.init(net, jax.random.key(0))
    data, tx = (np.ones((8, 4), np.float32), np.zeros(8, np.int32)), optax.sgd(0.1)
    for task, width in (("a", None), ("b", 2.0), ("c", None)):
        key = jax.random.key(0)
        state = pae.pack(net, state, task, head=2, key=key)
        state, _ = pae.fit(net, state, task, data, optimizer=tx, epochs=1, batch_size=8, key=key, progress=False)
        state = pae.freeze(pae.prune(state, task, 0.5), task)
        if width:
            state = pae.expand(net, state, width=width, key=key)
    assert traced == [1.0, 2.0]


class FixedProjection(nn.Module):
    """Random numbers in a collection of its own, which no task trains."""

    width: float

    @nn.compact
    def __call__(self, x):
        h = nn.sigmoid(nn.Dense(int(8 * self.width))(x))
        matrix = self.variable("buffers", "matrix", lambda: jax.random.normal(jax.random.key(7), (h.shape[-1], 5)))
        return h @ matrix.value


class UnitLength(nn.Module):
    """New features would count in the length."""

    width: float

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(int(8 * self.width), bias_init=nn.initializers.ones)(x))
        return nn.Dense(5)(h / (1e-6 + jnp.linalg.norm(h, axis=-1, keepdims=True)))


class Switches(nn.Module):
    """Which features are summed is a variable."""

    width: float

    @nn.compact
    def __call__(self, x):
        h = nn.sigmoid(nn.Dense(int(8 * self.width))(x))
        on = self.variable("switches", "on", lambda: jnp.ones((1, h.shape[-1]), bool))
        return nn.Dense(3)(x) + jnp.where(on.value, h, 0).sum(axis=-1, keepdims=True)


class LocalKernel(nn.Module):
    """The last kernel is kept for each task."""

    width: float

    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="own")(nn.sigmoid(nn.Dense(int(8 * self.width))(x)))


@pytest.mark.parametrize("local_init", ["backbone", "old"])
@pytest.mark.parametrize("module", [FixedProjection, UnitLength, Switches, LocalKernel])
def test_the_next_task_starts_as_the_old_function_whatever_local_variables_grow(module, local_init):
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    packable = lambda path, leaf: leaf.ndim == 2 and not path.startswith("own")  # noqa: E731
    net = pae.linen(module, x, packable=packable)
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "old", head=None, key=jax.random.key(1))
    state = pae.freeze(state, "old")
    old = np.asarray(pae.features(net, state, "old", x))
    state = pae.expand(net, state, width=2.0, key=jax.random.key(2))
    state = pae.pack(net, state, "new", head=None, key=jax.random.key(3), local_init=local_init)
    np.testing.assert_allclose(pae.features(net, state, "new", x), old, atol=1e-5 * np.abs(old).max())
