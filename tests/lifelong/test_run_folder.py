"""The folder of a run: what files it has, what they say, and when it refuses to go on."""

import csv
import dataclasses
import json
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pae_jax as pae
from pae_jax.lifelong import one_task, run_folder
from pae_jax.lifelong.policy import StageRecord
from pae_jax.lifelong.recipes import Expansion, Ladder, Phase, Rate, Recipe
from pae_jax.lifelong.task import CheckedTask

KEY = jax.random.key(7)
QUICK = Phase(2, Rate(0.03))
RECIPE = Recipe("quick", QUICK, 8, ladder=Ladder((0.3, 0.6), QUICK, ramp=1.0, every=2), retrain=QUICK, goal="baseline")

COLUMNS = [
    "Task",
    "Stage",
    "Size ratio",
    "Pruned rate",
    "Acc",
    "Epoch No.",
    "Model size through inference (MB) (Shared part + task-specific part)",
    "Shared part (MB)",
    "Task specific part (MB)",
    "Whole masks (MB)",
    "Task specific masks (MB)",
    "Task specific batch norm vars (MB)",
    "Task specific biases (MB)",
]


def make_task(name, seed=0, **options):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(48, 4)).astype(np.float32)
    y = (x[:, seed % 4] > 0).astype(np.int32)
    parts = {"train": (x[:24], y[:24]), "val": (x[24:36], y[24:36]), "test": (x[36:], y[36:])}
    return pae.Task(name, **({"head": 2} | parts | options))


TASKS = [make_task("age", 0), make_task("gender: m/f", 1)]


@pytest.fixture(scope="module", autouse=True)
def without_tensorboardx():
    """The same files on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorboardX", None)
        yield


@pytest.fixture(scope="module")
def net():
    return pae.linen(lambda width: pae.models.MLP(width, (16,)), jnp.zeros((1, 4)))


@pytest.fixture(scope="module")
def empty(net):
    return pae.init(net, jax.random.key(0))


@pytest.fixture(scope="module")
def learn_all(net, empty):
    def call(path, tasks=TASKS, recipe=RECIPE, *, key=KEY, state=empty, goals=None, **options):
        run = pae.Run(path, **options)
        return pae.learn_all(net, state, tasks, recipe, key=key, goals=goals, run=run, progress=False)

    return call


@pytest.fixture(scope="module")
def finished(learn_all, tmp_path_factory):
    """Path and result of a finished run; copy the folder before changing it."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    return path, learn_all(path)


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "copy")


def lines(path):
    return [json.loads(line, parse_constant=lambda text: pytest.fail(text)) for line in path.read_text().splitlines()]


