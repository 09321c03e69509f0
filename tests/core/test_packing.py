"""init, from_variables, pack, freeze, drop: what starts where, and what is refused."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import freeze

import pae_jax as pae
from pae_jax.trees import describe, flatten


def leaf(tree, path):
    return np.asarray(flatten(tree)[path])


# init


def test_init_makes_every_shared_weight_free_as_the_model_draws_it(net, empty, vector_module, assert_same):
    assert empty.tasks == {}
    assert empty.growth == ()
    variables = net.program(1.0).init(jax.random.key(0), jnp.zeros((1, 4)))
    assert_same((empty.shared, empty.local), net.split(variables))
    assert json.loads(empty.layout) == {
        f"{part}/{path}": describe(leaf)
        for part, tree in (("shared", empty.shared), ("local", empty.local))
        for path, leaf in flatten(tree).items()
    }
    assert all(not np.asarray(o).any() and o.dtype == jnp.int8 for o in jax.tree.leaves(empty.owner))
    assert sorted(flatten(empty.shared)) == ["Dense_0/kernel", "Dense_1/kernel"]
    assert pae.free_fraction(empty) == 1.0


def test_init_with_one_key_draws_one_network_and_with_another_key_another(net, empty, assert_same):
    assert_same(pae.init(net, jax.random.key(0)).shared, empty.shared)
    assert (
        leaf(pae.init(net, jax.random.key(1)).shared, "Dense_0/kernel") != leaf(empty.shared, "Dense_0/kernel")
    ).all()


def test_init_at_another_width_gives_channels_of_that_width(net):
    state = pae.init(net, jax.random.key(0), width=1.5)
    assert leaf(state.shared, "Dense_0/kernel").shape == (4, 12)
    assert leaf(state.shared, "Dense_1/kernel").shape == (12, 9)
    assert state.width == 1.5


@pytest.mark.parametrize("width", [0, -1, float("nan"), float("inf")])
def test_a_width_that_is_not_positive_and_finite_is_refused(net, width):
    with pytest.raises(pae.ArgumentError, match="width is a positive channel factor, found"):
        pae.init(net, jax.random.key(0), width=width)


@pytest.mark.parametrize(
    "key", [0, None, "key", np.zeros(2), jax.random.split(jax.random.key(0))], ids=lambda k: type(k).__name__
)
def test_what_is_no_random_key_is_refused(net, empty, key):
    with pytest.raises(pae.ArgumentError, match=r"key must be one random key such as jax.random.key\(0\), found"):
        pae.init(net, key)
    with pytest.raises(pae.ArgumentError, match="key must be one random key"):
        pae.pack(net, empty, "a", head=2, key=key)


# from_variables


@pytest.fixture(scope="module")
def pretrained(vector_module):
    variables = vector_module().init(jax.random.key(9), jnp.zeros((1, 4)), train=False)
    return {**variables, "batch_stats": jax.tree.map(lambda v: v + 0.25, variables["batch_stats"])}


def test_pretrained_variables_keep_their_values_and_give_every_task_the_pretrained_function_to_start_from(
    net, pretrained, vector_module, data, assert_same
):
    state = pae.from_variables(net, pretrained)
    assert pae.free_fraction(state) == 1.0
    assert_same(state.shared, {k: {"kernel": pretrained["params"][k]["kernel"]} for k in ("Dense_0", "Dense_1")})
    packed = pae.pack(net, state, "a", head=2, key=jax.random.key(1))
    assert_same(packed.tasks["a"].local["batch_stats"], pretrained["batch_stats"])
    wanted = vector_module().apply(pretrained, data[0], train=False)
    np.testing.assert_allclose(pae.features(net, packed, "a", data[0]), wanted, rtol=1e-6, atol=1e-6)
    later = pae.freeze(pae.prune(packed, "a", 0.5), "a")
    second = pae.pack(net, later, "b", head=2, key=jax.random.key(2))
    assert_same(second.tasks["b"].local, state.local)
    for kept in (packed, later, second, pae.drop(second, "b")):
        assert_same(kept.local, state.local)
    fresh = pae.pack(net, later, "b", head=2, key=jax.random.key(2), local_init="fresh")
    assert (leaf(fresh.tasks["b"].local, "batch_stats/BatchNorm_0/mean") == 0).all()


def test_a_pretrained_network_may_be_owned_by_a_first_task_without_a_head(
    net, pretrained, vector_module, data, assert_same
):
    state = pae.freeze(
        pae.pack(net, pae.from_variables(net, pretrained), "base", head=None, key=jax.random.key(1)), "base"
    )
    wanted = vector_module().apply(pretrained, data[0], train=False)
    np.testing.assert_allclose(pae.predict(net, state, "base", data[0]), wanted, rtol=1e-6, atol=1e-6)
    later = pae.pack(net, state, "new", head=2, key=jax.random.key(3), allow_empty=True)
    assert_same(pae.features(net, later, "new", data[0]), pae.features(net, state, "base", data[0]))
    wide = pae.expand(net, state, width=1.5, key=jax.random.key(2))
    wide = pae.pack(net, wide, "new", head=2, key=jax.random.key(3))
    for after in (later, wide):
        assert_same(pae.predict(net, after, "base", data[0]), pae.predict(net, state, "base", data[0]))
        pae.verify(after)


def test_a_pretrained_layer_of_zeros_stays_a_layer_of_zeros(net, pretrained, assert_same):
    """Residual branches and adapters start from zeros on purpose; they are not weights that a task gave back."""
    params = {**pretrained["params"], "Dense_1": jax.tree.map(jnp.zeros_like, pretrained["params"]["Dense_1"])}
    state = pae.from_variables(net, {**pretrained, "params": params})
    for option in ("zeros", "fresh"):
        packed = pae.pack(net, state, "a", head=2, key=jax.random.key(1), weight_init=option)
        assert_same(packed.shared, state.shared)


def test_frozen_dicts_of_variables_are_taken_too(net, pretrained, assert_same):
    assert_same(pae.from_variables(net, freeze(pretrained)).shared, pae.from_variables(net, pretrained).shared)


def test_the_callers_variables_are_copied_not_taken(net, pretrained, quick_fit):
    host = jax.tree.map(np.array, pretrained)
    state = pae.pack(net, pae.from_variables(net, host), "a", head=2, key=jax.random.key(1))
    host["params"]["Dense_0"]["kernel"][:] = 7
    assert not (leaf(state.shared, "Dense_0/kernel") == 7).any()
    quick_fit(state, "a")
    assert not any(v.is_deleted() for v in jax.tree.leaves(pretrained))


def changed_variables(pretrained, change):
    variables = jax.tree.map(np.array, dict(pretrained))
    kernel = variables["params"]["Dense_0"]["kernel"]
    if change == "missing kernel":
        del variables["params"]["Dense_0"]
    elif change == "missing bias":
        del variables["params"]["Dense_1"]["bias"]
    elif change == "missing collection":
        del variables["batch_stats"]
    elif change == "extra":
        variables["params"]["Dense_9"] = {"kernel": kernel}
    elif change == "extra bias":
        variables["params"]["Dense_0"]["bias"] = np.zeros(8, np.float32)
    elif change == "shape":
        variables["params"]["Dense_0"]["kernel"] = kernel.T
    elif change == "dtype":
        variables["params"]["Dense_0"]["kernel"] = kernel.astype(np.float16)
    elif change == "local dtype":
        variables["batch_stats"]["BatchNorm_0"]["mean"] = np.zeros(8, int)
    elif change == "no array":
        variables["params"]["Dense_1"]["bias"] = None
    return variables


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "missing kernel",
            r"leaf '(params/)?Dense_0/kernel': found nothing, expected float32\[4,8\].*same model at the same width",
        ),
        ("missing bias", r"leaf 'params/Dense_1/bias': found nothing, expected float32\[6\]"),
        ("missing collection", r"leaf 'batch_stats/BatchNorm_0/mean': found nothing, expected float32\[8\]"),
        ("extra", r"leaf '(params/)?Dense_9/kernel': found float32\[4,8\], expected nothing"),
        ("extra bias", r"leaf 'params/Dense_0/bias': found float32\[8\], expected nothing"),
        ("shape", r"leaf '(params/)?Dense_0/kernel': found float32\[8,4\], expected float32\[4,8\]"),
        ("dtype", r"leaf '(params/)?Dense_0/kernel': found float16\[4,8\], expected float32\[4,8\]"),
        ("local dtype", r"leaf 'batch_stats/BatchNorm_0/mean': found int64\[8\], expected float32\[8\]"),
        ("no array", "Dense_1/bias"),
    ],
)
def test_variables_of_another_structure_are_refused_by_leaf(net, pretrained, change, message):
    with pytest.raises(pae.StructureError, match=message):
        pae.from_variables(net, changed_variables(pretrained, change))


@pytest.mark.parametrize("variables", [{}, {"params": {}}, None, [1, 2]], ids=str)
def test_variables_that_are_none_at_all_are_refused(net, variables):
    with pytest.raises(pae.StructureError, match="variables"):
        pae.from_variables(net, variables)


# pack


def test_pack_gives_the_task_every_free_weight_and_takes_nothing_from_older_ones(net, frozen, third):
    assert all((np.asarray(o) == 1).any() and (np.asarray(o) == 0).any() for o in jax.tree.leaves(frozen.owner))
    packed = pae.pack(net, frozen, "b", head=2, key=jax.random.key(3))
    for old, new in zip(jax.tree.leaves(frozen.owner), jax.tree.leaves(packed.owner), strict=True):
        np.testing.assert_array_equal(new, np.where(np.asarray(old) == 0, 2, old))
    assert packed.tasks["b"].id == 2
    assert packed.tasks["b"].phase == "packed"


def test_reclaimed_weights_start_at_zero_or_fresh_as_asked(net, frozen, assert_same):
    zeros = pae.pack(net, frozen, "b", head=2, key=jax.random.key(3), weight_init="zeros")
    fresh = pae.pack(net, frozen, "b", head=2, key=jax.random.key(3), weight_init="fresh")
    assert_same(zeros.shared, frozen.shared)
    for path, o in flatten(fresh.owner).items():
        mine = np.asarray(o) == 2
        assert leaf(fresh.shared, path)[mine].all()
        assert leaf(fresh.shared, path)[~mine].tobytes() == leaf(frozen.shared, path)[~mine].tobytes()
        assert np.abs(leaf(fresh.shared, path)[mine]).max() < 3
    assert_same(zeros.tasks["b"].head, fresh.tasks["b"].head)


def test_with_reclaimed_zeros_the_first_features_of_a_task_use_exactly_the_older_weights(
    net, frozen, data, assert_same
):
    packed = pae.pack(net, frozen, "b", head=2, key=jax.random.key(3), local_init="a", weight_init="zeros")
    assert_same(pae.features(net, packed, "b", data[0]), pae.features(net, frozen, "a", data[0]))


def test_a_layer_that_has_no_weight_left_is_drawn_fresh_and_trains_again(net, packed, quick_fit, data):
    """Drop and pack again: zeros on both sides of a channel would never get a gradient."""
    state, _ = quick_fit(packed, "a")
    dropped = pae.drop(state, "a")
    assert not any(np.asarray(w).any() for w in jax.tree.leaves(dropped.shared))
    again = pae.pack(net, dropped, "b", head=2, key=jax.random.key(4))
    assert all(np.asarray(w).all() for w in jax.tree.leaves(again.shared))
    trained, _ = quick_fit(again, "b", epochs=30, optimizer=optax.adam(0.02))
    assert pae.evaluate(net, trained, "b", data)["accuracy"] > 0.9
    assert again.tasks["b"].id == 1


def test_local_variables_start_from_the_backbones_fresh_or_from_those_of_an_older_task(net, empty, second, assert_same):
    state = pae.freeze(pae.prune(second, "b", 0.2), "b")
    packed = {
        source: pae.pack(net, state, "c", head=2, key=jax.random.key(3), local_init=source)
        for source in ("backbone", "fresh", "a", "b")
    }
    assert_same(packed["a"].tasks["c"].local, state.tasks["a"].local)
    assert_same(packed["b"].tasks["c"].local, state.tasks["b"].local)
    assert_same(packed["backbone"].tasks["c"].local, empty.local)
    assert_same(pae.pack(net, state, "c", head=2, key=jax.random.key(3)).tasks["c"].local, empty.local)
    start = packed["fresh"].tasks["c"].local
    assert (leaf(start, "batch_stats/BatchNorm_0/mean") == 0).all()
    assert (leaf(start, "params/BatchNorm_0/scale") == 1).all()
    assert (leaf(start, "params/PReLU_0/negative_slope") == np.float32(0.01)).all()
    assert (leaf(state.tasks["b"].local, "batch_stats/BatchNorm_0/mean") != 0).any()
    for later in packed.values():
        assert_same((later.local, later.shared, later.owner), (empty.local, packed["b"].shared, packed["b"].owner))


def test_inherited_local_variables_are_the_tasks_own_and_the_older_ones_stay(net, second, quick_fit, assert_same):
    state = pae.freeze(pae.prune(second, "b", 0.2), "b")
    packed = pae.pack(net, state, "c", head=2, key=jax.random.key(3), local_init="b")
    trained, _ = quick_fit(packed, "c")
    assert_same(trained.tasks["b"].local, state.tasks["b"].local)
    assert (
        leaf(trained.tasks["c"].local, "batch_stats/BatchNorm_0/mean")
        != leaf(state.tasks["b"].local, "batch_stats/BatchNorm_0/mean")
    ).any()
    pae.verify(trained)


def test_a_task_that_does_not_exist_lends_no_local_variables(net, empty, frozen):
    with pytest.raises(pae.ArgumentError, match="local_init must be one of 'backbone', 'fresh', found 'a'"):
        pae.pack(net, empty, "a", head=2, key=jax.random.key(1), local_init="a")
    with pytest.raises(pae.ArgumentError, match="local_init must be one of 'backbone', 'fresh', 'a', found 'b'"):
        pae.pack(net, frozen, "b", head=2, key=jax.random.key(1), local_init="b")


def test_a_state_that_has_no_local_variables_draws_fresh_ones(net, empty, packed, assert_same):
    """Such are the networks of stages that an earlier version saved."""
    state = pae.pack(net, empty.replace(local=None), "a", head=2, key=jax.random.key(1))
    fresh = pae.pack(net, empty, "a", head=2, key=jax.random.key(1), local_init="fresh")
    assert_same(state.tasks["a"].local, fresh.tasks["a"].local)


def test_sharing_first_shows_a_task_the_weights_of_task_one_and_its_own(net, third, data, edit_leaf, assert_same):
    state = pae.pack(
        net, pae.drop(third, "c"), "c", head=2, key=jax.random.key(5), sharing="first", weight_init="fresh"
    )
    for path, mask in flatten(pae.masks(state, "c")).items():
        np.testing.assert_array_equal(mask, np.isin(leaf(state.owner, path), [1, 3]))
    for path, mask in flatten(pae.masks(third, "c")).items():
        np.testing.assert_array_equal(mask, leaf(third.owner, path) > 0)
    before = pae.predict(net, state, "c", data[0])
    path = "Dense_0/kernel"
    for owner, changes in ((1, True), (2, False), (3, True)):
        hit = leaf(state.owner, path) == owner
        other = state.replace(shared=edit_leaf(state.shared, path, lambda w: np.where(hit, w + 1, w)))
        assert bool((np.asarray(pae.predict(net, other, "c", data[0])) != np.asarray(before)).any()) is changes, owner


def test_a_later_task_never_shows_in_an_older_ones_masks(third):
    for task, ids in (("a", [1]), ("b", [1, 2]), ("c", [1, 2, 3])):
        for path, mask in flatten(pae.masks(third, task)).items():
            np.testing.assert_array_equal(mask, np.isin(leaf(third.owner, path), ids))


def test_a_full_network_refuses_a_task_unless_an_empty_one_is_allowed(net, packed, quick_fit, data, assert_same):
    full = pae.freeze(packed, "a")
    with pytest.raises(
        pae.CapacityError, match=r"no free weight is left for task 'b'. Prune a task before freezing it"
    ):
        pae.pack(net, full, "b", head=2, key=jax.random.key(3))
    state = pae.pack(net, full, "b", head=2, key=jax.random.key(3), allow_empty=True)
    assert not any(np.asarray(m).any() for m in jax.tree.leaves(pae.trainable(state, "b")))
    trained, history = quick_fit(state, "b", epochs=10, optimizer=optax.adamw(0.05, weight_decay=0.1))
    assert_same(trained.shared, full.shared)
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]
    for fraction in (0.0, 1.0):
        assert_same(pae.prune(trained, "b", fraction).owner, trained.owner)
    frozen = pae.freeze(trained, "b")
    pae.verify(frozen)
    assert pae.report(frozen).rows[1]["weights"] == 0
    assert_same(pae.drop(frozen, "b").shared, full.shared)


@pytest.mark.parametrize("name", ["", None, 3, b"a", ["a"]], ids=str)
def test_a_name_that_is_no_text_is_refused(net, empty, name):
    with pytest.raises(pae.ArgumentError, match="a task's name is a non-empty string, found"):
        pae.pack(net, empty, name, head=2, key=jax.random.key(0))


@pytest.mark.parametrize("name", ["with/slash", "päe ✓", " ", "a" * 300, "../up", "."])
def test_any_text_is_a_name(net, empty, name, tmp_path, state_facts):
    state = pae.pack(net, empty, name, head=2, key=jax.random.key(0))
    pae.save(tmp_path / "stage", pae.freeze(state, name))
    assert list(pae.load(net, tmp_path / "stage").tasks) == [name]
    assert str(pae.report(state))


def test_a_name_that_is_taken_is_refused(net, frozen):
    with pytest.raises(pae.ArgumentError, match=r"task 'a' exists already; tasks: a. Choose another name"):
        pae.pack(net, frozen, "a", head=2, key=jax.random.key(0))


def test_pack_is_refused_while_the_newest_task_is_not_frozen(net, packed):
    with pytest.raises(
        pae.PhaseError,
        match=r"pack of 'b' cannot be called now: task 'a' is packed but not frozen. Valid calls: fit, prune, freeze",
    ):
        pae.pack(net, packed, "b", head=2, key=jax.random.key(0))


@pytest.mark.parametrize("head", [0, -1, 2.0, True, "2", np.zeros(2)], ids=str)
def test_a_head_that_is_neither_classes_nor_a_module_is_refused(net, empty, head):
    with pytest.raises(pae.ArgumentError, match="head must"):
        pae.pack(net, empty, "a", head=head, key=jax.random.key(0))


class Adjusted(nn.Module):
    """Logits adjusted by the shares of the classes."""

    shares: Any

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x) + jnp.log(jnp.asarray(self.shares))[None]


@pytest.mark.parametrize(
    ("head", "field"),
    [
        (lambda shares: Adjusted(np.asarray(shares)), "shares"),
        (lambda shares: Adjusted({"a": [jnp.asarray(shares)]}), r"shares\['a'\]\[0\]"),
        (lambda shares: nn.Sequential([nn.relu, Adjusted(np.asarray(shares))]), r"layers\[1\].shares"),
    ],
    ids=["numpy", "nested", "in a module"],
)
def test_a_linen_head_with_an_array_in_a_field_is_refused_by_the_field(net, empty, head, field):
    with pytest.raises(pae.ArgumentError, match=f"holds an array in its field '{field}'.*Pass a tuple"):
        pae.pack(net, empty, "a", head=head((0.2, 0.8)), key=jax.random.key(0))
    for shares in ((0.2, 0.8), [0.2, 0.8]):
        assert (
            pae.pack(net, empty, "a", head=Adjusted(shares), key=jax.random.key(0)).tasks["a"].head_spec.shares
            == shares
        )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"sharing": "none"}, "sharing must be one of 'all', 'first'.*, found 'none'"),
        ({"local_init": "old"}, "local_init must be one of 'backbone', 'fresh', found 'old'"),
        ({"local_init": None}, "local_init must be one of 'backbone', 'fresh', found None"),
        ({"weight_init": "ones"}, "weight_init must be one of 'preserve', 'zeros', 'fresh', found 'ones'"),
    ],
    ids=str,
)
def test_an_unknown_option_is_refused_with_its_choices(net, empty, option, message):
    with pytest.raises(pae.ArgumentError, match=message):
        pae.pack(net, empty, "a", head=2, key=jax.random.key(0), **option)


class OddHead(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        if self.kind == "raises":
            raise ValueError("this head wants pictures")
        x = nn.Dense(2)(x)
        return {
            "tuple": (x, 2 * x),
            "dict": {"logits": x, "size": x.sum(1)},
            "scalar": x.sum(),
            "one scalar": (x, x.sum()),
            "turned": x.T,
            "nothing": (),
        }[self.kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("raises", r"head: found OddHead failing with: this head wants pictures, expected a module that takes"),
        ("scalar", r"head, leaf 'output': found float32\[\], expected an array of 1 examples \(batch, ...\)"),
        ("one scalar", r"head, leaf 'output 1': found float32\[\], expected an array of 1 examples"),
        ("turned", r"head, leaf 'output': found float32\[2,1\], expected an array of 1 examples"),
        ("nothing", r"head: found no output, expected a tree of output \(batch, ...\)"),
    ],
)
def test_a_head_whose_outputs_are_not_arrays_of_examples_is_refused_at_pack(net, empty, kind, message):
    with pytest.raises(pae.StructureError, match=message):
        pae.pack(net, empty, "a", head=OddHead(kind), key=jax.random.key(0))


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_a_head_may_have_several_outputs_in_a_tree(net, empty, kind, data, quick_fit, assert_same):
    state = pae.pack(net, empty, "a", head=OddHead(kind), key=jax.random.key(0))
    loss = lambda out, y: (jax.tree.leaves(out)[0][:, 0] - y) ** 2  # noqa: E731
    state, _ = quick_fit(state, "a", loss=loss)
    state = pae.freeze(pae.prune(state, "a", 0.5), "a")
    before = pae.predict(net, state, "a", data[0])
    assert jax.tree.map(len, before) == {"tuple": (40, 40), "dict": {"logits": 40, "size": 40}}[kind]
    assert_same(pae.predict(net, state, "a", data[0][:16]), jax.tree.map(lambda leaf: leaf[:16], before))
    state, _ = quick_fit(pae.pack(net, state, "b", head=2, key=jax.random.key(2)), "b")
    assert_same(pae.predict(net, state, "a", data[0]), before)
    pae.verify(state)


def test_without_a_head_the_output_is_the_features(net, empty, data, quick_fit, assert_same, tmp_path):
    state = pae.pack(net, empty, "a", head=None, key=jax.random.key(0))
    assert state.tasks["a"].head == {}
    loss = lambda out, y: (out[:, 0] - y) ** 2  # noqa: E731
    trained, history = quick_fit(state, "a", loss=loss, epochs=5)
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]
    frozen = pae.freeze(pae.prune(trained, "a", 0.5), "a")
    pae.save(tmp_path / "stage", frozen)
    for later in (trained, frozen, pae.load(net, tmp_path / "stage")):
        pae.check(later, net)
        pae.verify(later)
        assert_same(pae.predict(net, later, "a", data[0]), pae.features(net, later, "a", data[0]))
    assert str(pae.report(frozen))


# Traced


def test_init_pack_prune_and_the_free_fraction_may_be_traced_and_compute_what_they_do_outside(net, data, assert_same):
    def life(key, fraction):
        state = pae.pack(net, pae.init(net, key), "a", head=2, key=key)
        state = pae.prune(state, "a", fraction)
        return state, pae.free_fraction(state)

    key = jax.random.key(3)
    state, free = jax.jit(life)(key, 0.3)
    wanted, share = life(key, 0.3)
    assert_same((state.owner, state.local, state.tasks), (wanted.owner, wanted.local, wanted.tasks))
    for found, expected in zip(*map(jax.tree.leaves, (state.shared, wanted.shared)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)  # drawing is compiled into another program
    assert float(free) == pytest.approx(share)
    pae.check(state, net)
    abstract, free = jax.eval_shape(life, key, 0.3)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    assert jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, abstract, state) == jax.tree.map(
        lambda leaf: True, state
    )
    assert (free.shape, free.dtype) == ((), jnp.float32)
    seeds = jax.random.split(key, 3)
    states, _ = jax.vmap(life, (0, None))(seeds, 0.3)
    for number in range(3):
        found = jax.tree.map(lambda leaf: leaf[number], states)
        assert_same(found.owner, life(seeds[number], 0.3)[0].owner)


@pytest.mark.parametrize("weight_init", ["zeros", "fresh"])
def test_a_second_task_packed_inside_jit_is_the_one_packed_outside(net, frozen, assert_same, weight_init):
    def pack(state, key):
        return pae.pack(net, state, "b", head=2, key=key, weight_init=weight_init)

    key = jax.random.key(3)
    assert_same(jax.jit(pack)(frozen, key), pack(frozen, key))
    dropped = pae.drop(pack(frozen, key), "b")
    assert_same(jax.jit(pack)(dropped, key), pack(dropped, key))


def test_freeze_inside_jit_is_refused_because_values_have_no_digest_there(packed):
    for trace in (jax.jit, lambda f: lambda state: jax.eval_shape(f, state)):
        with pytest.raises(pae.ArgumentError, match=r"freeze looks at values.*call it outside jit"):
            trace(lambda state: pae.freeze(state, "a"))(packed)


# freeze and drop


def test_nothing_of_a_frozen_task_can_change(net, frozen, quick_fit):
    assert frozen.tasks["a"].phase == "frozen"
    assert not any(np.asarray(m).any() for m in jax.tree.leaves(pae.trainable(frozen, "a")))
    for call, name in (
        (lambda: quick_fit(frozen, "a"), "fit"),
        (lambda: pae.prune(frozen, "a", 0.9), "prune"),
        (lambda: pae.freeze(frozen, "a"), "freeze"),
    ):
        with pytest.raises(
            pae.PhaseError,
            match=f"{name} cannot be called now: task 'a' is frozen. Valid calls: predict, features, evaluate, masks",
        ):
            call()


def test_freeze_and_drop_refuse_an_unknown_task(frozen, empty):
    for call in (pae.freeze, pae.drop):
        with pytest.raises(pae.UnknownTaskError, match="unknown task 'x'; the state has: 'a'"):
            call(frozen, "x")
        with pytest.raises(pae.UnknownTaskError, match="the state has: none yet"):
            call(empty, "a")


def test_drop_of_a_frozen_newest_task_gives_back_the_state_before_it(net, frozen, second, assert_same):
    dropped = pae.drop(pae.freeze(second, "b"), "b")
    assert list(dropped.tasks) == ["a"]
    assert_same(dropped.owner, frozen.owner)
    assert_same(dropped.shared, frozen.shared)
    pae.verify(dropped)
    again = pae.pack(net, dropped, "b", head=3, key=jax.random.key(8))
    assert again.tasks["b"].id == 2


def test_tasks_are_ordered_by_id_not_by_name(net, empty, quick_fit):
    state = empty
    for name in ("z", "m", "a"):
        state = pae.pack(net, state, name, head=2, key=jax.random.key(0))
        state = pae.freeze(pae.prune(state, name, 0.5), name)
    restored = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(state))
    assert [row["task"] for row in pae.report(restored).rows] == ["z", "m", "a", "(free)"]
    assert [row["task"] for row in pae.report(pae.drop(restored, "a")).rows] == ["z", "m", "(free)"]
    pae.check(restored)
    pae.verify(restored)
