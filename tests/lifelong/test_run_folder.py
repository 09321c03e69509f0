"""The folder of a run: what files it has, what they say, and when it refuses to go on."""

import csv
import dataclasses
import json
import math
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import pae_jax as pae
from pae_jax import files
from pae_jax.lifelong import stage_maker, task_folder
from pae_jax.lifelong.recipes import Expansion, Ladder, Phase, Rate, Recipe
from pae_jax.lifelong.run_folder import folder_name
from pae_jax.lifelong.settings import checksums
from pae_jax.lifelong.task import CheckedTask
from pae_jax.processes import Processes

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
GENDER = folder_name("02-", "gender: m/f")


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
        GENDER,
        "accuracy.json",
        "baseline-age",
        folder_name("baseline-", "gender: m/f"),
        "events.jsonl",
        "order.json",
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


@pytest.mark.parametrize(("name", "column"), [("MAE", "MAE"), ("Stage", "Stage (metric)")])
def test_a_metric_that_is_no_accuracy_has_a_column_of_its_own_name(learn_all, tmp_path, name, column):
    error = pae.Metric(name, lambda net, state, task, data: 7.25, higher_is_better=False)
    learn_all(tmp_path, [TASKS[0], make_task("years", 1, metric=error)], dataclasses.replace(RECIPE, goal=0.0))
    rows = table(tmp_path)
    assert list(rows[0]) == [*COLUMNS, column]
    years = [row for row in rows if row["Task"] == "years"]
    assert {row[column] for row in years} == {"7.25000"}
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


def test_what_is_not_finite_is_null_in_events_and_a_text_in_records(net, empty, tmp_path):
    task = make_task("age", val=None, test=None)
    plain = Recipe("plain", QUICK, 8)
    pae.learn(net, empty, task, plain, key=KEY, run=pae.Run(tmp_path), progress=False)
    finished = [event for event in lines(tmp_path / "events.jsonl") if event["event"] != "started"]
    assert [event["value"] for event in finished] == [None, None]
    assert '"value": "nan"' in (tmp_path / "01-age" / "records.json").read_text()


def test_a_run_of_an_infinite_metric_goes_on_to_the_same_rung(net, empty, tmp_path):
    task = make_task("age", metric=pae.Metric("psnr", lambda *_: math.inf))
    recipe = dataclasses.replace(RECIPE, goal=30.0)

    def learn():
        return pae.learn(net, empty, task, recipe, key=KEY, run=pae.Run(tmp_path, keep="all"))

    whole = learn()
    for stage in ("frozen", "0-pruned-0.600"):
        shutil.rmtree(tmp_path / "01-age" / stage)
    resumed = learn()
    assert (resumed.status, resumed.pruned, resumed.test) == (whole.status, whole.pruned, math.inf)
    assert resumed.records == whole.records == learn().records


def test_the_accuracies_are_those_of_the_matrix(finished):
    path, result = finished
    saved = json.loads((path / "accuracy.json").read_text())["rows"]
    assert [row["after"] for row in saved] == ["age", "gender: m/f"]
    np.testing.assert_array_equal(pae.Run(path).matrix.values, result.matrix.values)
    stages = saved[1]["stages"]
    assert saved[1]["accuracies"] == pae.Run(path).accuracies(GENDER, stages)
    assert pae.Run(path).accuracies("nothing", stages) == {}
    assert pae.Run(path).accuracies(GENDER, stages | {"gender: m/f": "another"}) == {}
    assert saved[0]["accuracies"]["age"] == result.outcomes[0].test


def test_the_frozen_stage_is_the_network_after_the_task(net, finished, assert_same):
    path, result = finished
    loaded = pae.load(net, path / GENDER / "frozen")
    assert_same(loaded, result.state)
    facts = pae.read_metadata(path / GENDER / "frozen")["metadata"]
    assert facts["status"] == result.outcomes[1].status.name
    assert facts["test"] == result.outcomes[1].test
    assert facts["goal"] == result.outcomes[1].goal


