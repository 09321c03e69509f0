"""One task of a stage is measured on a folder: the columns of PAE's result files, and a picture of some results."""

import csv
import json

import jax
import numpy as np
import pytest
from PIL import Image

import pae_jax as pae
from pae_jax.faces.losses import FeatureHead

SIZES = [
    "Model size through inference (MB) (Shared part + task-specific part)",
    "Shared part (MB)",
    "Task specific part (MB)",
    "Whole masks (MB)",
    "Task specific masks (MB)",
    "Task specific batch norm vars (MB)",
    "Task specific biases (MB)",
]
AGES = [f"{lower:02d}" for lower in range(0, 80, 10)]


@pytest.fixture(scope="module")
def script(program):
    return program("facial/inference.py")


def put(path, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folders of age groups, of years and of people, three images of each."""
    root, rng = tmp_path_factory.mktemp("faces"), np.random.default_rng(0)
    for name in AGES:
        for shot in range(3):
            put(root / "age" / name / f"{shot}.png", rng)
    for name in ("20.0", "31.0", "100.0"):
        put(root / "years" / name / "1.png", rng)
    for name in ("Ann", "Bob"):
        for shot in (1, 2, 3):
            put(root / "lfw" / name / f"{name}_{shot:04d}.png", rng)
    lines = "Ann 1 2", "Ann 1 Bob 1", "Bob 1 2", "Ann 2 Bob 2"
    (root / "pairs.txt").write_text(
        "\t".join("21") + "\n" + "\n".join(line.replace(" ", "\t") for line in lines) + "\n"
    )
    return root


@pytest.fixture(scope="module")
def network(script):
    """The network of the preset "tiny" with three tasks, none of them trained: identity, age groups, years."""
    net = script.network(script.PRESETS["tiny"]())
    state = pae.init(net, jax.random.key(0))
    for number, (task, head) in enumerate({"face": FeatureHead(4), "age": 8, "years": 100}.items()):
        state = pae.pack(net, state, task, head=head, key=jax.random.key(number), weight_init="fresh")
        state = pae.freeze(pae.prune(state, task, 0.5), task)
    return net, state


@pytest.fixture(scope="module")
def stage(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "03-years" / "frozen"
    record = {"task": "years", "metric": "MAE", "kept_epoch": 7}
    pae.save(path, network[1], {"record": record})
    return path


@pytest.fixture
def infer(script, root, stage, tmp_path):
    """Run the script; return the rows of its table."""

    def run(task, folder, *more, place=stage):
        words = [place, "--task", task, "--data", root / folder, "--preset", "tiny", "--out", tmp_path / "out", *more]
        script.main([str(word) for word in words])
        with (tmp_path / "out" / f"{task}.csv").open() as file:
            return list(csv.DictReader(file))

    return run


def width(picture):
    with Image.open(picture) as image:
        return image.size[0]


def test_a_task_of_classes_gets_the_columns_of_the_reference_and_a_picture(infer, network, tmp_path):
    [row] = infer("age", "age")
    assert list(row) == ["Pruned rate", "Acc", "Epoch No.", *SIZES]
    _, state = network
    assert row["Epoch No."] == ""  # the record of this stage is that of another task
    table = pae.sizes.csv_columns(pae.sizes.paper(state, without_head="face"), "age")
    assert {name: row[name] for name in SIZES} == {name: f"{table[name]:.3f}" for name in SIZES}
    free, own = (sum(int((o == k).sum()) for o in jax.tree.leaves(state.owner)) for k in (0, 2))
    assert float(row["Pruned rate"]) == pytest.approx(free / (free + own), abs=5e-6)
    assert width(tmp_path / "out" / "age.png") > 300


def test_the_accuracy_is_that_of_predictions_one_by_one(script, infer, network, root):
    net, state = network
    middle = script.Middle(36, 32)
    right = 0
    for label, name in enumerate(AGES):
        for file in sorted((root / "age" / name).iterdir()):
            x = script.standardise_fixed(middle(script.read_image(file))[None])
            right += int(np.argmax(pae.predict(net, state, "age", x))) == label
    assert infer("age", "age")[0]["Acc"] == f"{right / 24:.5f}"


def test_a_stage_and_its_bundle_give_the_same_row_and_rows_are_added(infer, network, tmp_path):
    bundle = tmp_path / "tasks.pae"
    pae.write_bundle(bundle, *network)
    infer("age", "age")
    first, second = infer("age", "age", place=bundle)
    assert first == second


def test_a_task_whose_metric_is_the_error_of_the_age_is_measured_by_it(infer, network, root, script, tmp_path):
    [row] = infer("years", "years")
    assert list(row)[:4] == ["Pruned rate", "MAE", "Acc", "Epoch No."]
    assert row["Epoch No."] == "7"
    errors = []
    for name in ("100.0", "20.0", "31.0"):
        x = script.standardise_fixed(script.Middle(36, 32)(script.read_image(root / "years" / name / "1.png"))[None])
        logits = np.asarray(pae.predict(network[0], network[1], "years", x), np.float64)[0]
        odds = np.exp(logits - logits.max())
        errors.append(abs((odds / odds.sum()) @ np.arange(1, 101) - float(name)))
    assert float(row["MAE"]) == pytest.approx(np.mean(errors), abs=1e-4)
    assert width(tmp_path / "out" / "years.png") > 300


def test_the_face_task_is_verified_on_pairs(infer, root, tmp_path):
    [row] = infer("face", "lfw", "--pairs", root / "pairs.txt")
    assert list(row) == ["Pruned rate", "Acc Mean", "Acc Std", "Epoch No.", *SIZES]
    assert 0 <= float(row["Acc Mean"]) <= 1
    assert width(tmp_path / "out" / "face.png") > 300


REFUSED = {
    "no such task": (("smile", "age"), r"has the tasks \['age', 'face', 'years'\], found --task smile"),
    "face without pairs": (("face", "lfw"), "pass --pairs FILE"),
    "classes of another number": (("age", "lfw"), r"'age' has 8 outputs, found the classes \('Ann', 'Bob'\)"),
    "classes that are no ages": (("years", "lfw"), "Ann: is no age in years"),
    "no folder": (("age", "nowhere"), "nowhere: no such folder"),
    "files for classes": (("age", "lfw/Ann"), "found the file 'Ann_0001.png', expected folders of classes"),
    "no pictures": (("age", "age", "--pictures", 0), "--pictures must be an integer of at least 1"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(kind, infer, tmp_path):
    words, message = REFUSED[kind]
    with pytest.raises(SystemExit, match=message):
        infer(*words)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def trained(stage):
    """Say in the results of the run which classes the task of ages has."""
    results = stage.parent.parent / "results.json"
    yield lambda names: results.write_text(json.dumps({"classes": {"face": 4, "age": names}}))
    results.unlink()


def test_labels_follow_the_order_of_the_classes_in_the_run(script, infer, network, root, trained):
    trained(AGES[::-1])
    middle, right = script.Middle(36, 32), 0
    for label, name in enumerate(AGES[::-1]):
        x = np.stack([script.standardise_fixed(middle(script.read_image(f))) for f in (root / "age" / name).iterdir()])
        right += int((np.argmax(pae.predict(*network, "age", x), axis=-1) == label).sum())
    assert infer("age", "age")[0]["Acc"] == f"{right / 24:.5f}"


def test_a_folder_of_other_classes_than_the_run_had_is_refused(infer, trained):
    trained([f"group {i}" for i in range(8)])
    with pytest.raises(SystemExit, match="'age' was trained on the classes"):
        infer("age", "age")
