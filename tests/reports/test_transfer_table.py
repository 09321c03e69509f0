"""What tasks reuse of older ones, and what they gain over their own networks."""

import math

import jax
import numpy as np
import pytest

import pae_jax as pae

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def three(net, frozen):
    """Task "a" owns 40 of 80 weights, "b" 20 more and sees all of them, "c" the rest and sees only those of "a"."""
    state = pae.pack(net, frozen, "b", head=2, key=KEY)
    state = pae.freeze(pae.prune(state, "b", 0.5), "b")
    return pae.freeze(pae.pack(net, state, "c", head=2, key=KEY, sharing="first"), "c")


def test_shares_are_those_of_the_weights_in_use_by_owner(three):
    first, second, third = pae.transfer(three).rows
    assert (first["sees"], first["reused"], first["by"], first["picked"]) == (40, 0.0, {}, {})
    assert (second["sees"], second["reused"]) == (60, pytest.approx(2 / 3))
    assert second["by"] == {"a": pytest.approx(2 / 3)} and second["picked"] == {"a": 1.0}
    assert (third["sees"], third["by"]) == (60, {"a": pytest.approx(2 / 3), "b": 0.0})
    assert third["picked"] == {"a": 1.0, "b": 0.0}


def test_counts_per_layer_add_up_to_what_the_report_of_owners_says_a_task_sees(three):
    found = pae.transfer(three)
    assert found.leaves.keys() == pae.report(three).leaves.keys()
    total = np.sum(list(found.leaves.values()), axis=0)
    assert total.tolist() == [[40, 0, 0], [40, 20, 0], [40, 0, 20]]
    for row, counts in zip(pae.report(three).rows, total, strict=False):
        assert row["sees"] == counts.sum()


def test_of_picks_only_the_picked_weights_count_and_their_share_of_the_owner_is_told(net, frozen):
    rule = pae.Picking(top=0.4, own=True)
    state = pae.pack(net, frozen, "b", head=2, key=KEY, sharing="picked", picking=rule)
    for one in (state, pae.freeze(state, "b")):
        row = pae.transfer(one).rows[1]
        masks = zip(jax.tree.leaves(pae.masks(one, "b")), jax.tree.leaves(one.owner), strict=True)
        old = sum(int((np.asarray(seen) & (np.asarray(owner) == 1)).sum()) for seen, owner in masks)
        assert 0 < old < 32 == row["sees"]
        assert row["picked"] == {"a": old / 40} and row["by"] == {"a": old / 32}


def test_an_older_task_in_a_wider_network_is_counted_at_its_own_width(net, three):
    wide = pae.expand(net, three, width=1.5, key=KEY)
    assert pae.transfer(wide).rows == pae.transfer(three).rows


def test_the_gain_is_over_the_tasks_own_network_and_its_mean_leaves_out_the_first(three):
    found = pae.transfer(three, {"a": 0.9, "b": 0.8, "c": 0.7}, {"a": 0.5, "b": 0.7, "c": 0.9})
    assert [row["gain"] for row in found.rows] == pytest.approx([0.4, 0.1, -0.2])
    assert found.gain == pytest.approx(-0.05)
    some = pae.transfer(three, {"b": 0.8}, {"b": 0.7, "c": 0.9})
    assert [row["gain"] for row in some.rows] == [None, pytest.approx(0.1), None]
    assert math.isnan(pae.transfer(three).gain)


def test_metrics_of_other_tasks_or_that_are_no_numbers_are_refused(three):
    with pytest.raises(pae.UnknownTaskError, match="unknown task 'z'"):
        pae.transfer(three, {"z": 0.5})
    with pytest.raises(pae.ArgumentError, match="alone of task 'a' must be"):
        pae.transfer(three, alone={"a": math.nan})


def test_the_report_shows_itself_as_text_page_and_picture(three, empty):
    found = pae.transfer(three, {"b": 0.8}, {"b": 0.7})
    lines = str(found).splitlines()
    assert lines[0].split() == ["task", "learned", "alone", "gain", "sees", "reused", "of", "a", "of", "b"]
    assert lines[2].split() == ["b", "0.8000", "0.7000", "+0.1000", "60", "66.7%", "66.7%"]
    assert found._repr_html_().count("<tr>") == 4
    assert "learned" not in str(pae.transfer(three))
    assert len(found.plot().axes) == 3 and len(pae.transfer(three).plot().axes) == 2
    assert pae.transfer(empty).rows == []
    assert str(pae.transfer(empty)).split() == ["task", "sees", "reused"]


def test_there_is_no_plot_of_a_network_without_tasks(empty):
    with pytest.raises(pae.ArgumentError, match="no tasks to plot"):
        pae.transfer(empty).plot()