def test_keep_all_keeps_every_stage_and_the_same_results(net, learn_all, finished, tmp_path, assert_same):
    path, result = finished
    everything = learn_all(tmp_path, keep="all")
    assert_same(everything.state, result.state)
    for number, outcome in enumerate(result.outcomes):
        folder = tmp_path / ["01-age", GENDER][number]
        stages = {entry.name for entry in folder.iterdir() if entry.is_dir()}
        assert stages == {*(record.stage for record in outcome.records), "frozen"}
        for record in outcome.records:
            stage = pae.load(net, folder / record.stage)
            assert pae.evaluate(net, stage, outcome.task, TASKS[number].val)["accuracy"] == record.value
    assert (tmp_path / "stages.csv").read_text() == (path / "stages.csv").read_text()


def test_stages_that_were_kept_stay_when_the_run_is_read_again(learn_all, tmp_path):
    learn_all(tmp_path, TASKS[:1], keep="all")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    learn_all(tmp_path, TASKS[:1])
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert (tmp_path / "01-age" / "0-trained").is_dir()


def test_settings_do_not_count_where_no_stage_was_made(learn_all, tmp_path, monkeypatch, assert_same):
    """So a slip that ended a call can be corrected in the same folder."""

    def fails(*arguments, **options):
        raise RuntimeError("a slip")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a slip"):
        patch.setattr(stage_maker, "trained", fails)
        learn_all(tmp_path / "run", TASKS[:1], dataclasses.replace(RECIPE, goal=None, retrain=None, ladder=None))
    assert (tmp_path / "run" / "01-age" / "settings.json").exists()
    corrected = learn_all(tmp_path / "run", TASKS[:1])
    assert_same(corrected.state.shared, learn_all(tmp_path / "other", TASKS[:1]).state.shared)


def test_a_keep_of_no_kind_and_a_file_for_a_folder_are_refused(tmp_path):
    with pytest.raises(pae.ArgumentError, match="keep must be one of"):
        pae.Run(tmp_path, keep="best")
    (tmp_path / "file").write_text("")
    with pytest.raises(pae.CheckpointError, match="is a file"):
        pae.Run(tmp_path / "file")


