"""Lifelong runs of several processes, each started on its own, beside the same runs of this process."""

import json
import runpy
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import pae_jax as pae
from pae_jax import processes
from pae_jax.comparing import difference
from pae_jax.lifelong.task_folder import TaskFolder
from pae_jax.processes import Processes, together

SCRIPT = Path(__file__).parent / "learning_process.py"
program = runpy.run_path(str(SCRIPT))


def keep_the_first_task(run, copy):
    """Leave a run as if it had been killed when it began with the second task."""
    shutil.copytree(run, copy)
    for folder in ("02-b", "03-c"):
        shutil.rmtree(copy / folder)
    return copy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def empty(folder):
    """The network before the first task; processes that compile otherwise would draw other bits."""
    state = pae.init(program["NET"], jax.random.key(0))
    pae.save(folder / "empty", state)
    return state


@pytest.fixture(scope="module")
def one(folder, empty):
    """The run of one process."""
    return program["facts"](program["learn"](empty, folder / "one"))


@pytest.fixture(scope="module")
def two(folder, one, free_port, run_together):
    """What two processes ended with, and how they ended."""
    keep_the_first_task(folder / "one", folder / "begun")
    address = f"localhost:{free_port()}"
    ends = run_together([([SCRIPT, address, 2, number, folder], {}) for number in range(2)])
    for number in range(2):
        assert (folder / f"errors-{number}.json").exists(), ends[number][0][-3000:]
    return ends


def ended(folder, name, number):
    return dict(np.load(folder / f"{name}-{number}.npz"))


def errors(folder, what):
    both = (json.loads((folder / f"errors-{number}.json").read_text()) for number in range(2))
    return [next(found[1:] for found in one if found[0] == what) for one in both]


