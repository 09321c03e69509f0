"""The owner algebra on small arrays that one can check by eye."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pae_jax as pae
from pae_jax.core import ownership

OWNER = {"w": jnp.array([[0, 1, 2], [3, 0, 2]], jnp.int8), "v": jnp.array([[127, 1]], jnp.int8)}


@pytest.mark.parametrize(
    ("task_id", "sharing", "w", "v"),
    [
        (1, "all", [[0, 1, 0], [0, 0, 0]], [[0, 1]]),
        (2, "all", [[0, 1, 1], [0, 0, 1]], [[0, 1]]),
        (3, "first", [[0, 1, 0], [1, 0, 0]], [[0, 1]]),
        (127, "all", [[0, 1, 1], [1, 0, 1]], [[1, 1]]),
        (127, "first", [[0, 1, 0], [0, 0, 0]], [[1, 1]]),
        (1, "first", [[0, 1, 0], [0, 0, 0]], [[0, 1]]),
    ],
)
def test_visible_is_one_to_k_or_one_and_k(task_id, sharing, w, v):
    mask = ownership.visible(OWNER, ownership.id_array(task_id), sharing)
    np.testing.assert_array_equal(mask["w"], np.array(w, bool))
    np.testing.assert_array_equal(mask["v"], np.array(v, bool))


def test_no_free_weight_is_visible_to_any_task_under_any_sharing():
    for task_id in range(1, 128):
        for sharing in ("all", "first"):
            mask = ownership.visible(OWNER, ownership.id_array(task_id), sharing)
            assert not np.asarray(mask["w"])[np.asarray(OWNER["w"]) == 0].any()


def test_claim_takes_what_is_free_and_release_gives_back_zeros():
    claimed = ownership.claim(OWNER, ownership.id_array(5))
    np.testing.assert_array_equal(claimed["w"], [[5, 1, 2], [3, 5, 2]])
    assert claimed["w"].dtype == jnp.int8
    shared = {"w": -jnp.ones((2, 3), jnp.bfloat16), "v": jnp.full((1, 2), jnp.nan)}
    freed = {"w": claimed["w"] == 5, "v": OWNER["v"] == 127}
    weights, owner = ownership.release(shared, claimed, freed)
    np.testing.assert_array_equal(owner["w"], OWNER["w"])
    np.testing.assert_array_equal(owner["v"], [[0, 1]])
    assert weights["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(weights["w"], np.float32), [[0, -1, -1], [-1, 0, -1]])
    assert not np.signbit(np.asarray(weights["w"], np.float32))[0, 0]
    np.testing.assert_array_equal(weights["v"], [[0, np.nan]])


def test_select_stops_nan_where_a_product_with_the_mask_would_not():
    found = ownership.select({"w": jnp.array([True, False])}, {"w": jnp.array([1.0, jnp.nan])})
    np.testing.assert_array_equal(found["w"], [1.0, 0.0])


def test_masks_and_trainable_run_under_strict_dtype_promotion(third):
    with jax.numpy_dtype_promotion("strict"):
        pae.masks(third, "c")
        pae.trainable(third, "c")
        pae.free_fraction(third)
        ownership.select(pae.masks(third, "a"), third.shared)


def test_trainable_is_what_the_newest_task_owns_until_it_is_frozen(second):
    for mask, o in zip(jax.tree.leaves(pae.trainable(second, "b")), jax.tree.leaves(second.owner), strict=True):
        np.testing.assert_array_equal(mask, np.asarray(o) == 2)
        assert mask.dtype == bool
    for task, state in (("a", second), ("b", pae.freeze(second, "b"))):
        assert not any(np.asarray(m).any() for m in jax.tree.leaves(pae.trainable(state, task)))


def test_trainable_sets_of_all_tasks_and_the_free_weights_partition_the_network(third):
    counts = ownership.owner_counts(third)
    for path, count in counts.items():
        assert count.sum() == np.prod([4, 8] if path.startswith("Dense_0") else [8, 6])
    assert sum(count[0] for count in counts.values()) / 80 == pae.free_fraction(third)


def test_the_free_fraction_is_the_share_of_weights_that_no_task_owns(packed):
    assert pae.free_fraction(packed) == 0.0
    assert pae.free_fraction(pae.prune(packed, "a", 1.0)) == 1.0
    assert pae.free_fraction(pae.prune(packed, "a", 0.5)) == 0.5
    assert isinstance(pae.free_fraction(packed), float)