def test_a_process_other_than_the_first_writes_nothing_into_a_run(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    run = pae.Run(tmp_path / "run")
    run.record_accuracies("01-age", {"age": 0.9}, {"age": "digest"})
    run.record_order(["age"], [0])
    run.log("started", {"folder": "01-age"})
    run.write_table()
    assert not (tmp_path / "run").exists()


# Going on


def test_a_finished_run_is_read_and_nothing_is_trained_measured_or_written(
    learn_all, finished, copied, monkeypatch, state_facts
):
    before = {file: file.stat().st_mtime_ns for file in copied.rglob("*") if file.is_file()}
    monkeypatch.setattr(stage_maker, "trained", None)
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
    shutil.rmtree(copied / GENDER)
    other = dataclasses.replace(TASKS[1], test=(TASKS[1].test[0], 1 - TASKS[1].test[1]))
    shutil.rmtree(copied / folder_name("baseline-", "gender: m/f"))
    again = learn_all(copied, [TASKS[0], other])
    assert again.matrix.values[1, 1] == again.outcomes[1].test == pytest.approx(1 - finished[1].outcomes[1].test)
    assert [row["after"] for row in json.loads((copied / "accuracy.json").read_text())["rows"]] == [
        "age",
        "gender: m/f",
    ]


SINGLE = Recipe("single", QUICK, 8, ladder=Ladder((0.6,), QUICK, ramp=0.0, choose="last"))
A, B = make_task("a", 0), make_task("b", 1)


@pytest.fixture(scope="module")
def two_streams(learn_all, tmp_path_factory):
    """A run in which the stream of b alone was learned after that of a and b, and what the latter ended with."""
    path = tmp_path_factory.mktemp("runs") / "streams"
    whole = learn_all(path, [A, B], SINGLE)
    learn_all(path, [B], SINGLE)
    return path, whole


def test_a_replayed_stream_has_the_matrix_of_its_own_tasks(learn_all, two_streams, monkeypatch):
    path, whole = two_streams
    monkeypatch.setattr(CheckedTask, "measured", None)
    np.testing.assert_array_equal(learn_all(path, [A, B], SINGLE).matrix.values, whole.matrix.values)


def test_the_matrix_of_a_run_is_that_of_the_stream_measured_last(two_streams):
    matrix = pae.Run(two_streams[0]).matrix
    assert matrix.tasks == ("b",) and not np.isnan(matrix.values).any()


def test_another_order_in_the_same_run_has_a_matrix_of_its_own(learn_all, two_streams, tmp_path):
    path = shutil.copytree(two_streams[0], tmp_path / "copy")
    turned = learn_all(path, [B, A], SINGLE)
    alone = learn_all(tmp_path / "alone", [B, A], SINGLE)
    np.testing.assert_array_equal(turned.matrix.values, alone.matrix.values)
    np.testing.assert_array_equal(pae.Run(path).matrix.values, alone.matrix.values)
    assert learn_all(path, [B], SINGLE).matrix.tasks == ("b",)


def test_rows_without_a_stage_are_measured_again_and_shown_where_only_one_folder_can_be_meant(
    learn_all, two_streams, tmp_path
):
    path = shutil.copytree(two_streams[0], tmp_path / "copy")
    rows = files.read_sealed(path / "accuracy.json")["rows"]
    old = [{"after": row["after"], "accuracies": row["accuracies"]} for row in rows]
    files.write_sealed(path / "accuracy.json", {"rows": old})
    assert pae.Run(path).matrix.tasks == ("a",)
    again = learn_all(path, [A, B], SINGLE)
    np.testing.assert_array_equal(again.matrix.values, two_streams[1].matrix.values)
    np.testing.assert_array_equal(pae.Run(path).matrix.values, again.matrix.values)


def test_a_task_with_other_test_data_is_measured_again_after_later_tasks(learn_all, two_streams, tmp_path):
    path = shutil.copytree(two_streams[0], tmp_path / "copy")
    shutil.rmtree(path / "01-a")
    other = dataclasses.replace(A, test=(A.test[0], 1 - A.test[1]))
    assert learn_all(path, [other, B], SINGLE).matrix.values[1, 0] == pytest.approx(
        1 - two_streams[1].matrix.values[1, 0]
    )


def test_a_half_written_stage_is_cleaned_away(learn_all, finished, copied, state_facts):
    """As if the process had been killed while it saved the first rung."""
    folder = copied / GENDER
    shutil.rmtree(folder / "frozen")
    half = folder / f"{files.ASIDE}0123"
    half.mkdir()
    (half / "manifest").write_text("half")
    (folder / f"{files.ASIDE}4567").write_text("{")
    result = learn_all(copied, keep="all")  # a run that removes nothing else
    assert not list(folder.glob(f"{files.ASIDE}*"))
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
    "loss": ({"task": {"loss": mean_logit}}, "loss", "None", "'mean_logit "),
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
    monkeypatch.setattr(stage_maker, "trained", lambda *arguments, **options: pytest.fail("something was trained"))


def test_tasks_to_come_make_no_difference_where_nothing_depends_on_them(learn_all, tmp_path, state_facts):
    """So a stream can be made longer later."""
    recipe = Recipe("packnet", QUICK, 8, ladder=Ladder((0.6,), QUICK, ramp=0.0, choose="last"))
    learn_all(tmp_path / "one", TASKS[:1], recipe)
    longer = learn_all(tmp_path / "one", TASKS, recipe)
    assert state_facts(longer.state) == state_facts(learn_all(tmp_path / "both", TASKS, recipe).state)


def test_labels_in_a_list_data_in_a_dict_and_batches_in_a_list_are_known_by_their_values():
    x, y = TASKS[0].train
    kinds = {"list": lambda y: (x, list(y)), "dict": lambda y: {"image": x, "label": y}, "batches": lambda y: [(x, y)]}
    for kind in kinds.values():
        assert checksums(kind(y)) == checksums(kind(y.copy())) != checksums(kind(1 - y))
    assert checksums(lambda epoch: iter([(x, y)])) is None
    assert checksums([[x, y]]) == checksums([[x.copy(), y]]) != checksums([[x, 1 - y]])


def test_checksums_of_entries_that_training_does_not_use():
    """Names of files, which are objects, lists of other lengths, inputs that are a list of arrays."""
    names = lambda count: np.array([f"images/{i}.png" for i in range(count)], dtype=object)  # noqa: E731
    assert checksums({"file": names(3)}) == checksums({"file": names(3)}) != checksums({"file": names(3)[::-1]})
    ragged = checksums({"boxes": [[0], [1, 2]]})
    assert ragged == checksums({"boxes": [[0], [1, 2]]}) != checksums({"boxes": [[0], [1, 3]]})
    parts = [np.zeros((2, 3)), np.zeros((2, 4))]
    assert checksums((parts, np.zeros(2))) != checksums(([np.ones((2, 3)), parts[1]], np.zeros(2)))


@pytest.mark.parametrize(
    "kind",
    [
        lambda x, y: types.MappingProxyType({"image": x, "label": y}),
        lambda x, y: (x, types.MappingProxyType({"age": y})),
        lambda x, y: [types.MappingProxyType({"image": x, "label": y})],
    ],
    ids=["data", "labels", "a batch"],
)
def test_arrays_in_any_mapping_are_known_by_their_values(kind):
    x, y = TASKS[0].train
    assert checksums(kind(x, y)) == checksums(kind(x.copy(), y.copy())) != checksums(kind(x, 1 - y))


def test_other_arrays_of_an_npz_file_are_refused(net, empty, tmp_path):
    x, y = TASKS[0].train

    def learn(labels):
        np.savez(tmp_path / "data.npz", image=x, label=labels)
        task = pae.Task("age", 2, train=np.load(tmp_path / "data.npz"))
        return pae.learn(net, empty, task, Recipe("plain", QUICK, 8), key=KEY, run=pae.Run(tmp_path / "run"))

    learn(y)
    learn(y)
    with pytest.raises(pae.CheckpointError, match=r"'data\.train\.label' was 'int32\[24\] "):
        learn(1 - y)


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


# Faults


@pytest.mark.parametrize("file", ["settings.json", "records.json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes((file.parents[1] / "accuracy.json").read_bytes()),
    ],
    ids=["lost", "empty", "another file"],
)
def test_lost_or_damaged_files_are_made_again_from_the_stages(learn_all, finished, copied, no_training, file, damage):
    wanted = (copied / "01-age" / file).read_bytes()
    damage(copied / "01-age" / file)
    (copied / "stages.csv").write_text("Task\nnothing\n")
    again = learn_all(copied)
    assert [outcome.records for outcome in again.outcomes] == [outcome.records for outcome in finished[1].outcomes]
    assert (copied / "01-age" / file).read_bytes() == wanted
    assert (copied / "stages.csv").read_text() == (finished[0] / "stages.csv").read_text()


def test_a_folder_that_lost_its_settings_is_never_taken_for_that_of_other_data(learn_all, copied, no_training):
    for settings in copied.glob("*/settings.json"):
        settings.unlink()
    other = dataclasses.replace(TASKS[0], test=FLIPPED)
    with pytest.raises(pae.CheckpointError, match=r"-age was begun with other settings: 'data\.test\.0'"):
        learn_all(copied, [other, TASKS[1]])


def test_a_stage_of_another_task_is_not_taken(learn_all, copied, no_training):
    shutil.rmtree(copied / GENDER / "frozen")
    shutil.copytree(copied / "01-age" / "frozen", copied / GENDER / "frozen")
    with pytest.raises(pae.CheckpointError, match=r"frozen is the stage frozen of 01-age\. Remove it"):
        learn_all(copied)


def test_damaged_accuracies_are_named_and_measured_again_once_they_are_removed(learn_all, finished, copied):
    path = copied / "accuracy.json"
    path.write_text(path.read_text().replace("0.", "1.", 1))
    for call in (lambda: pae.Run(copied).matrix, lambda: learn_all(copied)):
        with pytest.raises(pae.CheckpointError, match=r"accuracy.json is damaged.*Remove .*; what it held is measured"):
            call()
    path.unlink()
    np.testing.assert_array_equal(learn_all(copied).matrix.values, finished[1].matrix.values)


def test_a_damaged_order_is_named_and_recorded_again_once_it_is_removed(learn_all, copied):
    path = copied / "order.json"
    whole = path.read_text()
    for damaged in (whole.replace("age", "aged"), whole.replace("1", "2"), whole[:-9], "", "{}"):
        path.write_text(damaged)
        with pytest.raises(pae.CheckpointError, match=r"order.json.*Remove .*order.json; it only says in which order"):
            learn_all(copied)
    path.unlink()
    learn_all(copied)
    assert json.loads(path.read_text())["streams"] == [{"tasks": ["age", "gender: m/f"], "order": [0, 1]}]


def test_lost_events_are_logged_again_and_only_they(learn_all, copied):
    path = copied / "events.jsonl"
    written = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in written if '"goal' not in line) + written[0][:20])
    learn_all(copied)
    events = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    ended = [(event["folder"], event["event"]) for event in events if event["event"].startswith("goal")]
    assert len(ended) == len(set(ended)) == sum('"goal' in line for line in written)
    assert len(events) == len(written)


