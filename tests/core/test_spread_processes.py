"""Networks spread over the devices of 2 and of 4 processes; what these do is in `spread_process.py`."""

import json
import os
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

import pae_jax as pae
from pae_jax.storage import digests
from pae_jax.trees import flatten

SCRIPT = Path(__file__).parent / "spread_process.py"
life = runpy.run_path(str(SCRIPT.with_name("eight_devices.py")))


@pytest.fixture(scope="module")
def launched(folder, free_port, run_together):
    """Return a function that runs so many processes of 2 devices each; it returns what each of them found."""

    def run(count):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
        environment = {"XLA_FLAGS": flags}
        words = [SCRIPT, f"localhost:{free_port()}", count]
        for output, status in run_together([([*words, n, folder], environment) for n in range(count)], timeout=300):
            assert status == 0, output[-3000:]
        return [json.loads((folder / f"found-{count}-{number}.json").read_text()) for number in range(count)]

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("spread")


@pytest.fixture(scope="module")
def two(launched):
    return launched(2)


@pytest.fixture(scope="module")
def one(folder, spread_net):
    """The network of one process on one device."""
    state = life["story"](spread_net, pae.init(spread_net, jax.random.key(0)))[-1]
    pae.save(folder / "alone", state)
    return state


@pytest.fixture(scope="module")
def four(one, two, launched):
    return launched(4)


@pytest.fixture(scope="module")
def spread_net():
    return pae.linen(life["Backbone"], life["X"][:1])


def test_the_processes_really_had_that_many_devices(two, four):
    assert [found["devices"] for found in (*two, *four)] == [4, 4, 8, 8, 8, 8]


def test_a_spread_network_has_the_owners_and_the_frozen_bits_of_one_on_one_device(one, two, folder, spread_net):
    spread = pae.load(spread_net, folder / "stage")
    for path, owner in flatten(one.owner).items():
        np.testing.assert_array_equal(flatten(spread.owner)[path], owner, err_msg=path)
    for name in "ab":
        np.testing.assert_array_equal(spread.tasks[name].digests, one.tasks[name].digests)


def test_every_operation_keeps_the_layout(two, four):
    assert all(all(found["kept"]) for found in (*two, *four))


def test_the_outputs_of_a_frozen_task_keep_their_bits_through_every_operation_and_in_every_process(two, four):
    for processes in (two, four):
        assert len({answer for found in processes for answer in found["answers"]}) == 1
    assert [found["learned"] for found in two] == [[two[0]["answers"][0], "frozen"]] * 2


def test_no_whole_array_goes_to_a_host_in_any_step(two):
    """The kernel of the second layer has 1024 bytes at width 1 and 2304 at width 1.5; each device holds a fourth."""
    for found in two:
        assert len(found["hosted"]) == 10
        assert max(found["hosted"][step] for step in ("prune leaf", "prune global", "train", "predict", "serve")) < 64
        assert max(found["hosted"][step] for step in ("expand", "freeze", "save", "load")) <= 1024 / 4
        assert found["hosted"]["verify"] == 2304 / 4


def test_what_is_saved_together_is_read_with_the_same_bits_by_one_process_by_the_same_and_by_more(
    one, two, four, folder, spread_net
):
    wanted = two[0]["digests"][0]
    assert all(bits == wanted for found in (*two, *four) for bits in found["digests"])
    for found in two:
        assert found["bundled"].items() <= wanted.items()  # a bundle holds what its tasks need
        assert {path.split("/")[0] for path in found["bundled"]} == {"shared", "owner", "tasks"}
    assert digests(pae.load(spread_net, folder / "stage")) == wanted
    assert all(found["alone"] == digests(one) for found in four)
    moved = pae.load(spread_net, folder / "moved")
    pae.verify(moved)
    assert [entry.phase for entry in moved.tasks.values()] == ["frozen"] * 3


def test_the_bytes_of_a_device_fall_with_the_number_of_devices_as_the_formula_says(two, four, spread_net):
    for found, width in ((two, 1.0), (four, 1.5)):
        layout = spread_net.layout(width)
        n, local = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (layout.shared, layout.local))
        statistics = sum(leaf.size for leaf in jax.tree.leaves(layout.local["batch_stats"]))
        head, devices = 2 * int(16 * width) + 2, found[0]["devices"]
        adam = 13 * n / devices + 12 * (local + head) - 8 * statistics
        assert [one["held"] for one in found] == [[5 * n / devices, adam]] * len(found)


@pytest.mark.parametrize("call", ["write_bundle", "slim", "export"])
def test_what_needs_whole_arrays_is_refused_with_the_remedy(two, call):
    for found in two:
        kind, text = found["refused"][call]
        assert kind == "ArgumentError" and f"{call} needs whole arrays" in text
        assert f"Save the network by pae.save in all of them; then call {call} in one process" in text


def test_saving_in_the_background_and_a_run_folder_are_refused_before_anything_is_written(two, folder):
    for found in two:
        assert found["refused"]["wait"][1].startswith("wait=False cannot save arrays that are spread over several")
        assert "Learn without run= and pae.save the outcome" in found["refused"]["run"][1]
    assert list((folder / "run").iterdir()) == []


def test_a_stage_that_exists_or_that_two_processes_mean_otherwise_ends_all(two):
    first, second = (found["refused"] for found in two)
    assert first["exists"][0] == "CheckpointError" and "stage exists; a stage is written once" in first["exists"][1]
    assert second["exists"][0] == "ProcessError" and "process 0 failed: CheckpointError" in second["exists"][1]
    assert "the stage: 'metadata.number' is 1 in process 1 and 0 in process 0" in second["metadata"][1]
    assert first["metadata"][0] == "ProcessError"


def test_of_a_stage_that_one_process_cannot_write_nothing_is_left(two, four, folder):
    first, second = (found["refused"]["disk"] for found in two)
    assert second[0] == "CheckpointError" and "no: the disk is full. Earlier stages are untouched." in second[1]
    assert first[0] == "ProcessError" and "process 1 failed: CheckpointError: cannot write the stage" in first[1]
    names = {path.name for path in folder.iterdir() if not path.name.startswith("found")}
    assert names == {"stage", "first", "moved", "bundle", "run", "alone"}


def test_a_process_that_saves_alone_waits_no_longer_than_it_was_told(two):
    kind, text = two[1]["refused"]["alone"]
    assert kind == "ProcessError" and "waited 0.5 s for the others to make the same call" in text
