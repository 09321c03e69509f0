"""verify finds every flipped bit of a frozen task, and check every broken structural law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pae_jax as pae
from pae_jax.core.integrity import array_digest, as_rows, no_digests, task_digests
from pae_jax.core.state import Growth, State, layout_of
from pae_jax.trees import flatten


def flip(array, index, bit):
    """Flip one bit of one entry."""
    raw = array.view(np.uint8).reshape(array.size, array.itemsize)
    raw[index, bit // 8] ^= 1 << (bit % 8)
    return array


@pytest.fixture(scope="module")
def three(third, quick_fit):
    """Three frozen tasks and some free weights."""
    state, _ = quick_fit(third, "c")
    return pae.freeze(pae.prune(state, "c", 0.5), "c")


def owned_by(state, path, ids):
    return np.flatnonzero(np.isin(np.asarray(flatten(state.owner)[path]), ids))


@pytest.mark.parametrize("bit", [0, 7, 12, 22, 23, 30, 31])
def test_verify_finds_one_flipped_bit_in_a_weight_of_a_frozen_task(three, edit_leaf, bit):
    for task_id, task in ((1, "a"), (2, "b"), (3, "c")):
        for path in flatten(three.shared):
            index = owned_by(three, path, [task_id])[-1]
            damaged = three.replace(shared=edit_leaf(three.shared, path, lambda w: flip(w, index, bit)))
            with pytest.raises(pae.ForgettingError, match=f"task '{task}' is frozen, but 'shared/{path}' is no longer"):
                pae.verify(damaged)


def test_verify_finds_negative_zero_and_another_nan(three, edit_leaf):
    path = "Dense_1/kernel"
    index = owned_by(three, path, [1])[0]

    def put(value):
        def change(w):
            w.ravel()[index] = value
            return w

        return change

    nan = np.float32(np.nan)
    other_nan = np.array([nan]).view(np.uint32) ^ 1
    for first, then in ((0.0, -0.0), (nan, other_nan.view(np.float32)[0])):
        state = three.replace(shared=edit_leaf(three.shared, path, put(first)))
        entry = state.tasks["a"]
        state = with_task(state, "a", digests=as_rows(task_digests(state, entry)))
        pae.verify(state)
        with pytest.raises(pae.ForgettingError, match="task 'a'"):
            pae.verify(state.replace(shared=edit_leaf(state.shared, path, put(then))))


def test_verify_finds_every_change_of_an_owner_id_that_concerns_a_frozen_task(three, edit_leaf):
    for path in flatten(three.owner):
        for old, new in ((1, 0), (2, 1), (1, 2), (3, 2), (3, 0), (0, 1), (0, 3), (2, 3)):
            index = owned_by(three, path, [old])[0]

            def change(o):
                o.ravel()[index] = new
                return o

            with pytest.raises(pae.ForgettingError, match=f"shared/{path}"):
                pae.verify(three.replace(owner=edit_leaf(three.owner, path, change)))


@pytest.mark.parametrize("part", ["local", "head"])
def test_verify_finds_one_flipped_bit_in_local_variables_and_heads(three, edit_leaf, part):
    for task, entry in three.tasks.items():
        for path, leaf in flatten(getattr(entry, part)).items():
            tree = edit_leaf(
                getattr(entry, part), path, lambda v: flip(np.atleast_1d(v), v.size - 1, 3).reshape(v.shape)
            )
            assert np.asarray(leaf).tobytes() != np.asarray(flatten(tree)[path]).tobytes()
            damaged = three.replace(tasks={**three.tasks, task: entry.replace(**{part: tree})})
            with pytest.raises(pae.ForgettingError, match=f"task '{task}' is frozen, but '{part}/{path}'"):
                pae.verify(damaged)


@pytest.mark.parametrize("change", [{"sharing": "first"}, {"head_spec": 3}], ids=str)
def test_verify_finds_another_setting(three, change):
    damaged = three.replace(tasks={**three.tasks, "b": three.tasks["b"].replace(**change)})
    with pytest.raises(pae.ForgettingError, match="task 'b' is frozen, but 'settings'"):
        pae.verify(damaged)


def test_verify_finds_a_leaf_that_is_gone_or_new(three):
    entry = three.tasks["b"]
    less = {
        "params": {k: v for k, v in entry.local["params"].items() if k != "PReLU_0"},
        "batch_stats": entry.local["batch_stats"],
    }
    more = {**entry.local, "extra": {"x": jnp.zeros(1)}}
    for local, path in ((less, "local/params/PReLU_0/negative_slope"), (more, "local/extra/x")):
        with pytest.raises(pae.ForgettingError, match=path):
            pae.verify(three.replace(tasks={**three.tasks, "b": entry.replace(local=local)}))


def test_verify_finds_heads_that_were_exchanged(three):
    a, b = three.tasks["a"], three.tasks["b"]
    with pytest.raises(pae.ForgettingError, match=r"head/params/bias.*2 arrays differ"):
        pae.verify(three.replace(tasks={**three.tasks, "a": a.replace(head=b.head), "b": b.replace(head=a.head)}))


def test_verify_passes_over_what_is_not_frozen_or_free(three, second, edit_leaf):
    pae.verify(three)
    pae.verify(second.replace(tasks={**second.tasks, "b": second.tasks["b"].replace(head=second.tasks["a"].head)}))
    path = "Dense_1/kernel"
    free = owned_by(three, path, [0])
    assert free.size

    def change(w):
        w.ravel()[free] = 5
        return w

    pae.verify(three.replace(shared=edit_leaf(three.shared, path, change)))


def test_a_digest_tells_dtype_shape_and_bytes_apart():
    arrays = [
        np.zeros(4, np.float32),
        np.zeros(4, np.int32),
        np.zeros((2, 2), np.float32),
        np.zeros((4, 1), np.float32),
        -np.zeros(4, np.float32),
        np.zeros(8, np.float16),
        np.float32(0),
        np.zeros(1, np.float32),
        np.zeros(0, np.float32),
    ]
    assert len({array_digest(array) for array in arrays}) == len(arrays)
    assert array_digest(jnp.zeros(4)) == array_digest(arrays[0])
    wide = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert array_digest(wide.T) == array_digest(wide.T.copy())
    assert array_digest(wide, wide) != array_digest(wide)


def test_digests_are_an_array_of_one_row_for_each_array_and_freezing_changes_neither_structure_nor_shapes(second, bits):
    after, entry = pae.freeze(second, "b"), second.tasks["b"]
    count = 1 + sum(len(jax.tree.leaves(tree)) for tree in (second.shared, entry.local, entry.head))
    assert (entry.digests.shape, entry.digests.dtype, entry.frozen) == ((count, 32), bool, False)
    assert not entry.digests.any()
    frozen = after.tasks["b"]
    assert (frozen.digests.shape, frozen.digests.dtype, frozen.frozen) == ((count, 32), np.uint8, True)
    assert jax.tree.structure(after) == jax.tree.structure(second)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, second)
    mixed = jax.tree.map(lambda new, old: new, after, second)
    assert bits(mixed) == bits(after)
    pae.verify(mixed)
    one, other = (jax.tree.leaves(state.tasks["a"].digests) for state in (second, after))
    assert bits(one) == bits(other)


def test_frozen_networks_of_two_seeds_stack_and_answer_under_vmap_as_each_does_alone(net, data):
    def made(seed, frozen=True):
        state = pae.pack(net, pae.init(net, jax.random.key(seed)), "a", head=2, key=jax.random.key(seed + 1))
        return pae.freeze(pae.prune(state, "a", 0.5), "a") if frozen else state

    seeds = [made(0), made(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    assert stacked.tasks["a"].frozen
    answers = jax.vmap(lambda state: pae.predict(net, state, "a", data[0]))(stacked)
    for number, state in enumerate(seeds):
        np.testing.assert_allclose(answers[number], pae.predict(net, state, "a", data[0]), rtol=1e-5, atol=1e-6)
        again = jax.tree.map(lambda leaf: leaf[number], stacked)
        pae.check(again, net)
        pae.verify(again)
    with pytest.raises(pae.ForgettingError):
        pae.verify(jax.tree.map(lambda a, b: a, seeds[0], seeds[1]).replace(shared=seeds[1].shared))


# check


def with_task(state, name, **changes):
    return state.replace(tasks={**state.tasks, name: state.tasks[name].replace(**changes)})


def unfrozen(state, name):
    entry = state.tasks[name]
    return with_task(state, name, digests=no_digests(state.shared, entry.local, entry.head, entry.pick))


def without(tree, name):
    return {key: value for key, value in tree.items() if key != name}


BROKEN = {
    "owner leaf missing": (
        lambda s: s.replace(owner=without(s.owner, "Dense_0")),
        r"owner, leaf 'Dense_0/kernel': found nothing, expected int8 of shape \(4, 8\)",
    ),
    "shared leaf missing": (
        lambda s: s.replace(shared=without(s.shared, "Dense_1")),
        r"shared, leaf 'Dense_1/kernel': found nothing",
    ),
    "another structure": (
        lambda s: s.replace(owner={**s.owner, "Dense_1": {"kernel": [s.owner["Dense_1"]["kernel"]]}}),
        "Dense_1/kernel",
    ),
    "integer weights": (
        lambda s: s.replace(shared=jax.tree.map(lambda w: w.astype(int), s.shared)),
        r"shared, leaf 'Dense_0/kernel': found int32\[4,8\], expected a float array",
    ),
    "owner dtype": (
        lambda s: s.replace(owner=jax.tree.map(lambda o: o.astype(jnp.int32), s.owner)),
        r"owner, leaf 'Dense_0/kernel': found int32\[4,8\], expected int8 of shape \(4, 8\)",
    ),
    "owner float": (lambda s: s.replace(owner=jax.tree.map(lambda o: o.astype(jnp.float32), s.owner)), "found float32"),
    "owner shape": (
        lambda s: s.replace(owner=jax.tree.map(lambda o: o[:1], s.owner)),
        r"owner, leaf 'Dense_0/kernel': found int8\[1,8\], expected int8 of shape \(4, 8\)",
    ),
    "negative id": (
        lambda s: s.replace(owner=jax.tree.map(lambda o: o - 4, s.owner)),
        r"owner, leaf 'Dense_0/kernel': found ids -3..-1, expected ids in 0..3",
    ),
    "unknown id": (
        lambda s: s.replace(owner=jax.tree.map(lambda o: o + 1, s.owner)),
        r"found ids 2..4, expected ids in 0..3. Owner ids are ids of tasks",
    ),
    "gap in ids": (lambda s: with_task(s, "c", id=4), r"tasks: found ids \[1, 2, 4\], expected ids 1..3 without a gap"),
    "id twice": (lambda s: with_task(s, "c", id=2), r"found ids \[1, 2, 2\]"),
    "id zero": (lambda s: with_task(s, "a", id=0), r"found ids \[0, 2, 3\]"),
    "older task not frozen": (
        lambda s: unfrozen(s, "a"),
        r"task 'a': found not frozen, expected frozen, because a later task exists",
    ),
    "digests cut off": (
        lambda s: with_task(s, "a", digests=s.tasks["a"].digests[1:]),
        r"digests of task 1: found uint8\[10,32\], expected uint8\[11,32\]",
    ),
    "digests of another kind": (
        lambda s: with_task(s, "c", digests=s.tasks["c"].digests.astype(jnp.int32)),
        r"digests of task 3: found int32\[11,32\], expected uint8\[11,32\], or bool before the task is frozen",
    ),
    "weights of another dtype": (
        lambda s: s.replace(shared=jax.tree.map(lambda w: w.astype(jnp.bfloat16), s.shared)),
        r"leaf 'shared/Dense_0/kernel': found bfloat16\[4,8\], expected float32\[4,8\]. Cast in the forward pass",
    ),
    "local variables of another dtype": (
        lambda s: with_task(s, "b", local=jax.tree.map(lambda v: v.astype(jnp.float16), s.tasks["b"].local)),
        r"task 'b', leaf 'local/batch_stats/BatchNorm_0/mean': found float16\[8\], expected float32",
    ),
    "a local variable missing": (
        lambda s: with_task(s, "b", local=without(s.tasks["b"].local, "batch_stats")),
        r"task 'b', leaf 'local/batch_stats/BatchNorm_0/mean': found nothing, expected float32",
    ),
    "a head of another dtype": (
        lambda s: with_task(s, "c", head=jax.tree.map(lambda v: v.astype(jnp.bfloat16), s.tasks["c"].head)),
        r"task 'c', leaf 'head/params/bias': found bfloat16\[2\], expected float32\[2\]",
    ),
    "a head of another shape": (
        lambda s: with_task(s, "c", head=jax.tree.map(lambda v: v[:1], s.tasks["c"].head)),
        r"task 'c', leaf 'head/params/bias': found float32\[1\], expected float32\[2\]",
    ),
    "a head without its bias": (
        lambda s: with_task(s, "c", head={"params": without(s.tasks["c"].head["params"], "bias")}),
        r"task 'c', leaf 'head/params/bias': found nothing, expected float32\[2\]",
    ),
    "unknown width": (
        lambda s: with_task(s, "b", width=2.0),
        r"task 'b': found width 2.0, expected one of the state's widths \[1.0\]",
    ),
    "unknown sharing": (
        lambda s: with_task(s, "c", sharing="none"),
        r"task 'c': found sharing 'none', expected one of",
    ),
    "growth that shrinks": (lambda s: s.replace(growth=(Growth(2.0, 1.0, None),)), r"growth: found 2.0 -> 1.0"),
    "growth to elsewhere": (lambda s: s.replace(growth=(Growth(0.5, 2.0, None),)), r"growth: found 0.5 -> 2.0"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_check_finds_each_broken_structural_law_and_names_the_place(third, name, tmp_path):
    change, message = BROKEN[name]
    broken = change(third)
    with pytest.raises(pae.StructureError, match=message):
        pae.check(broken)
    with pytest.raises(pae.StructureError, match=message):
        pae.save(tmp_path / "stage", broken)
    assert list(tmp_path.iterdir()) == []


def test_check_finds_tasks_that_would_run_at_a_narrower_width_than_the_one_before(third):
    state = third.replace(growth=(Growth(0.5, 1.0, None),))
    narrow = with_task(state, "b", width=0.5)
    with pytest.raises(
        pae.StructureError, match=r"task 'b': found width 0.5, expected at least that of the task before"
    ):
        pae.check(narrow)
    pae.check(with_task(state, "a", width=0.5))


def test_check_passes_every_phase(net, empty, packed, frozen, second, third):
    for state in (empty, packed, pae.prune(packed, "a", 1.0), frozen, second, third, pae.drop(third, "c")):
        pae.check(state)
        pae.check(state, net)


def test_check_with_the_net_finds_what_another_model_would_build(net, third, vector_module):
    wider = pae.linen(lambda width: vector_module(2 * width), jnp.zeros((1, 4)))
    with pytest.raises(
        pae.StructureError,
        match=r"state.shared, leaf 'Dense_0/kernel': found float32\[4,8\], expected float32\[4,16\].*this net\?",
    ):
        pae.check(third, wider)
    with pytest.raises(pae.StructureError, match="Was the state made with this net"):
        pae.check(third, pae.linen(pae.models.MLP, jnp.zeros((1, 4))))
    bare = third.replace(local=None, layout="{}")
    bare = with_task(bare, "b", local={"params": third.tasks["b"].local["params"]})
    bare = with_task(bare, "b", layout="{}", digests=third.tasks["b"].digests[:-2])
    pae.check(bare)
    with pytest.raises(pae.StructureError, match="local variables of task 2, leaf 'batch_stats/BatchNorm_0/mean'"):
        pae.check(bare, net)


def test_owners_after_a_leaf_without_weights_are_checked_too():
    shared = {"a": jnp.zeros((0, 3)), "b": jnp.zeros((2, 2))}
    owner = {"a": jnp.zeros((0, 3), jnp.int8), "b": jnp.full((2, 2), 7, jnp.int8)}
    state = State(shared=shared, owner=owner, tasks={}, width=1.0, layout=layout_of(shared=shared))
    with pytest.raises(pae.StructureError, match=r"owner, leaf 'b': found ids 7\.\.7, expected ids in 0\.\.0"):
        pae.check(state)