def test_settings_of_jax_that_change_numbers_belong_to_the_run(learn_all, copied, no_training):
    refused = pytest.raises(pae.CheckpointError, match=r"'environment\.jax_default_matmul_precision' was 'None'")
    with jax.default_matmul_precision("highest"), refused:
        learn_all(copied)


class Sharper(pae.models.MLP):
    """The same variables, another program."""

    def __call__(self, x, train=False):
        return super().__call__(2 * x, train)


def scaled(scale):
    return lambda logits, y: scale * (logits.sum(axis=1) - y) ** 2


def test_another_model_or_loss_of_the_same_name_is_refused(net, empty, tmp_path):
    def learn(net, scale):
        task = make_task("age", loss=scaled(scale), val=None, test=None)
        return pae.learn(net, empty, task, Recipe("plain", QUICK, 8), key=KEY, run=pae.Run(tmp_path))

    learn(net, 1.0)
    learn(net, 1.0)
    with pytest.raises(pae.CheckpointError, match=r"'loss' was 'scaled\.<locals>\.<lambda> "):
        learn(net, 2.0)
    with pytest.raises(pae.CheckpointError, match="'model' was "):
        learn(pae.linen(lambda width: Sharper(width, (16,)), jnp.zeros((1, 4))), 1.0)


def test_an_nnx_head_of_other_values_is_refused(net, empty, tmp_path):
    def learn(seed):
        head = nnx.Linear(16, 2, rngs=nnx.Rngs(seed))
        task = make_task("age", head=head, val=None, test=None)
        return pae.learn(net, empty, task, Recipe("plain", QUICK, 8), key=KEY, run=pae.Run(tmp_path))

    learn(0)
    learn(0)
    with pytest.raises(pae.CheckpointError, match=r"'head values\.params/kernel' was 'float32\[16,2\] "):
        learn(1)


