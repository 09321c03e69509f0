"""The code of owners and picks: exact, close to its entropy, and refused when it is not what was written."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pae_jax as pae
from pae_jax.storage.bundle.coding import code_length, counts_of, decode, encode, entropy_bits


def coded(leaves, size):
    counts = [counts_of(leaf, size) for leaf in leaves]
    return encode(leaves, counts), counts


def drawn(shares, length, seed=0):
    return np.random.default_rng(seed).choice(len(shares), size=length, p=shares).astype(np.uint8)


@given(st.lists(st.lists(st.integers(0, 127), max_size=300), min_size=1, max_size=4))
def test_symbols_come_back(leaves):
    leaves = [np.asarray(leaf, np.uint8) for leaf in leaves]
    stream, counts = coded(leaves, 128)
    for found, leaf in zip(decode(stream, [leaf.size for leaf in leaves], counts), leaves, strict=True):
        np.testing.assert_array_equal(found, leaf)


SHARES = {
    "two alike": [0.5, 0.5],
    "eight tasks": [0.44, *[0.07] * 8],
    "nearly all free": [0.99, 0.004, 0.006],
    "two frequent owners": [0.9, 0.0995, 0.0005],
    "a rare owner": [0.6, 0.39999, 0.00001],
    "20 tasks": [0.4, 0.2, *[0.02] * 20],
    "127 tasks": [1 / 128] * 128,
}


@pytest.mark.parametrize("name", SHARES)
def test_the_code_takes_at_most_5_percent_more_than_the_entropy(name):
    leaves = [drawn(SHARES[name], size) for size in (300, 150_000, 40, 50_000, *[700] * 20)]
    stream, counts = coded(leaves, 128)
    assert 0.999 < code_length(stream, counts) < 1.05
    for found, leaf in zip(decode(stream, [leaf.size for leaf in leaves], counts), leaves, strict=True):
        np.testing.assert_array_equal(found, leaf)


def test_owners_in_long_runs_cost_no_more_than_as_many_in_disorder():
    leaf = np.repeat(np.asarray([0, 2, 0, 1], np.uint8), [600_000, 2000, 300_000, 3000])
    stream, counts = coded([leaf], 3)
    assert code_length(stream, counts) < 1
    np.testing.assert_array_equal(decode(stream, [leaf.size], counts)[0], leaf)


def test_leaves_of_other_owners_do_not_share_a_code():
    leaves = [drawn(shares, 20_000) for shares in ([0.9, 0.05, 0.05], [0.05, 0.9, 0.05]) * 3]
    stream, counts = coded(leaves, 3)
    assert code_length(stream, counts) < 1.1
    for found, leaf in zip(decode(stream, [leaf.size for leaf in leaves], counts), leaves, strict=True):
        np.testing.assert_array_equal(found, leaf)


def test_a_leaf_of_one_owner_costs_nothing():
    stream, counts = coded([np.full(10**5, 3, np.uint8), np.zeros(0, np.uint8)], 4)
    assert stream.size == 0
    assert entropy_bits(counts) == 0
    found = decode(stream, [10**5, 0], counts)
    assert (found[0] == 3).all()
    assert found[1].size == 0


def test_a_stream_or_counts_that_were_changed_are_refused():
    leaf = drawn([0.3, 0.5, 0.2], 4000)
    stream, counts = coded([leaf], 3)
    draw = np.random.default_rng(1)
    for place in draw.integers(0, stream.size - 5, 100):  # not the bits that fill up the last byte of the code
        changed = stream.copy()
        changed[place] ^= 1 << draw.integers(0, 8)
        if place != 4:  # one leaf begins a code, whatever the first piece says
            with pytest.raises(pae.CheckpointError):
                decode(changed, [leaf.size], counts)
    for bad in (stream[:-2], stream[:3], stream[:0], stream[:-1], np.append(stream, np.zeros(2, np.uint8))):
        with pytest.raises(pae.CheckpointError):
            decode(bad, [leaf.size], counts)
    with pytest.raises(pae.CheckpointError, match="sum to 4000, expected 10000000000"):
        decode(stream, [10**10], counts)
    for wrong in ([1, -1, 0], [0, -counts[0][1], counts[0][1]]):
        with pytest.raises(pae.CheckpointError):
            decode(stream, [leaf.size], [counts[0] + wrong])
    with pytest.raises(pae.CheckpointError):
        decode(stream, [4000], [np.asarray([4000, 0, 0])])