def table(path):
    with (path / "stages.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# Files


def test_a_run_has_a_folder_per_task_and_files_of_records(finished):
    path, _ = finished
    assert sorted(entry.name for entry in path.iterdir()) == [
        "01-age",
        "02-gender_m_f",
        "accuracy.json",
        "baseline-age",
        "baseline-gender_m_f",
        "events.jsonl",
        "stages.csv",
    ]
    assert sorted(entry.name for entry in (path / "01-age").iterdir()) == ["frozen", "records.json", "settings.json"]


def test_the_table_has_the_columns_of_the_reference_after_task_stage_and_size(finished):
    path, result = finished
    rows = table(path)
    assert list(rows[0]) == COLUMNS
    assert [(row["Task"], row["Stage"]) for row in rows if "own" not in row["Task"]] == [
        (outcome.task, stage)
        for outcome in result.outcomes
        for stage in [*(record.stage for record in outcome.records), "frozen"]
    ]
    assert rows == pae.Run(path).rows


def test_a_row_holds_the_numbers_of_its_stage_to_the_decimals_of_the_reference(finished):
    path, result = finished
    row = next(row for row in table(path) if (row["Task"], row["Stage"]) == ("age", "0-pruned-0.300"))
    record = next(record for record in result.outcomes[0].records if record.stage == "0-pruned-0.300")
    assert row["Pruned rate"] == f"{record.pruned:.5f}"
    assert row["Acc"] == f"{record.value:.5f}"
    assert row["Epoch No."] == str(record.kept_epoch)
    assert row["Size ratio"] == "1"
    for name, value in record.sizes.items():
        assert row[name] == f"{value:.3f}"


def test_the_own_network_of_a_task_has_rows_of_its_own(finished):
    path, result = finished
    rows = [row for row in table(path) if row["Task"] == "age (own network)"]
    assert [row["Stage"] for row in rows] == ["0-trained", "frozen"]
    assert float(rows[0]["Acc"]) == pytest.approx(result.outcomes[0].goal, abs=1e-5)


def test_a_metric_that_is_no_accuracy_has_a_column_of_its_own_name(learn_all, tmp_path):
    error = pae.Metric("MAE", lambda net, state, task, data: 7.25, higher_is_better=False)
    learn_all(tmp_path, [TASKS[0], make_task("years", 1, metric=error)], dataclasses.replace(RECIPE, goal=0.0))
    rows = table(tmp_path)
    assert list(rows[0]) == [*COLUMNS, "MAE"]
    years = [row for row in rows if row["Task"] == "years"]
    assert {row["MAE"] for row in years} == {"7.25000"}
    assert {row["Acc"] for row in years} == {""}
    assert pae.Run(tmp_path).rows[-1].get("Acc") is None


def test_events_are_lines_of_json_that_say_what_happened_to_which_task(finished):
    path, result = finished
    events = lines(path / "events.jsonl")
    assert all({"time", "event", "task", "folder"} <= event.keys() for event in events)
    mine = [event for event in events if event["folder"] == "01-age"]
    stages = [record.stage for record in result.outcomes[0].records]
    assert [event.get("stage") for event in mine] == [stage for one in stages for stage in (one, one)] + [None]
    assert [event["event"] for event in mine] == ["started", "finished"] * len(stages) + [
        result.outcomes[0].status.value
    ]
    assert mine[1]["value"] == result.outcomes[0].records[0].value


def test_what_is_not_finite_is_null_in_events_and_records(net, empty, tmp_path):
    task = make_task("age", val=None, test=None)
    plain = Recipe("plain", QUICK, 8)
    pae.learn(net, empty, task, plain, key=KEY, run=pae.Run(tmp_path), progress=False)
    finished = [event for event in lines(tmp_path / "events.jsonl") if event["event"] != "started"]
    assert [event["value"] for event in finished] == [None, None]
    assert '"value": null' in (tmp_path / "01-age" / "records.json").read_text()


def test_the_accuracies_are_those_of_the_matrix(finished):
    path, result = finished
    saved = json.loads((path / "accuracy.json").read_text())
    assert [row["after"] for row in saved] == ["age", "gender: m/f"]
    np.testing.assert_array_equal(pae.Run(path).matrix.values, result.matrix.values)
    assert saved[1]["accuracies"] == pae.Run(path).accuracies("gender: m/f")
    assert pae.Run(path).accuracies("nothing") is None
    assert saved[0]["accuracies"]["age"] == result.outcomes[0].test


def test_the_frozen_stage_is_the_network_after_the_task(net, finished, assert_same):
    path, result = finished
    loaded = pae.load(net, path / "02-gender_m_f" / "frozen")
    assert_same(loaded, result.state)
    facts = pae.read_metadata(path / "02-gender_m_f" / "frozen")["metadata"]
    assert facts["status"] == result.outcomes[1].status.name
    assert facts["test"] == result.outcomes[1].test
    assert facts["goal"] == result.outcomes[1].goal


def test_keep_all_keeps_every_stage_and_the_same_results(net, learn_all, finished, tmp_path, assert_same):
    path, result = finished
    everything = learn_all(tmp_path, keep="all")
    assert_same(everything.state, result.state)
    for number, outcome in enumerate(result.outcomes):
        folder = tmp_path / ["01-age", "02-gender_m_f"][number]
        stages = {entry.name for entry in folder.iterdir() if entry.is_dir()}
        assert stages == {*(record.stage for record in outcome.records), "frozen"}
        for record in outcome.records:
            stage = pae.load(net, folder / record.stage)
            assert pae.evaluate(net, stage, outcome.task, TASKS[number].val)["accuracy"] == record.value
    assert (tmp_path / "stages.csv").read_text() == (path / "stages.csv").read_text()


def test_a_keep_of_no_kind_and_a_file_for_a_folder_are_refused(tmp_path):
    with pytest.raises(pae.ArgumentError, match="keep must be one of"):
        pae.Run(tmp_path, keep="best")
    (tmp_path / "file").write_text("")
    with pytest.raises(pae.CheckpointError, match="is a file"):
        pae.Run(tmp_path / "file")


def test_a_run_is_written_by_one_process(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(pae.ArgumentError, match="one process, found 2"):
        pae.Run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Going on


def test_a_finished_run_is_read_and_nothing_is_trained_measured_or_written(
    learn_all, finished, copied, monkeypatch, state_facts
):
    before = {file: file.stat().st_mtime_ns for file in copied.rglob("*") if file.is_file()}
    monkeypatch.setattr(one_task, "trained", None)
    monkeypatch.setattr(CheckedTask, "measured", None)
    again = learn_all(copied)
    assert state_facts(again.state) == state_facts(finished[1].state)
    for one, other in zip(again.outcomes, finished[1].outcomes, strict=True):
        assert dataclasses.replace(one, state=None) == dataclasses.replace(other, state=None)
    np.testing.assert_array_equal(again.matrix.values, finished[1].matrix.values)
    assert {file: file.stat().st_mtime_ns for file in copied.rglob("*") if file.is_file()} == before


def test_a_table_is_not_made_shorter_by_a_process_that_sees_less(net, empty, copied):
    """Asking only for the first task again leaves the rows of the second where they are."""
    text = (copied / "stages.csv").read_text()
    options = {"key": KEY, "run": pae.Run(copied), "upcoming": 1, "progress": False}
    pae.learn(net, empty, TASKS[0], RECIPE, **options)
    assert (copied / "stages.csv").read_text() == text


def test_a_task_whose_folder_was_removed_is_learned_again_and_its_old_records_are_gone(learn_all, finished, copied):
    shutil.rmtree(copied / "02-gender_m_f")
    other = dataclasses.replace(TASKS[1], test=(TASKS[1].test[0], 1 - TASKS[1].test[1]))
    shutil.rmtree(copied / "baseline-gender_m_f")
    again = learn_all(copied, [TASKS[0], other])
    assert again.matrix.values[1, 1] == again.outcomes[1].test == pytest.approx(1 - finished[1].outcomes[1].test)
    assert [row["after"] for row in json.loads((copied / "accuracy.json").read_text())] == ["age", "gender: m/f"]


def test_a_half_written_stage_is_cleaned_away(learn_all, finished, copied, state_facts):
    """As if the process had been killed while it saved the first rung."""
    folder = copied / "02-gender_m_f"
    shutil.rmtree(folder / "frozen")
    half = folder / "0-pruned-0.300.orbax-checkpoint-tmp-123"
    half.mkdir()
    (half / "manifest").write_text("half")
    (folder / "settings.json.tmp").write_text("{")
    result = learn_all(copied, keep="all")  # a run that removes nothing else
    assert not half.exists()
    assert state_facts(result.state) == state_facts(finished[1].state)


GIVEN = dataclasses.replace(RECIPE, goal=0.0)
LADDER = dataclasses.replace(RECIPE.ladder, rungs=(0.3, 0.7))
FLIPPED = (TASKS[0].val[0], 1 - TASKS[0].val[1])


def mean_logit(logits, y):
    return logits.mean(axis=1)


# What is changed, the setting that the error names, and what it says of it.
OTHERS = {
    "epochs": ({"recipe": dataclasses.replace(GIVEN, train=Phase(3, QUICK.rate))}, "recipe.train.epochs", "2", "3"),
    "rungs": ({"recipe": dataclasses.replace(GIVEN, ladder=LADDER)}, "recipe.ladder.rungs[1]", "0.6", "0.7"),
    "growth": (
        {"recipe": dataclasses.replace(GIVEN, expansion=Expansion(0.5, 2.0))},
        "recipe.expansion",
        "None",
        "{'kind': 'Expansion'",
    ),
    "goal": ({"goals": {"age": 0.5}}, "goal", "0.0", "0.5"),
    "key": ({"key": jax.random.key(8)}, "key[1]", "7", "8"),
    "validation labels": ({"task": {"val": FLIPPED}}, "data.val.1", "'int32[12] ", "'int32[12] "),
    "loss": ({"task": {"loss": mean_logit}}, "loss", "None", "'mean_logit'"),
    "a loss of the whole batch": ({"task": {"loss_per": "batch"}}, "loss_per", "'example'", "'batch'"),
    "metric": ({"task": {"metric": pae.Metric("other")}}, "metric.name", "'accuracy'", "'other'"),
    "head": ({"task": {"head": 3}}, "head", "2", "3"),
    "tasks to come": ({"tasks": TASKS[:1]}, "upcoming", "1", "0"),
    "other weights": ({"state": "drawn"}, "earlier network", "", ""),
    "other norms and biases": ({"state": "pretrained"}, "earlier network", "", ""),
}


@pytest.fixture(scope="module")
def begun(learn_all, tmp_path_factory):
    """Folder of a run whose goal is a number."""
    path = tmp_path_factory.mktemp("runs") / "begun"
    learn_all(path, recipe=GIVEN)
    return path


@pytest.mark.parametrize("what", OTHERS)
def test_another_call_in_the_same_folder_is_refused_and_names_the_first_setting_that_differs(
    net, empty, learn_all, begun, what, no_training
):
    options, name, was, now = OTHERS[what]
    biases = jax.tree.map(lambda leaf: leaf + 1, net.initial(KEY, 1.0)[1])
    states = {"drawn": pae.init(net, jax.random.key(1)), "pretrained": empty.replace(local=biases), "same": empty}
    call = {"recipe": GIVEN, "state": "same"} | options
    call["state"] = states[call["state"]]
    if "task" in call:
        call["tasks"] = [dataclasses.replace(TASKS[0], **call.pop("task")), TASKS[1]]
    before = {file: file.read_bytes() for file in begun.rglob("*") if file.is_file()}
    with pytest.raises(pae.CheckpointError) as error:
        learn_all(begun, **call)
    message = str(error.value)
    assert f"01-age was begun with other settings: '{name}' was {was}" in message
    assert f" and is now {now}" in message
    assert "another run folder" in message
    assert {file: file.read_bytes() for file in begun.rglob("*") if file.is_file()} == before


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(one_task, "trained", lambda *arguments, **options: pytest.fail("something was trained"))


def test_tasks_to_come_make_no_difference_where_nothing_depends_on_them(learn_all, tmp_path, state_facts):
    """So a stream can be made longer later."""
    recipe = Recipe("packnet", QUICK, 8, ladder=Ladder((0.6,), QUICK, ramp=0.0, choose="last"))
    learn_all(tmp_path / "one", TASKS[:1], recipe)
    longer = learn_all(tmp_path / "one", TASKS, recipe)
    assert state_facts(longer.state) == state_facts(learn_all(tmp_path / "both", TASKS, recipe).state)


def test_labels_in_a_list_and_data_in_a_dict_are_known_by_their_values(net, empty, tmp_path, no_training):
    x, y = TASKS[0].train
    for data, other in (((x, list(y)), (x, list(1 - y))), ({"image": x, "label": y}, {"image": x, "label": 1 - y})):
        one, two = (
            run_folder.settings_of(empty, dataclasses.replace(TASKS[0], train=train), RECIPE, KEY, None, None)["data"]
            for train in (data, other)
        )
        assert one["train"] != two["train"]
        assert one["val"] == two["val"]
    batches = dataclasses.replace(TASKS[0], train=[(x, y)])
    assert run_folder.settings_of(empty, batches, RECIPE, KEY, None, None)["data"]["train"] is None


# TensorBoard


class FakeWriter:
    def __init__(self, path):
        self.path, self.scalars, self.flushed = path, [], 0

    def add_scalar(self, name, value, step):
        self.scalars.append((name, float(value), step))

    def flush(self):
        self.flushed += 1


@pytest.fixture
def writers(monkeypatch):
    """The writers made of tensorboardX, a module that only remembers what it is given."""
    made = []

    def writer(path):
        made.append(FakeWriter(path))
        return made[-1]

    module = types.ModuleType("tensorboardX")
    module.SummaryWriter = writer
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    return made


def test_where_tensorboardx_is_installed_every_epoch_of_every_stage_is_written_once(learn_all, writers, tmp_path):
    result = learn_all(tmp_path)
    (writer,) = writers
    assert writer.path == str(tmp_path / "tensorboard")
    written = [(name, step) for name, _, step in writer.scalars]
    assert len(written) == len(set(written))
    for outcome in result.outcomes:
        total = sum(len(record.history) for record in outcome.records)
        assert [step for name, step in written if name == f"{outcome.task}/loss"] == list(range(1, total + 1))
        losses = [row["loss"] for record in outcome.records for row in record.history]
        assert [value for name, value, _ in writer.scalars if name == f"{outcome.task}/loss"] == losses
    assert ("age (own network)/val_accuracy", 1) in written
    assert writer.flushed == sum(len(outcome.records) for outcome in result.outcomes) + 2


def test_a_run_that_is_only_read_writes_no_scalars(copied, writers):
    assert pae.Run(copied).matrix is not None
    assert writers == []


def test_without_tensorboardx_a_run_works_and_has_no_folder_for_it(net, empty, tmp_path):
    outcome = pae.learn(net, empty, TASKS[0], Recipe("p", QUICK, 8), key=KEY, run=pae.Run(tmp_path), progress=False)
    assert outcome.status is pae.Status.LEARNED
    assert not (tmp_path / "tensorboard").exists()


def test_a_file_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "accuracy.json"
    run_folder.write_text(path, "before")
    monkeypatch.setattr(run_folder.os, "replace", lambda *paths: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        run_folder.write_text(path, "after, but killed")
    assert path.read_text() == "before"


def test_a_record_is_entered_once_and_changed_where_it_changes(tmp_path):
    run = pae.Run(tmp_path)
    record = StageRecord("a", "0-trained", 1.0, 0.0, 0.5, None, 2, 1, 10, 0, sizes={"Shared part (MB)": 0.5})
    run.enter(record)
    run.enter(dataclasses.replace(record, stage="frozen"))
    run.enter(dataclasses.replace(record, value=0.75))
    assert [(row["Stage"], row["Acc"]) for row in table(tmp_path)] == [("0-trained", "0.75000"), ("frozen", "0.50000")]
    assert run.rows == pae.Run(tmp_path).rows == table(tmp_path)