NAMES = ["人", "a\0b", "a\ud800", "n" * 300, "a\rb", "../up", ".", "a b", "a_b"]


def test_task_names_of_any_characters_and_length_have_folders_of_their_own():
    folders = {folder_name("01-", name) for name in NAMES}
    assert len(folders) == len(NAMES)
    assert all(len(name) < 120 and name.isascii() and name.isprintable() and "/" not in name for name in folders)
    assert folder_name("01-", "a_b") == "01-a_b"


@pytest.mark.parametrize("name", ["a\0\ud800\r", "n" * 300], ids=["odd", "long"])
def test_a_run_of_a_task_with_any_name_goes_on(net, empty, tmp_path, name):
    task, plain = make_task(name, val=None, test=None), Recipe("plain", QUICK, 8)
    for _ in range(2):
        outcome = pae.learn(net, empty, task, plain, key=KEY, run=pae.Run(tmp_path))
        assert outcome.task == name
        assert [row["Task"] for row in pae.Run(tmp_path).rows] == [name, name]
    assert (tmp_path / "stages.csv").read_bytes().decode()


def test_tasks_whose_folders_would_be_one_are_refused_before_anything_is_learned(learn_all, tmp_path, no_training):
    twin = folder_name("", "a b")
    with pytest.raises(pae.ArgumentError, match="would share a folder of a run; rename one"):
        learn_all(tmp_path, [make_task("a b"), make_task(twin)])


