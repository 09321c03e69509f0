"""The program that measures LFW, in small: synthetic faces, an untrained network, every piece of the real run."""

import dataclasses
import json
import shutil

import pytest


@pytest.fixture(scope="module")
def script(program):
    return program("facial/lfw.py")


@pytest.fixture(scope="module")
def command(script, face_files):
    """Run the program with the tiny preset on the synthetic faces."""

    def run(out, *words, **paths):
        files = {"lfw": "lfw.npz", "pairs": "pairs.txt", "faces": "faces.npz", "expressions": "expressions.npz"}
        named = {name: face_files / file for name, file in files.items()} | {"orl": face_files / "orl"} | paths
        options = [text for name, path in named.items() for text in (f"--{name}", str(path))]
        script.main(["--preset", "tiny", "--out", str(out), *options, *words])

    return run


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    command(out)
    return out


def results(out):
    return json.loads((out / "results.json").read_text())


def test_the_pairs_are_measured_unpruned_pruned_and_with_three_more_tasks_bit_identically(finished):
    found = results(finished)
    assert list(found["verification"]) == ["unpruned", "pruned 50%", "with age, gender, expression"]
    assert all(row["pairs"] == 8 for row in found["verification"].values())
    assert [row["task"] for row in found["tasks"]] == ["face", "age", "gender", "expression"]
    assert found["identical"] is True
    assert found["sizes"]["bundle_bytes"] < found["sizes"]["stored_bytes"]
    unpruned, pruned, final = found["verification"].values()
    assert final == pruned
    assert unpruned != pruned


def test_a_stopped_run_is_resumed_and_measures_no_piece_twice(command, finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "results.json").unlink()
    shutil.rmtree(copy / "embeddings" / "pruned-50")
    kept = {path: path.stat().st_mtime_ns for path in copy.rglob("*.npy")}
    command(copy)
    assert results(copy) == results(finished)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_a_few_embeddings_may_be_computed_again_after_the_tasks_instead_of_all(
    command, script, finished, tmp_path, monkeypatch
):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "results.json").unlink()
    shutil.rmtree(copy / "embeddings" / "with-age-gender-expression")
    monkeypatch.setitem(script.PRESETS, "tiny", dataclasses.replace(script.PRESETS["tiny"], again=3))
    command(copy)
    found = results(copy)
    assert list(found["verification"]) == ["unpruned", "pruned 50%"]
    assert (found["identical"], found["compared"]) == (True, 3)
    assert "3 embeddings after age, gender and expression were packed: bit-identical" in script.table(found)


def test_settings_of_a_phase_may_change_until_it_has_begun(command, script, finished, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(finished / "embeddings" / "unpruned", copy / "embeddings" / "unpruned")
    shutil.copy(finished / "settings.json", copy)
    kept = {path: path.stat().st_mtime_ns for path in copy.rglob("*.npy")}
    assert kept
    monkeypatch.setitem(script.PRESETS, "tiny", dataclasses.replace(script.PRESETS["tiny"], matched=(8, 8)))
    command(copy, "--only", "unpruned")
    assert kept == {path: path.stat().st_mtime_ns for path in copy.rglob("*.npy")}
    assert results(copy)["verification"]["unpruned"] == results(finished)["verification"]["unpruned"]
    with pytest.raises(SystemExit, match="retraining was begun with other settings"):
        command(finished)


def test_the_local_run_measures_what_it_prunes_to_and_keeps_the_unpruned_phase_of_the_full_one(script):
    small, full = script.PRESETS["local"], script.PRESETS["full"]
    assert set(small.rungs) == set(small.measured) == {0.3, 0.5, 0.7}
    assert small.phases["unpruned"] == full.phases["unpruned"]
    for phase in ("retraining", "tasks"):
        assert small.phases[phase] != full.phases[phase]


def test_a_run_of_other_files_or_with_a_missing_image_is_refused(command, finished, face_files, tmp_path):
    with pytest.raises(SystemExit, match="retraining was begun with other settings"):
        command(finished, expressions=face_files / "faces.npz")
    other = tmp_path / "other.npz"
    other.write_bytes((face_files / "lfw.npz").read_bytes() + b" ")
    with pytest.raises(SystemExit, match="unpruned was begun with other settings"):
        command(finished, lfw=other)
    (tmp_path / "pairs.txt").write_text((face_files / "pairs.txt").read_text().replace("Di", "Eve"))
    with pytest.raises(SystemExit, match=r"lacks 2 of 8 images of the pairs file, such as Eve_0001"):
        command(tmp_path / "out", pairs=tmp_path / "pairs.txt")
    assert not (tmp_path / "out").exists()
