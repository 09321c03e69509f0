"""Axis terms: whatever unification says, the index maps agree."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pae_jax.widening import terms
from pae_jax.widening.terms import Clash, copies, cut, factor, factors, index_map, joined, opened, product, unify

sizes = st.tuples(st.integers(0, 3), st.integers(0, 3)).map(lambda s: (s[0], s[0] + s[1]))
leaf = sizes.map(lambda s: opened(*s))
term = st.recursive(
    leaf,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(joined) | st.lists(inner, min_size=1, max_size=2).map(product)
    ),
    max_leaves=5,
)


def is_map(t):
    index = index_map(t)
    return len(index) == t.n and len(set(index.tolist())) == t.n and all(0 <= i < t.w for i in index)


@given(term)
def test_every_term_is_an_injective_map(t):
    assert is_map(t)
    assert (t.n != t.w) or index_map(t).tolist() == list(range(t.n))


@given(term, term)
def test_unified_terms_are_one_map(a, b):
    try:
        unify(a, b)
    except Clash:
        return
    assert np.array_equal(index_map(a), index_map(b)) and is_map(a)


@settings(max_examples=200)
@given(st.lists(leaf, min_size=1, max_size=4), st.lists(leaf, min_size=1, max_size=4))
def test_concatenations_of_the_same_total_unify_or_clash(left, right):
    a = joined(left)
    rest = (a.n - sum(t.n for t in right), a.w - sum(t.w for t in right))
    if not 0 <= rest[0] <= rest[1]:
        return
    b = joined([*right, opened(*rest)])
    try:
        unify(a, b)
    except Clash:
        return
    assert np.array_equal(index_map(a), index_map(b))
    offset = 0
    for part in left:
        index = index_map(a)[offset : offset + part.n]
        assert np.all(np.diff(index - index_map(part)) == 0)
        offset += part.n


@given(term, st.data())
def test_a_cut_keeps_the_map(t, data):
    n = data.draw(st.integers(0, t.n))
    w = data.draw(st.integers(0, t.w))
    try:
        head, tail = cut(t, n, w)
    except Clash:
        return
    assert (head.n, head.w) == (n, w)
    assert np.array_equal(index_map(t), np.concatenate([index_map(head), index_map(tail) + w]))


@given(term, st.data())
def test_a_factor_keeps_the_map(t, data):
    n = data.draw(st.integers(1, 4))
    w = data.draw(st.integers(n, 6))
    try:
        lead, trail = factor(t, n, w)
    except Clash:
        return
    assert (trail.n, trail.w) == (n, w)
    outer, inner = index_map(lead), index_map(trail)
    assert np.array_equal(index_map(t), (outer[:, None] * w + inner[None]).reshape(-1))


def test_a_concatenation_of_equal_halves_is_a_product():
    half, other = opened(2, 3), opened(2, 3)
    two = joined((half, other))
    lead, trail = factors(two, [(2, 2), (2, 3)])
    assert (lead.n, lead.w) == (2, 2) and (trail.n, trail.w) == (2, 3)
    unify(half, terms.given([2, 0], 3))
    assert index_map(two).tolist() == [2, 0, 5, 3] == index_map(product((lead, trail))).tolist()


def test_a_cut_through_a_product_follows_its_factors():
    inner = opened(2, 3)
    head, tail = cut(product((terms.Same(3), inner)), 3, 5)
    unify(head, joined((opened(2, 3), opened(1, 2))))
    assert np.array_equal(
        np.concatenate([index_map(head), index_map(tail) + 5]), index_map(product((terms.Same(3), inner)))
    )


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (opened(2, 3), opened(2, 4)),
        (terms.given([0, 2], 3), terms.given([0, 1], 3)),
        (joined((terms.Same(2), opened(1, 3))), joined((opened(1, 3), terms.Same(2)))),
        (product((terms.Same(2), opened(2, 3))), terms.given([0, 1, 2, 3], 6)),
    ],
)
def test_clashes(a, b):
    with pytest.raises(Clash):
        unify(a, b)


def test_broadcast_axes_take_any_map():
    fixed = terms.given([1, 2], 4)
    unify(copies(2, 4), fixed)
    unify(fixed, copies(2, 4))
    assert index_map(fixed).tolist() == [1, 2]


def test_axes_that_do_not_grow_never_permute():
    with pytest.raises(Clash):
        terms.given([1, 0], 2)
    with pytest.raises(Clash):
        opened(3, 2)
