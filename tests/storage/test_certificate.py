"""A certificate says which tasks compute with the same bits, whatever else has changed."""

import json
from datetime import UTC, datetime

import jax
import pytest

import pae_jax as pae
from pae_jax.storage.bundle import with_digests

TIME = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.fixture(scope="module")
def both(net, frozen):
    """Two frozen tasks, the second sharing only the first."""
    state = pae.pack(net, frozen, "b", head=2, key=jax.random.key(1), sharing="first")
    return pae.freeze(pae.prune(state, "b", 0.5), "b")


def test_old_tasks_are_identical_through_pack_freeze_and_expand(net, frozen, both):
    wide = pae.pack(net, pae.expand(net, both, width=1.5, key=jax.random.key(2)), "c", head=2, key=jax.random.key(3))
    found = pae.certificate(frozen, wide, time=TIME)
    assert found.holds
    assert found.identical == ("a",)
    assert [proof.task for proof in found.proofs] == ["a", "b"]  # "c" is not frozen
    text = str(found)
    assert text.startswith(
        "1 of 1 frozen tasks are bit-identical, compared on 2026-01-02T00:00:00+00:00\n- a: identical"
    )
    assert "- b: new, SHA-256" in text
    again = json.loads(json.dumps(found.to_json()))
    assert again["tasks"][0]["before"] == again["tasks"][0]["after"]
    assert again["versions"]["pae_jax"] == pae.__version__


def test_ids_that_closed_up_and_owners_that_were_joined_make_no_difference(net, frozen, both, tmp_path):
    three = pae.freeze(pae.pack(net, both, "c", head=2, key=jax.random.key(3), sharing="first"), "c")
    dropped = pae.certificate(three, pae.drop(three, "b"), time=TIME)
    assert dropped.identical == ("a", "c")
    assert not dropped.holds
    assert "- b: no longer there" in str(dropped)
    pae.write_bundle(tmp_path / "c", net, three, tasks=["c"])
    assert pae.certificate(three, pae.read_bundle(net, tmp_path / "c"), time=TIME).identical == ("c",)


def test_a_task_that_was_rounded_is_not_identical_and_its_arrays_are_named(net, both, tmp_path):
    pae.write_bundle(tmp_path / "file", net, both, weights="int8")
    found = pae.certificate(both, pae.read_bundle(net, tmp_path / "file"), time=TIME)
    assert found.identical == ()
    assert not found.holds
    assert found.proofs[0].differing == ("weights/Dense_0/kernel", "weights/Dense_1/kernel")
    assert "- a: NOT identical, 'weights/Dense_0/kernel' and 1 more differ" in str(found)


def test_an_older_weight_that_a_task_uses_counts(both):
    odd = both.replace(shared=jax.tree.map(lambda w: -w, both.shared))
    found = pae.certificate(both, with_digests(odd, {"a", "b"}), time=TIME)
    assert found.identical == ()


def test_a_damaged_state_gets_no_certificate(both):
    damaged = both.replace(shared=jax.tree.map(lambda w: -w, both.shared))
    for states in ((both, damaged), (damaged, both)):
        with pytest.raises(pae.ForgettingError, match="task 'a'"):
            pae.certificate(*states)


def test_the_time_is_an_argument_or_read_once(both):
    assert pae.certificate(both, both, time="noon").time == "noon"
    assert datetime.fromisoformat(pae.certificate(both, both).time).tzinfo is not None
    with pytest.raises(pae.ArgumentError, match="time must be"):
        pae.certificate(both, both, time=3)
