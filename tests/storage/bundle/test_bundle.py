"""Bundles: tasks come back bit for bit, a delta goes onto its own state alone, and nothing else is in the file."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import pae_jax as pae
from pae_jax.core import ownership
from pae_jax.trees import flatten

KINDS = ("all", "first", "picked", "ternary")


@pytest.fixture(scope="module")
def x(data):
    return data[0][:8]


def same_answers(net, one, other, tasks, x):
    for task in tasks:
        np.testing.assert_array_equal(pae.predict(net, one, task, x), pae.predict(net, other, task, x), err_msg=task)


def sound(net, state):
    pae.check(state, net)
    pae.verify(state)


def round_trip(net, state, path, onto=None, heads=None, **options):
    header = pae.write_bundle(path, net, state, **options)
    found = pae.read_bundle(net, path, onto=onto, heads=heads)
    sound(net, found)
    return found, header


# Whole bundles


@pytest.mark.parametrize("kind", KINDS)
def test_all_tasks_come_back_with_their_digests_and_what_nobody_owns_is_free_and_0(net, make, tmp_path, x, bits, kind):
    state = make(kind)
    found, _ = round_trip(net, state, tmp_path / "all")
    assert bits(found.owner) == bits(state.owner)
    owned = jax.tree.map(lambda o: o > 0, state.owner)
    assert bits(found.shared) == bits(ownership.select(owned, state.shared))
    for name, entry in state.tasks.items():
        other = found.tasks[name]
        for part in ("local", "head", "pick", "digests"):
            assert bits(getattr(entry, part)) == bits(getattr(other, part)), (name, part)
        assert (entry.id, entry.width, entry.sharing, entry.picking) == (
            other.id,
            other.width,
            other.sharing,
            other.picking,
        )
    assert found.growth == state.growth
    same_answers(net, found, state, "abcd", x)


SUBSETS = ("b", "d", "ac", "bc", "bd", "cd", "bcd")


@pytest.mark.parametrize("kind", KINDS)
def test_any_choice_of_tasks_answers_as_before_and_holds_only_weights_that_one_of_them_uses(
    net, make, tmp_path, x, kind
):
    state = make(kind)
    for tasks in SUBSETS:
        found, header = round_trip(net, state, tmp_path / tasks, tasks=list(tasks))
        assert [task["name"] for task in header["tasks"]] == list(tasks)
        assert found.width == state.tasks[tasks[-1]].width
        same_answers(net, found, state, tasks, x)
        used = [pae.masks(state, task) for task in tasks]
        used = sum(int(np.any([flatten(mask)[path] for mask in used], axis=0).sum()) for path in flatten(state.owner))
        assert sum(int((np.asarray(o) > 0).sum()) for o in jax.tree.leaves(found.owner)) == used


def test_a_bundle_without_a_task_holds_no_bit_that_only_it_owned(net, make, tmp_path):
    state = make("first")
    raw = tmp_path / "file"
    pae.write_bundle(raw, net, state, tasks=["a", "c", "d"])
    text = raw.read_bytes()
    owner, shared = flatten(state.owner), flatten(state.shared)
    own = np.concatenate([np.asarray(shared[p])[np.asarray(owner[p]) == 2] for p in owner])
    assert own.size
    assert not any(value.tobytes() in text for value in own)
    head = state.tasks["b"].head["params"]["kernel"]
    assert not any(value.tobytes() in text for value in np.asarray(head).ravel())
    kept = np.concatenate([np.asarray(shared[p])[np.asarray(owner[p]) == 1] for p in owner])
    assert all(value.tobytes() in text for value in kept)


def test_the_last_tasks_of_a_state_with_an_unfrozen_one_are_refused_and_the_frozen_ones_bundled(
    net, second, tmp_path, x
):
    with pytest.raises(pae.PhaseError, match="task 'b' is not frozen"):
        pae.write_bundle(tmp_path / "b", net, second)
    found, _ = round_trip(net, second, tmp_path / "a", tasks=["a"])
    same_answers(net, found, second, "a", x)


class Mixed(nn.Module):
    """bf16, f16 and f32 kernels; a scalar counter, a bool flag, small integers and a raw random key."""

    width: float

    @nn.compact
    def __call__(self, x, train):
        self.variable("counts", "steps", lambda: jnp.zeros((), jnp.int32))
        self.variable("counts", "flags", lambda: jnp.array([True, False]))
        self.variable("counts", "bytes", lambda: jnp.array([[255, 0]], jnp.uint8))
        self.variable("counts", "key", lambda: jax.random.key_data(jax.random.key(7)))
        x = nn.Dense(4, param_dtype=jnp.bfloat16)(x)
        x = nn.Dense(3, param_dtype=jnp.float16, use_bias=False)(x)
        return nn.Dense(3)(x.astype(jnp.float32))


class TwoOutputs(nn.Module):
    @nn.compact
    def __call__(self, x):
        return {"boxes": nn.Dense(4)(x), "scores": (nn.Dense(2)(x), nn.Dense(3)(x))}


class Layers(nnx.Module):
    def __init__(self, width, rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(11)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


NETS = {
    "mixed dtypes": lambda: pae.linen(Mixed, jnp.zeros((1, 4))),
    "no local variables": lambda: pae.linen(lambda w: nn.Dense(3, use_bias=False), jnp.zeros((1, 4))),
    "NNX lists": lambda: pae.nnx(Layers, jnp.zeros((1, 4))),
    "everything packable": lambda: pae.linen(
        lambda w: pae.models.MLP(w, (3,)), jnp.zeros((1, 4)), packable=lambda path, leaf: True
    ),
}


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("name", NETS)
def test_networks_of_any_leaves_come_back_and_their_delta_does(grown, tmp_path, x, state_facts, name, precision):
    net = NETS[name]()
    state = grown(net, pae.init(net, jax.random.key(0)), "a", "b")
    whole, _ = round_trip(net, state, tmp_path / "all", weights=precision)
    first, _ = round_trip(net, state, tmp_path / "first", tasks=["a"], weights=precision)
    both, _ = round_trip(net, state, tmp_path / "delta", after="a", weights=precision, onto=first)
    assert state_facts(both) == state_facts(whole)
    if precision == "float32":
        same_answers(net, whole, state, "ab", x)


def test_heads_of_any_kind_come_back_with_the_module_that_is_given(net, empty, tmp_path, x):
    state = empty
    heads = {"two": TwoOutputs(), "nnx": nnx.Linear(6, 2, rngs=nnx.Rngs(0)), "none": None}
    for number, (name, head) in enumerate(heads.items()):
        state = pae.pack(net, state, name, head=head, key=jax.random.key(number))
        state = pae.freeze(pae.prune(state, name, 0.5), name)
    given = {"two": TwoOutputs(), "nnx": nnx.Linear(6, 2, rngs=nnx.Rngs(5))}
    found, _ = round_trip(net, state, tmp_path / "file", heads=given)
    for name in heads:
        one, other = (pae.predict(net, s, name, x) for s in (found, state))
        jax.tree.map(np.testing.assert_array_equal, one, other)
    with pytest.raises(pae.ArgumentError, match=r"task 'two' has the head module TwoOutputs; pass heads=\{'two'"):
        pae.read_bundle(net, tmp_path / "file")
    with pytest.raises(pae.StructureError, match=r"head of task 'two'.*found 3, expected TwoOutputs"):
        pae.read_bundle(net, tmp_path / "file", heads={**given, "two": 3})
    with pytest.raises(pae.ArgumentError, match="'z'"):
        pae.read_bundle(net, tmp_path / "file", heads={**given, "z": 3})


# Lower precision


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize("kind", ["all", "ternary"])
def test_the_stored_values_define_a_task_of_lower_precision(net, make, tmp_path, data, bits, kind, precision):
    state, sent = make(kind), {"d": (data[0], data[1])}
    found, header = round_trip(net, state, tmp_path / "file", weights=precision, data=sent)
    again, _ = round_trip(net, found, tmp_path / "again", weights=precision)
    assert bits(again.shared) == bits(found.shared)
    exact, _ = round_trip(net, found, tmp_path / "exact")
    assert bits(exact.shared) == bits(found.shared)
    assert header["tasks"][3]["measured"] == pae.evaluate(net, found, "d", data)
    assert header["tasks"][0]["measured"] is None
    for path, leaf in flatten(found.shared).items():
        before = np.where(np.asarray(flatten(state.owner)[path]) > 0, flatten(state.shared)[path], 0)
        error = np.abs(np.asarray(leaf) - before)
        assert 0 < error.max()
        allowed = np.abs(before).max(0) / 250 if precision == "int8" else np.abs(before) / 256 + 2**-24
        assert (error <= allowed).all(), path


def test_stored_local_values_define_a_task_and_take_half_the_bytes(net, make, tmp_path, data, bits):
    state = make("all")
    found, header = round_trip(net, state, tmp_path / "half", weights="float16", local="float16")
    again, _ = round_trip(net, found, tmp_path / "again", weights="float16", local="float16")
    exact, _ = round_trip(net, found, tmp_path / "exact")
    for name, entry in found.tasks.items():
        parts = {"local": entry.local, "head": entry.head}
        assert bits(parts) == bits({"local": again.tasks[name].local, "head": again.tasks[name].head})
        assert bits(parts) == bits({"local": exact.tasks[name].local, "head": exact.tasks[name].head})
        trained = state.tasks[name]
        pairs = zip(jax.tree.leaves(parts), jax.tree.leaves([trained.head, trained.local]), strict=True)
        for one, other in pairs:
            np.testing.assert_allclose(one, other, rtol=2**-11, atol=2**-24)
    assert header["local_values"] == "float16"
    assert (tmp_path / "half").stat().st_size < (tmp_path / "exact").stat().st_size


def test_local_values_too_large_for_half_precision_are_refused_by_name(net, make, tmp_path):
    state = make("all")
    entry = state.tasks["b"]
    large = entry.replace(head=jax.tree.map(lambda w: w + 1e6, entry.head))
    state = refrozen(state.replace(tasks={**state.tasks, "b": large}), state.shared)
    with pytest.raises(pae.StructureError, match=r"task 'b', leaf 'head/.*range of float16"):
        pae.write_bundle(tmp_path / "file", net, state, local="float16")
    assert not (tmp_path / "file").exists()


def test_lower_precision_takes_no_weight_that_is_not_finite(net, make, tmp_path, edit_leaf):
    state = make("all")
    odd = edit_leaf(state.shared, "Dense_1/kernel", lambda w: np.where(w == w[0, 0], np.nan, w))
    assert int(state.owner["Dense_1"]["kernel"][0, 0]) > 0
    state = refrozen(state, odd)
    for precision in ("bfloat16", "int8"):
        with pytest.raises(pae.StructureError, match=r"shared, leaf 'Dense_1/kernel': found [0-9]+ values .*float32"):
            pae.write_bundle(tmp_path / precision, net, state, weights=precision)
    found, _ = round_trip(net, state, tmp_path / "file")
    assert np.isnan(np.asarray(found.shared["Dense_1"]["kernel"])).sum() == 1


def refrozen(state, shared):
    """Return the state with other weights and the digests that they have."""
    from pae_jax.storage.bundle import with_digests

    return with_digests(state.replace(shared=shared), set(state.tasks))


# Deltas


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_delta_on_the_state_before_gives_the_state_after(net, make, tmp_path, x, state_facts, kind, precision):
    state = make(kind)
    whole, _ = round_trip(net, state, tmp_path / "all", weights=precision)
    device, _ = round_trip(net, state, tmp_path / "a", tasks=["a"], weights=precision)
    for after, task in itertools.pairwise("abcd"):
        path = tmp_path / f"delta-{task}"
        device, _ = round_trip(net, state, path, tasks=[task], after=after, weights=precision, onto=device)
    assert state_facts(device) == state_facts(whole)
    same_answers(net, device, whole, "abcd", x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_of_some_tasks_gets_further_ones_by_a_delta(net, make, tmp_path, x, kind):
    state = make(kind)
    device, _ = round_trip(net, state, tmp_path / "b", tasks=["b"])
    both, _ = round_trip(net, state, tmp_path / "d", tasks=["b", "d"], after="b", onto=device)
    same_answers(net, both, state, "bd", x)


def test_a_delta_goes_onto_a_stage_that_was_widened_or_not_and_is_smaller_than_the_whole(net, make, tmp_path, x):
    state = make("all")
    pae.write_bundle(tmp_path / "all", net, state)
    pae.write_bundle(tmp_path / "delta", net, state, after="b")
    assert (tmp_path / "delta").stat().st_size < (tmp_path / "all").stat().st_size
    narrow = pae.drop(pae.drop(state, "d"), "c")  # still at width 1.5
    assert narrow.width == 1.5
    same_answers(net, pae.read_bundle(net, tmp_path / "delta", onto=narrow), state, "abcd", x)


def test_a_rounded_delta_goes_onto_the_trained_state_as_well(net, make, tmp_path, x):
    state = make("all")
    onto, _ = round_trip(net, state, tmp_path / "exact", tasks=["a", "b"])
    device, _ = round_trip(net, state, tmp_path / "delta", after="b", weights="int8", onto=onto)
    same_answers(net, device, state, "ab", x)


def test_a_delta_onto_any_other_state_is_refused_and_names_the_task_that_differs(net, make, grown, tmp_path, empty):
    state = make("all")
    pae.write_bundle(tmp_path / "delta", net, state, after="b")
    pae.write_bundle(tmp_path / "all", net, state)
    before = pae.drop(pae.drop(state, "d"), "c")
    entry = before.tasks["b"]
    other_head = entry.replace(head=jax.tree.map(lambda w: -w, entry.head))
    turned = refrozen(before.replace(tasks={**before.tasks, "b": other_head}), before.shared)
    others = {
        "task 'b' differs": turned,
        "task 'a' differs": grown(net, empty, "a", "b", sharing="first"),
        "'b' differs": pae.drop(before, "b"),
        "'c' differs": pae.drop(state, "d"),
        "'a' differs": empty,
        "'x' differs": grown(net, before, "x"),
    }
    for message, other in others.items():
        with pytest.raises(pae.CheckpointError, match=message):
            pae.read_bundle(net, tmp_path / "delta", onto=other)
    with pytest.raises(pae.ForgettingError, match="task 'a'"):
        damaged = before.replace(shared=jax.tree.map(lambda w: -w, before.shared))
        pae.read_bundle(net, tmp_path / "delta", onto=damaged)
    with pytest.raises(pae.ArgumentError, match=r"only adds to a state with the tasks \['a', 'b'\]"):
        pae.read_bundle(net, tmp_path / "delta")
    with pytest.raises(pae.ArgumentError, match="without onto"):
        pae.read_bundle(net, tmp_path / "all", onto=before)