def test_two_jobs_in_one_run_lose_no_row(net, tmp_path):
    jobs = [pae.Run(tmp_path), pae.Run(tmp_path)]
    for run, task in zip(jobs, TASKS, strict=True):
        pae.baseline(net, task, RECIPE, key=KEY, run=run)
    assert [row["Task"] for row in table(tmp_path)] == [f"{t.name} (own network)" for t in TASKS for _ in range(2)]
    run = pae.Run(tmp_path)
    for job, name in zip([*jobs, run], "abc", strict=True):
        job.record_accuracies(f"01-{name}", {name: 0.5}, {name: "digest"})
        job.log("note", {"folder": name})
    assert [run.accuracies(f"01-{name}", {name: "digest"}) for name in "abc"] == [{name: 0.5} for name in "abc"]


def test_the_same_call_twice_at_once_says_who_is_at_it(tmp_path):
    one, other = (pae.Run(tmp_path, wait=0.0).task_folder("01-age", {"task": "age"}, Processes()) for _ in range(2))
    with one, pytest.raises(pae.CheckpointError, match=r"01-age is in use: process \d+ of"):
        other.__enter__()


def test_a_disk_that_fails_is_a_typed_error(learn_all, tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(pae.CheckpointError, match="No space left on device"):
        learn_all(tmp_path)


# What is the user's own, and objects that change when used


@pytest.mark.parametrize("is_finished", [True, False])
def test_folders_and_files_of_the_user_in_a_task_folder_stay_and_are_no_stages(learn_all, copied, is_finished):
    own = {"plots", "frozen_backup", ".ipynb_checkpoints"}
    for name in own:
        (copied / "01-age" / name).mkdir()
    (copied / "01-age" / "notes.json").write_text("{}")
    if not is_finished:
        shutil.rmtree(copied / "01-age" / "frozen")
    learn_all(copied)
    assert own | {"notes.json"} <= {entry.name for entry in (copied / "01-age").iterdir()}


class Caching:
    """An optimizer that keeps its chain, and what it was asked for."""

    def __init__(self):
        self._chain, self.asked = None, []

    def transformation(self):
        self.asked.append(len(self.asked))
        if self._chain is None:
            self._chain = optax.sgd(1.0)
        return self._chain


def test_a_run_goes_on_with_an_optimizer_that_changes_when_it_is_used(learn_all, tmp_path):
    for _ in range(2):
        recipe = Recipe("own", dataclasses.replace(QUICK, optimizer=Caching()), 8)
        learn_all(tmp_path / "run", recipe=recipe)


def test_a_task_appended_behind_one_that_was_the_last_and_not_pruned_is_refused(learn_all, tmp_path):
    recipe = Recipe("r", QUICK, 8, ladder=Ladder((0.5,), QUICK, ramp=0.0, choose="last", prune_last=False))
    learn_all(tmp_path / "run", TASKS[:1], recipe)
    with pytest.raises(pae.CheckpointError, match="'upcoming' was 0 and is now 1"):
        learn_all(tmp_path / "run", TASKS, recipe)


class Interrupted:
    """A measure that is interrupted."""

    def __call__(self, net, state, task, data):
        raise KeyboardInterrupt


def test_another_order_is_refused_also_if_the_first_task_was_not_finished(net, empty, tmp_path):
    tasks = [make_task("age", metric=pae.Metric("accuracy", Interrupted())), TASKS[1]]
    recipe, run = Recipe("quick", QUICK, 8), pae.Run(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        pae.learn_all(net, empty, tasks, recipe, key=KEY, run=run)
    with pytest.raises(pae.PaeError, match="order"):
        pae.learn_all(net, empty, tasks, recipe, key=KEY, run=run, order=["gender: m/f", "age"])


def test_a_table_is_written_while_another_job_freezes_its_task(finished, copied, monkeypatch):
    """The other job ends between two looks: its stages are gone, and the frozen one has their records."""
    folder = task_folder.TaskFolder(copied / "01-age", None, Processes(), False)
    answers = iter([False, True, True])
    monkeypatch.setattr(task_folder.TaskFolder, "is_finished", lambda self: next(answers))
    monkeypatch.setattr(task_folder.TaskFolder, "_stages", lambda self: ["0-trained"])
    assert [record.stage for record in folder.records()][-1] == "frozen"


def test_lines_of_events_that_are_no_objects_are_no_events(learn_all, copied):
    with (copied / "events.jsonl").open("a") as file:
        file.write("[]\n[1, 2]\n3\n")
    learn_all(copied)
