"""drop: any task that no later task can see goes, ids close up, and all others answer as before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pae_jax as pae

BINARY, TERNARY = pae.Picking(), pae.Picking(ternary=True)


def add(net, state, task, *, drawn=None, freeze=True, fraction=0.5, **options):
    """Pack, prune and freeze a task; `drawn` gives the score of each older weight from its owner."""
    state = pae.pack(net, state, task, head=2, key=jax.random.key(len(task)), **options)
    entry = state.tasks[task]
    if drawn is not None:
        pick = jax.tree.map(lambda o: jnp.asarray(drawn(np.asarray(o)), jnp.float32), state.owner)
        state = state.replace(tasks={**state.tasks, task: entry.replace(pick=pick)})
    state = pae.prune(state, task, fraction)
    return pae.freeze(state, task) if freeze else state


def blind_to(*ids):
    """Score weights of these owners 0 and others 0.1."""
    return lambda owner: np.where(np.isin(owner, ids), 0.0, 0.1)


def same_but(net, before, after, gone, x):
    pae.check(after, net)
    pae.verify(after)
    left = sorted((entry.id, name) for name, entry in before.tasks.items() if name != gone)
    assert {name: number for number, (_, name) in enumerate(left, 1)} == {n: e.id for n, e in after.tasks.items()}
    for _, name in left:
        np.testing.assert_array_equal(pae.predict(net, before, name, x), pae.predict(net, after, name, x))
    old, new = jax.tree.leaves(before.owner), jax.tree.leaves(after.owner)
    mine = [np.asarray(o) == before.tasks[gone].id for o in old]
    assert all((np.asarray(w)[m] == 0).all() for w, m in zip(jax.tree.leaves(after.shared), mine, strict=True))
    assert sum(int((np.asarray(o) > 0).sum()) for o in new) == sum(
        int(((np.asarray(o) > 0) & ~m).sum()) for o, m in zip(old, mine, strict=True)
    )


@pytest.fixture(scope="module")
def first(net, frozen):
    """Task "a", then "b" and "c", which see the weights of "a" and their own."""
    return add(net, add(net, frozen, "b", sharing="first"), "c", sharing="first")


def test_a_task_between_tasks_that_share_only_the_first_goes(net, first, data):
    dropped = pae.drop(first, "b")
    same_but(net, first, dropped, "b", data[0])
    again = pae.pack(net, dropped, "d", head=2, key=jax.random.key(1))
    assert again.tasks["d"].id == 3
    with pytest.raises(pae.PhaseError, match="task 'a' is older than tasks that can see its weights: 'b', 'c'"):
        pae.drop(first, "a")


@pytest.mark.parametrize("rule", [BINARY, TERNARY], ids=["binary", "ternary"])
def test_a_task_of_which_no_later_task_picks_a_weight_goes(net, frozen, data, rule):
    state = add(net, frozen, "b", sharing="picked", picking=rule)
    state = add(net, state, "c", drawn=blind_to(2), sharing="picked", picking=rule)
    same_but(net, state, pae.drop(state, "b"), "b", data[0])
    with pytest.raises(pae.PhaseError, match="'b', 'c'"):
        pae.drop(state, "a")
    blind = add(net, frozen, "b", drawn=blind_to(1), sharing="picked", picking=rule)
    same_but(net, blind, pae.drop(blind, "a"), "a", data[0])


def test_a_task_whose_weights_another_may_still_pick_stays(net, frozen):
    state = add(net, frozen, "b", drawn=blind_to(1), sharing="picked", freeze=False)
    with pytest.raises(pae.PhaseError, match="task 'a' is older than tasks that can see its weights: 'b'"):
        pae.drop(state, "a")
    assert list(pae.drop(state, "b").tasks) == ["a"]


def test_a_task_without_weights_goes_unless_sharing_the_first_would_then_mean_another(net, empty, data):
    nothing = add(net, empty, "a", fraction=1.0)
    for sharing in ("all", "first"):
        state = add(net, nothing, "b", sharing=sharing)
        same_but(net, state, pae.drop(state, "a"), "a", data[0])
    state = add(net, add(net, nothing, "b"), "c", sharing="first")
    with pytest.raises(pae.PhaseError, match="'c'"):
        pae.drop(state, "a")


def test_a_task_of_an_earlier_width_goes(net, first, data):
    state = add(net, pae.expand(net, first, width=1.5, key=jax.random.key(2)), "d", sharing="first")
    same_but(net, state, pae.drop(state, "c"), "c", data[0])


def test_drop_names_those_that_share_all_and_takes_them_from_the_newest_on(third):
    for task, later in (("a", "'b', 'c'"), ("b", "'c'")):
        with pytest.raises(pae.PhaseError, match=f"can see its weights: {later}. Valid calls: drop of {later}"):
            pae.drop(third, task)
    assert list(pae.drop(pae.drop(pae.drop(third, "c"), "b"), "a").tasks) == []


def test_drop_does_not_take_the_digests_of_a_damaged_task_anew(first):
    entry = first.tasks["c"]
    damaged = first.replace(tasks={**first.tasks, "c": entry.replace(head=jax.tree.map(lambda w: w + 1, entry.head))})
    with pytest.raises(pae.ForgettingError, match="task 'c'"):
        pae.drop(damaged, "b")


def test_only_the_newest_task_is_dropped_inside_jit(first):
    jax.jit(lambda state: pae.drop(state, "c"))(first)
    with pytest.raises(pae.ArgumentError, match="call it outside jit"):
        jax.jit(lambda state: pae.drop(state, "b"))(first)
