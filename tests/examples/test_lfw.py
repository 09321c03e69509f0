"""The program that measures LFW, in small: synthetic faces, an untrained network, every piece of the real run."""

import json
import shutil

import pytest


@pytest.fixture(scope="module")
def script(program):
    return program("facial/lfw.py")


@pytest.fixture(scope="module")
def command(script, face_files):
    """Run the program with the tiny preset on the synthetic faces."""

    def run(out, **paths):
        files = {"lfw": "lfw.npz", "pairs": "pairs.txt", "faces": "faces.npz", "expressions": "expressions.npz"}
        named = {name: face_files / file for name, file in files.items()} | {"orl": face_files / "orl"} | paths
        options = [text for name, path in named.items() for text in (f"--{name}", str(path))]
        script.main(["--preset", "tiny", "--out", str(out), *options])

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


def test_a_run_of_other_files_or_with_a_missing_image_is_refused(command, finished, face_files, tmp_path):
    with pytest.raises(SystemExit, match="begun with other settings"):
        command(finished, expressions=face_files / "faces.npz")
    (tmp_path / "pairs.txt").write_text((face_files / "pairs.txt").read_text().replace("Di", "Eve"))
    with pytest.raises(SystemExit, match=r"lacks 2 of 8 images of the pairs file, such as Eve_0001"):
        command(tmp_path / "out", pairs=tmp_path / "pairs.txt")
    assert not (tmp_path / "out").exists()
