"""Parts of weights: which form a leaf takes, and that taking and putting are inverse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pae_jax.training import places as of_places

DRAW = np.random.default_rng(0)


def owned(shape, *at):
    """Return owner ids of a leaf: 2 at the given index, 1 elsewhere."""
    owner = np.ones(shape, np.int8)
    owner[at] = 2
    return owner


def scattered(shape, count):
    owner = np.ones(shape, np.int8)
    owner.reshape(-1)[DRAW.choice(owner.size, count, replace=False)] = 2
    return owner


BLOCKS = {
    "columns": (owned((24, 32), slice(None), slice(28, 32)), (24, 4)),
    "rows": (owned((24, 32), [3, 7]), (2, 32)),
    "rows and columns": (owned((24, 32), slice(0, 24, 3), slice(1, 32, 4)), (8, 8)),
    "channels of a convolution": (owned((3, 3, 8, 16), ..., slice(12, 16)), (3, 3, 8, 4)),
    "axes apart": (owned((8, 4, 24), [1, 5], slice(None), slice(0, 9)), (2, 4, 9)),
    "one entry of a slice": (owned((24, 32), slice(0, 2), slice(0, 2)), (2, 2)),
}
ENTRIES = {
    "a matrix": (scattered((24, 32), 37), (1, 40)),
    "a kernel": (scattered((3, 3, 8, 16), 5), (1, 1, 1, 5)),
}


@pytest.mark.parametrize(("owner", "shape"), BLOCKS.values(), ids=BLOCKS)
def test_rows_and_columns_of_a_leaf_are_a_block(owner, shape):
    places = of_places.find(owner, 2)
    assert not places.scattered
    assert places.take(jnp.asarray(owner)).shape == shape
    assert (places.take(jnp.asarray(owner)) == 2).all()


@pytest.mark.parametrize(("owner", "shape"), ENTRIES.values(), ids=ENTRIES)
def test_few_single_weights_are_a_row_of_as_many_axes_filled_up_to_a_length_that_others_share(owner, shape):
    places = of_places.find(owner, 2)
    assert places.scattered
    found = np.asarray(places.take(jnp.asarray(owner)))
    assert found.shape == shape
    assert (found == 2).sum() == (owner == 2).sum()
    assert set(found.flat) <= {0, 2}  # 0 is outside the leaf: no task's


def test_what_is_not_small_and_what_is_tiny_is_trained_whole():
    assert of_places.find(owned((24, 32), slice(None), slice(0, 16)), 2) is None
    assert of_places.find(scattered((24, 32), 200), 2) is None
    assert of_places.find(owned((8, 8), 0), 2) is None
    assert of_places.find(np.ones((24, 32), np.int8), 2) is None


def test_a_block_with_holes_is_a_block_as_long_as_a_quarter_of_it_is_the_tasks():
    owner = owned((24, 32), slice(None), slice(24, 32))
    owner[::2, 24:28] = 1
    assert not of_places.find(owner, 2).scattered
    owner[:, 24:] = np.where(np.arange(24)[:, None] % 8 == np.arange(8)[None], 2, 1)
    assert of_places.find(owner, 2).scattered


@pytest.mark.parametrize("owner", [owner for owner, _ in (*BLOCKS.values(), *ENTRIES.values())])
def test_put_of_take_is_the_identity_and_put_changes_these_entries_alone(owner):
    places = of_places.find(owner, 2)
    leaf = jnp.asarray(DRAW.normal(size=owner.shape), jnp.float32)
    assert np.asarray(places.put(leaf, places.take(leaf))).tobytes() == np.asarray(leaf).tobytes()
    new = jnp.asarray(DRAW.normal(size=places.take(leaf).shape), jnp.float32)
    whole = np.asarray(jax.jit(places.put)(leaf, new))
    assert (whole == leaf)[owner == 1].all()
    assert (whole != leaf)[owner == 2].all()
    valid = np.asarray(places.take(jnp.ones(owner.shape))) == 1
    assert np.asarray(places.take(jnp.asarray(whole)))[valid].tobytes() == np.asarray(new)[valid].tobytes()


def test_places_follow_a_transposition():
    for owner, _ in (*BLOCKS.values(), *ENTRIES.values()):
        places, order = of_places.find(owner, 2), tuple(range(owner.ndim))[::-1]
        leaf = jnp.asarray(DRAW.normal(size=owner.shape), jnp.float32)
        turned = places.transposed(order).take(leaf.transpose(order))
        part = places.take(leaf)
        np.testing.assert_array_equal(turned, part if places.scattered else part.transpose(order))
