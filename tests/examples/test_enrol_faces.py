"""The demo in small: two groups of two people, every stage of the real run."""

import dataclasses
import json

import numpy as np
import pytest

from pae_jax import data
from pae_jax.errors import CheckpointError
from pae_jax.lifelong.recipes import Ladder


@pytest.fixture(scope="module")
def demo(program):
    return program("enrol_faces.py")


@pytest.fixture(scope="module")
def enrol(demo):
    """Enrol two groups with short trainings."""
    groups = data.groups(data.load_orl(), people=2)[:2]
    train, ladder = demo.RECIPE.train, demo.RECIPE.ladder
    short = dataclasses.replace(train, epochs=2)
    recipe = dataclasses.replace(
        demo.RECIPE, train=short, ladder=Ladder((0.5,), dataclasses.replace(short, epochs=1), ladder.ramp / 3)
    )
    return lambda out, seed=0: demo.enrol(out, seed, groups, recipe)


@pytest.fixture(scope="module")
def finished(enrol, tmp_path_factory):
    out = tmp_path_factory.mktemp("enrolment")
    return out, enrol(out)


def test_two_groups_are_enrolled_bit_for_bit_beside_their_own_networks(finished):
    _, facts = finished
    assert [row["group"] for row in facts["groups"]] == ["people_1_to_2", "people_3_to_4"]
    assert facts["all_bits_equal"] is True and facts["forgetting"] == 0.0
    for row in facts["groups"]:
        assert row["learned"] == row["now"]
        assert 0 <= row["separate"] <= 1
    shares = [row["share"] for row in facts["groups"]]
    assert facts["groups"][-1]["free_after"] == pytest.approx(1 - sum(shares))
    assert facts["stored_bytes"]["one_network"] < facts["stored_bytes"]["separate_networks"]


def test_the_report_has_its_table_its_numbers_and_its_pictures(finished, demo):
    out, facts = finished
    assert json.loads((out / "report" / "results.json").read_text()) == json.loads(json.dumps(facts))
    page = (out / "report" / "index.html").read_text()
    for name in ("ownership", "pruning", "accuracy_matrix", "faces"):
        assert (out / "report" / f"{name}.png").stat().st_size > 1000
        assert f"{name}.png" in page
    assert "AT&amp;T Laboratories" in page
    lines = demo.report.table(facts).splitlines()
    assert lines[1].split()[0] == "people_1_to_2"
    assert "2 separate networks" in lines[4]


def test_the_same_command_goes_on_and_another_seed_is_refused(finished, enrol):
    out, facts = finished
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/frozen")}
    assert len(before) == 4
    assert {**enrol(out), "seconds": 0} == {**facts, "seconds": 0}
    with pytest.raises(CheckpointError, match="other settings: 'key"):
        enrol(out, seed=1)
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/frozen")} == before


def test_validation_images_are_shifted_and_test_images_are_as_they_are(demo):
    group = data.groups(data.load_orl(), people=2)[0]
    task = demo.task_of(group)
    assert len(task.train[0]) == 18 * len(group.train[0])
    assert len(task.val[0]) == 9 * len(group.val[0])
    np.testing.assert_array_equal(task.test[0], group.test[0])