def require_equal_to_summation_order(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if name.startswith(("owner", "scores", "accuracies")):
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        elif name.startswith("shared"):
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def table(path):
    return (path / "stages.csv").read_text()


def test_the_run_has_three_tasks_and_grows(one):
    assert [one[f"scores/{task}"][2] for task in "abc"] == pytest.approx([1.0, 1.5**0.5, 1.5**0.5])
    assert {int(n) for path in one if path.startswith("owner") for n in np.unique(one[path])} >= {1, 2, 3}


@pytest.mark.parametrize("name", ["joint", "begun"])
def test_two_processes_learn_what_one_learns_up_to_the_order_of_summation(two, folder, one, name):
    require_equal_to_summation_order(ended(folder, name, 0), one)
    assert table(folder / name) == table(folder / "one")


@pytest.mark.parametrize("name", ["joint", "begun"])
def test_both_processes_end_with_the_same_bits_and_decisions(two, folder, name):
    first, second = ended(folder, name, 0), ended(folder, name, 1)
    assert first.keys() == second.keys()
    assert all(first[path].tobytes() == second[path].tobytes() for path in first)


def test_one_process_writes_each_event_once(two, folder):
    def happened(run):
        lines = map(json.loads, (folder / run / "events.jsonl").read_text().splitlines())
        return [(line["event"], line["folder"], line.get("stage")) for line in lines]

    assert happened("joint") == happened("one")


@pytest.mark.parametrize(("begun", "resumed"), [("one", "begun"), ("joint", "again")])
def test_a_run_goes_on_with_another_number_of_processes_and_keeps_every_frozen_bit(
    two, folder, empty, one, begun, resumed
):
    if resumed == "again":
        copy = keep_the_first_task(folder / begun, folder / resumed)
        require_equal_to_summation_order(program["facts"](program["learn"](empty, copy)), one)
    before = pae.read_metadata(folder / begun / "01-a" / "frozen")["tasks"][0]["digests"]
    after = pae.read_metadata(folder / resumed / "03-c" / "frozen")["tasks"][0]["digests"]
    assert after == before


def test_processes_that_were_given_other_data_all_refuse_and_one_names_it(two, folder):
    first, second = errors(folder, "other data")
    assert second[0] == first[0] == "ProcessError"
    assert "task a: 'data.train.0' is" in second[1]
    assert "process 1 failed: ProcessError: task a: 'data.train.0'" in first[1]


def test_processes_that_make_other_calls_all_refuse(two, folder):
    first, second = errors(folder, "another call")
    assert second[0] == first[0] == "ProcessError"
    assert "process 1 is at 'task a' and process 0 at 'order'" in second[1]


def test_an_error_of_the_process_that_writes_ends_all_in_seconds(two, folder):
    first, second = errors(folder, "full disk")
    assert first[:2] == ["CheckpointError", f"cannot write the stage {folder}/fault/01-a/0-trained: the disk is full"]
    assert second[0] == "ProcessError"
    assert second[1].startswith("process 0 failed: CheckpointError: cannot write the stage")
    assert second[2] < first[2] + 30


def test_a_process_that_waits_in_a_collective_for_one_that_was_interrupted_is_ended_with_its_error(two):
    (first, _), (second, status) = two
    assert "KeyboardInterrupt" in first
    assert "pae_jax.ProcessError: process 0 failed: KeyboardInterrupt. Start all processes again" in second
    assert status == 1


def test_one_process_asks_nobody():
    with together("learn", None) as alone:
        assert alone.alone and alone.first
        assert alone.ask("anything", lambda: object) is object
        alone.require_same("anything", object)
        alone.meet("anywhere")
    assert Processes().first


class Silence:
    """The service of a job in which nobody else says anything."""

    def key_value_set(self, key, value):
        pass

    def key_value_try_get(self, key):
        raise jax.errors.JaxRuntimeError(f"NOT_FOUND: {key}")

    def blocking_key_value_get(self, key, milliseconds):
        raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: {key}")


@pytest.fixture
def silence(monkeypatch):
    monkeypatch.setattr(processes, "_service", Silence)
    monkeypatch.setattr(processes, "_POLL", 0.0)


@pytest.mark.parametrize("me", [0, 1])
def test_a_call_that_another_process_does_not_make_ends_in_bounded_time(silence, monkeypatch, me):
    monkeypatch.setattr(jax, "process_index", lambda: me)
    with pytest.raises(pae.ProcessError, match=f"process {me} waited 0.1 s for the others to make the same call"):
        Processes((0, 1), "call").meet("begin", 0.1)


def test_only_an_error_of_xlas_network_says_that_another_process_has_ended(silence):
    lost = Processes((0, 1), "call")._lost
    assert "another process has ended: UNKNOWN: Gloo all-reduce" in str(lost(ValueError("UNKNOWN: Gloo all-reduce")))
    for error in (ValueError("labels"), ConnectionError("connection refused"), pae.DataError("connection")):
        assert lost(error) is None


def test_a_stage_that_one_process_does_not_see_is_named(silence, tmp_path):
    folder = TaskFolder(tmp_path, None, Processes((0, 1), "call"), background=False)
    with pytest.raises(pae.CheckpointError, match=r"process 0 does not see .*0-trained, which another process has"):
        folder._load(None, "0-trained", {})


def test_a_run_folder_needs_the_devices_of_all_processes(monkeypatch, tmp_path, empty):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(pae.ArgumentError, match="run= in a job of 2 processes needs devices= of all of them, found 1"):
        program["learn"](empty, tmp_path)


def test_a_mesh_without_a_device_of_this_process_is_refused(monkeypatch):
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    with pytest.raises(pae.ArgumentError, match="process 3 has no device in the mesh"):
        together("learn", mesh.devices.flat).__enter__()


@pytest.mark.parametrize(
    ("found", "mine", "expected"),
    [
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}, None),
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, ("a[1].b", 2, 3)),
        ({"a": 1}, {}, ("a", 1, None)),
        ([1], [1, 2], ("", [1], [1, 2])),
        ({"a": float("nan")}, {"a": float("nan")}, None),
    ],
)
def test_the_first_difference_of_json_is_named_by_its_path(found, mine, expected):
    assert difference(found, mine) == expected
