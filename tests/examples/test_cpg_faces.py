"""CPG's experiment with faces, in small: synthetic faces, a small network, every stage of the real run."""

import json

import pytest


@pytest.fixture(scope="module")
def script(program):
    return program("facial/cpg_faces.py")


def words(face_files, out):
    files = ("--faces", face_files / "faces.npz", "--expressions", face_files / "expressions.npz")
    return [str(word) for word in ("--preset", "tiny", *files, "--orl", face_files / "orl", "--out", out)]


def test_the_tasks_are_learned_with_their_margins_and_the_face_embeddings_stay_bit_identical(
    script, face_files, tmp_path
):
    script.main(words(face_files, tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["task"] for row in found["tasks"]] == ["face", "expression", "gender"]
    assert found["identical"] is True
    for row in found["tasks"]:
        reached = row["val"] + script.MARGINS[row["task"]] >= row["goal"] - 1e-9
        assert (row["status"] == "goal met") == reached
    assert "99.30" in script.table(found)


def test_the_recipes_are_those_of_the_scripts(script):
    assert [script.recipe(name).tolerance for name in script.MARGINS] == [0.005, 0.015, 0.005, 0.010]
    assert [script.recipe(name).train.rate.initial for name in script.MARGINS] == [1e-3, 5e-4, 5e-4, 5e-4]
    face, gender = script.recipe("face"), script.recipe("gender")
    assert [(one.ladder.phase.epochs, one.ladder.every) for one in (face, gender)] == [(10, 1000), (20, 100)]
    assert (gender.sharing, gender.ladder.rungs[-1], gender.ladder.ramp) == ("picked", 0.95, 4.0)


def test_data_is_named_once(script, face_files, tmp_path):
    with pytest.raises(SystemExit, match="two packs, or --data FOLDER"):
        script.main([*words(face_files, tmp_path / "out"), "--data", str(tmp_path)])
    assert not (tmp_path / "out").exists()
